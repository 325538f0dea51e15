"""One step of decoding captions beside its memory floor: what it must read at least, at the rate that memory is read.

    python -m bench.decode_step --device cuda --batch 64      a line of JSON for a model with random weights

A step reads the text expert's weights of every layer, the head's, and the keys and values of the batch's images and words,
each once; a few rows meet them, so that reading is what bounds it. The search that follows a step counts as far as the
words that the head names.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import beit3_fast
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

    model: a BEiT3ForCaptioning whose last layer has no third expert; images [B, 3, H, W] in its dtype, on its device. The
    rate of reading is measured between the steps, and the fastest reading counts.
    """
    device = images.device
    decoder = CaptionDecoder(model, images, beams, words + 1, 0, mask_id)
    decoder.start()
    source = torch.ones(_READ_BYTES // 4, device=device)
    own = torch.arange(beams, device=device).repeat(len(images), 1)
    parents = torch.zeros_like(own)  # all of them follow the first token
    steps, fastest = [], float("inf")
    for word in range(words):
        said = torch.full_like(own, 5 + word)

        def step(said: Tensor = said, parents: Tensor = parents) -> None:
            decoder.likeliest(decoder.step(said, parents), CANDIDATES_PER_BEAM * beams, None)

        steps.append(_seconds(step, device))
        fastest = min(fastest, _seconds(source.sum, device))
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


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def main(arguments: list[str] | None = None) -> int:
    """Prints what a step took."""
    parser = argparse.ArgumentParser(description="A captioning step beside its memory floor.")
    parser.add_argument("--model", default="beit3_base_patch16_480_captioning")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--words", type=int, default=20)
    options = parser.parse_args(arguments)
    own = {name: getattr(options, name) for name in ("device", "dtype", "impl")}
    model: Any = beit3_fast.create_model(options.model, **own)
    images = torch.randn(options.batch, 3, *model.config.image_shape).to(model.mlm_head.weight)
    mask = model.config.vocab_size - 9
    found = measure_decode_step(model, images, options.beams, options.words, mask)
    print(json.dumps(vars(options) | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
