"""One step of decoding captions beside its memory floor: what it must read at least, at the rate that memory is read.

A step reads the text expert's weights of every layer, the head's, and the keys and values of the batch's images and words,
each once; a few rows meet them, so that reading is what bounds it on a CPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from beit3_fast.generate.options import CANDIDATES_PER_BEAM
from beit3_fast.model.decoding import CaptionDecoder
from beit3_fast.timing import quantiles

# More than any cache holds.
_READ_BYTES = 512 << 20


@torch.no_grad()
def measure_decode_step(
    model: Any, images: Tensor, beams: int, words: int, mask_id: int
) -> dict[str, float]:
    """Milliseconds of a step (median over ``words`` steps of one batch) and of its floor, and their ratio.

    model: a BEiT3ForCaptioning whose last layer has no third expert; images [B, 3, H, W] in its dtype. The rate of reading
    is measured between the steps, and the fastest reading counts.
    """
    decoder = CaptionDecoder(model, images, beams, words + 1, 0, mask_id)
    decoder.start()
    source = torch.ones(_READ_BYTES // 4)
    own = torch.arange(beams).repeat(len(images), 1)
    parents = torch.zeros_like(own)  # all of them follow the first token
    steps, fastest = [], float("inf")
    for word in range(words):
        said = torch.full_like(own, 5 + word)
        start = time.perf_counter()
        decoder.likeliest(decoder.step(said, parents), CANDIDATES_PER_BEAM * beams, None)
        steps.append(time.perf_counter() - start)
        start = time.perf_counter()
        source.sum()
        fastest = min(fastest, time.perf_counter() - start)
        parents = own
    seconds = quantiles(steps).p50
    rate = _READ_BYTES / fastest
    floor = (_weights(model) + _cache(decoder)) / rate
    return {
        "step_ms": round(1e3 * seconds, 2),
        "floor_ms": round(1e3 * floor, 2),
        "of_floor": round(seconds / floor, 2),
        "read_gbps": round(rate / 1e9, 2),
    }


def _weights(model: Any) -> int:
    """Bytes of the weights that meet the rows of words."""
    own = [
        parameter
        for name, parameter in model.named_parameters()
        if ("encoder.layers" in name and ".B." in name) or name.startswith("mlm_head")
    ]
    return sum(parameter.numel() * parameter.element_size() for parameter in own)


def _cache(decoder: CaptionDecoder) -> int:
    """Bytes of all keys and values that the last step saw."""
    seen = decoder.num_vision + decoder.used
    table = decoder.model.beit3.text_embed.weight
    row = 2 * table.shape[1] * table.element_size()
    return sum(cache.num_samples * seen * row for cache in decoder.caches)
