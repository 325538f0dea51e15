"""What this machine can do at most, and what the work needs at least.

Ceilings are measured in the same run as the runtimes: the rate of the fastest matrix product known
here, PyTorch's or our own, on random data (zeros clock higher), and the rate of a copy that no cache
holds. They are what software reaches, not what the data sheet says.

Work is counted, not measured: the multiplications and additions that the answer needs, with no padded
rows, and in the last layer only the rows that the task's head reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.ops import expert_linear

if TYPE_CHECKING:
    from beit3_fast.config import BEiT3Config

# (rows, in, out): eight images of 197 tokens through the projections of base and large, and one
# square product, which some libraries run faster than any of them.
MATMUL_SHAPES = (
    (1576, 768, 2304),
    (1576, 768, 3072),
    (1576, 3072, 768),
    (1576, 1024, 4096),
    (2048, 2048, 2048),
)
_COPY_BYTES = 256 << 20


def measure_ceilings(
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    seconds: float = 0.25,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The JSON contract's "ceilings": TFLOP/s for each dtype, and copied GB/s (read plus written).

    Each shape runs for about `seconds`; the fastest call of the fastest shape counts, since whatever
    else runs on the machine only ever slows a call down.
    """
    rates = {}
    for dtype in dtypes:
        best = 0.0
        for rows, width, out in MATMUL_SHAPES:
            x = torch.randn(rows, width).to(device, dtype)
            w = torch.randn(out, width).to(device, dtype)
            for product in (partial(F.linear, x, w), partial(_our_product, x, w)):
                took = _fastest(product, seconds, synchronize)
                best = max(best, 2 * rows * width * out / took)
        rates[str(dtype).removeprefix("torch.")] = round(best / 1e12, 4)
    source = torch.randint(0, 255, (_COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = _fastest(lambda: target.copy_(source), seconds, synchronize)
    return {"matmul_tflops": rates, "copy_gbps": round(2 * _COPY_BYTES / took / 1e9, 2)}


def _our_product(x: Tensor, w: Tensor) -> Tensor:
    return expert_linear(x, [w], bounds=(0, len(x)))


def _fastest(call: Callable[[], object], seconds: float, synchronize: Callable[[], None]) -> float:
    samples: list[float] = []
    with torch.inference_mode():
        call()
        call()
        synchronize()
        start = time.perf_counter()
        while len(samples) < 3 or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            call()
            synchronize()
            samples.append(time.perf_counter() - before)
    return min(samples)


def embedding_flops(config: BEiT3Config, images: int) -> float:
    """The patch projection of `images` images."""
    patches = config.num_vision_tokens - 1
    return 2.0 * images * patches * config.in_chans * config.patch_size**2 * config.embed_dim


def encoder_flops(
    config: BEiT3Config,
    vision: int,
    texts: Sequence[int],
    *,
    read: Sequence[int] | None = None,
    seq2seq: bool = False,
) -> float:
    """Floating-point operations of the encoder for samples of `vision` image tokens and a text each.

    Args:
        vision: image tokens of every sample, 0 without an image.
        texts: real text tokens of each sample, 0 without a text.
        read: how many rows of each sample the head reads after the last layer; None means all.
        seq2seq: text sees the image and earlier text, the image sees only itself.
    """
    width, ffn = config.embed_dim, config.ffn_dim
    total = 0.0
    for i, text in enumerate(texts):
        tokens = vision + text
        last_rows = tokens if read is None else read[i]
        if seq2seq:
            # A head that reads rows of a captioning model reads text rows: the mean of what they see.
            scores = vision * vision + text * vision + text * (text + 1) // 2
            last_scores = (
                scores if read is None else last_rows * (vision + (text + 1) / 2 if text else 0)
            )
        else:
            scores, last_scores = tokens * tokens, last_rows * tokens
        full = 2.0 * tokens * (4 * width * width + 2 * width * ffn) + 4.0 * scores * width
        last = (
            2.0 * tokens * 2 * width * width
            + 2.0 * last_rows * (2 * width * width + 2 * width * ffn)
            + 4.0 * last_scores * width
        )
        total += (config.num_layers - 1) * full + last
    return total


def linear_flops(rows: int, *widths: int) -> float:
    """A chain of linear layers on `rows` rows: ``linear_flops(8, 768, 3129)`` is one of 768 to 3129."""
    return sum(2.0 * rows * a * b for a, b in pairwise(widths))
