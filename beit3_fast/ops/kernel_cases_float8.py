"""The calls of ``kernel_cases`` for products in 8 bits: what they make, and what they leave for the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_fast.composite.float8_linear import float8_linear as composite_linear
from beit3_fast.float8 import BLOCK, Quantized, dequantize, quantize
from beit3_fast.ops import cuda_float8
from beit3_fast.parity import Parity, op_parity
from beit3_fast.reference.float8_linear import float8_linear as formula

# Row ranges of the experts, features in and out, LayerNorm.
_SHAPES = (
    ((0, 5, 5, 21), 80, 48, True),
    ((0, 7, 19), 144, 208, False),
    # Tiles for more multiprocessors than a GPU has today: the kernel takes high ones.
    ((0, 4200, 6100), 272, 400, True),
    ((0, 70), 1040, 144, True),
)


def moments(x: Tensor, width: int) -> Tensor:
    """Mean and sum of squared deviations of each ``width`` columns of the rows [M, C], [M, T, 2] in fp32 or fp64."""
    wide = x if x.dtype is torch.float64 else x.float()
    means = [part.mean(1) for part in wide.split(width, dim=1)]
    squares = [part.var(1, correction=0) * part.shape[1] for part in wide.split(width, dim=1)]
    return torch.stack([torch.stack(means, 1), torch.stack(squares, 1)], dim=2)


def statistics_parity(parts: Tensor, rows: Tensor, width: int) -> Parity:
    """Statistics that a kernel left, against those of the rows as it stored them: rounded otherwise, rows have others.

    Judged in the dtype of the rows: sums in fp32 differ by their order, and by more than one another's error.
    """
    plain = moments(rows, width).to(rows.dtype)
    return op_parity(parts.to(rows.dtype), plain, moments(rows.double(), width))


def cuda_float8_linear(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The product with LayerNorm, bias, GELU and residual in CUDA C++, its rows rounded by their kernel."""
    generator, parities = torch.Generator().manual_seed(0), {}

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    for bounds, inner, out, with_norm in _SHAPES:
        experts, count = range(len(bounds) - 1), bounds[-1]
        weights = [quantize(draw(out, inner, scale=inner**-0.5), inner) for _ in experts]
        vectors = (
            [draw(out) for _ in experts],
            [torch.ones(inner, dtype=dtype) for _ in experts if with_norm],
            [draw(inner) for _ in experts if with_norm],
        )
        x, residual = draw(count, inner), draw(count, out)
        tail: tuple[Any, ...] = (None, bounds, 1e-5, "gelu")
        biases, gammas, betas = ([t.double() for t in group] for group in vectors)
        truth = formula(x.double(), weights, biases, gammas, betas, residual.double(), *tail)
        plain = composite_linear(x, weights, *vectors, residual, *tail)
        found = _by_kernels(x, weights, vectors, residual, tail, device)
        name = f"{count} rows"
        parities[f"y, {name}"] = op_parity(found[0], plain, truth)
        parities[f"statistics, {name}"] = statistics_parity(found[1], found[0], BLOCK)
        left = dequantize(Quantized(*found[2:]))
        parities[f"in 8 bits, {name}"] = op_parity(left, dequantize(quantize(plain)), truth)
    return parities


def _by_kernels(
    x: Tensor,
    weights: list[Quantized],
    vectors: tuple[list[Tensor], ...],
    residual: Tensor,
    tail: tuple[Any, ...],
    device: str,
) -> list[Tensor]:
    numbers, scales = ([t.to(device) for t in group] for group in zip(*weights, strict=True))
    biases, gammas, betas = ([t.to(device) for t in group] for group in vectors)
    _, bounds, eps, activation = tail
    found = cuda_float8.expert_linear(
        x.to(device),
        None,
        None,
        None,
        0,
        numbers,
        scales,
        biases,
        gammas,
        betas,
        residual.to(device),
        None,
        list(bounds),
        eps,
        activation,
        "all",
        True,
    )
    return [t.cpu() for t in found]
