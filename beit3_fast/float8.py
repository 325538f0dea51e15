"""Numbers of 8 bits, e4m3: 4 bits of exponent, 3 of fraction, magnitudes up to 448.

Scales are powers of two, the largest magnitude of what shares one lands in [128, 256). Such a scale changes no
number's relative rounding error, its inverse is exact, and bfloat16 holds every scaled number: what is rounded once
comes back the same when it is rounded again. The price is one bit of range of eighteen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# Columns of a row that share a scale: what a tile of a kernel knows of the row when it stores it.
BLOCK = 128
# Biased exponents. Less than 2^-63 counts as 0, so that every scale and its inverse are normal numbers of fp32.
_LOWEST, _NOT_FINITE, _ONE = 64, 255, 127
_LARGEST_LANDS_AT = 7


class Quantized(NamedTuple):
    """Rows in 8 bits: ``numbers`` e4m3 [M, C], ``scales`` fp32 [M, ceil(C / width)] for each ``width`` columns."""

    numbers: Tensor
    scales: Tensor

    def select(self, rows: Tensor) -> Quantized:
        """The rows that ``rows`` int64 [R] names."""
        return Quantized(self.numbers.view(torch.uint8)[rows].view(E4M3), self.scales[rows])


def quantize(x: Tensor, width: int = BLOCK) -> Quantized:
    """Round x [M, C], to nearest even; where a number is not finite, so is nothing that shares its scale."""
    count, columns = x.shape
    parts = -(-columns // width)
    wide = F.pad(x.float(), (0, parts * width - columns)).view(count, parts, width)
    # The exponent alone: taking logarithms would round.
    largest = wide.abs().amax(2, keepdim=True).view(torch.int32) >> 23
    exponent = largest.clamp(min=_LOWEST) - _LARGEST_LANDS_AT
    inverse = (2 * _ONE - exponent << 23).view(torch.float32)
    scales = (exponent << 23).view(torch.float32)
    scales = torch.where(largest == _NOT_FINITE, torch.nan, scales)
    numbers = (wide * inverse).view(count, parts * width)[:, :columns].to(E4M3)
    return Quantized(numbers.contiguous(), scales[:, :, 0])


def quantize_by(x: Tensor, scales: Tensor, width: int = BLOCK) -> Quantized:
    """Round x [M, C] by scales [M, ceil(C / width)] that are known to be large enough."""
    inverse = 1 / scales.repeat_interleave(width, 1)[:, : x.shape[1]]
    return Quantized((x.float() * inverse).to(E4M3), scales)


def dequantize(rounded: Quantized, width: int = BLOCK) -> Tensor:
    """The rounded numbers, fp32 [M, C]."""
    numbers, scales = rounded
    return numbers.float() * scales.repeat_interleave(width, 1)[:, : numbers.shape[1]]
