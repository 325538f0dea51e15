"""expert_linear alone: python -m pytest bench/micro/bench_expert_linear.py

The four products of a layer, as the encoder calls them, and the same by plain PyTorch calls on split tensors, as torchscale makes
them: on the rows of several workloads, and on eight images of 224 pixels with a caption of 20 tokens each ("pairs") with the
gradients of all operands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.ops import expert_linear, library
from beit3_fast.ops.operands import Norm
from beit3_fast.ops.packed_weight import quantize

from .conftest import Timed

# C, and where the rows of the two experts begin and end.
WORKLOADS = {
    "pairs": (768, (0, 8 * 197, 8 * 217)),
    "one image": (768, (0, 197, 197)),
    "vqa": (768, (0, 8 * 901, 8 * 914)),
    "sentences": (768, (0, 0, 256 * 14)),
    "large": (1024, (0, 8 * 197, 8 * 197)),
    "giant": (1408, (0, 8 * 197, 8 * 197)),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Features of operand and result in units of C, activation, and whether a residual is added.
PRODUCTS = {
    "qkv": (1, 3, None, False),
    "out": (1, 1, None, True),
    "fc1": (1, 4, "gelu", False),
    "fc2": (4, 1, None, True),
}


class Operands(NamedTuple):
    """Two experts' weights and one batch of rows."""

    bounds: tuple[int, ...]
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    norm: Norm
    residual: Tensor | None
    activation: str | None


def operands(product: str, dtype: torch.dtype, workload: str) -> Operands:
    """Random data at the sizes of one product."""
    unit, bounds = WORKLOADS[workload]
    times, out_times, activation, has_residual = PRODUCTS[product]
    width, out = times * unit, out_times * unit
    gen = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=gen)).to(dtype)

    return Operands(
        bounds,
        random(bounds[-1], width),
        [random(out, width, scale=width**-0.5) for _ in range(2)],
        [random(out) for _ in range(2)],
        Norm([1 + random(width, scale=0.1) for _ in range(2)], [random(width) for _ in range(2)]),
        random(bounds[-1], out) if has_residual else None,
        activation,
    )


def by_plain_calls(o: Operands) -> Tensor:
    """Split, LayerNorm, linear, GELU for each expert, concatenate, add."""
    parts = []
    for expert, x in enumerate(o.x.split((o.bounds[1], o.bounds[2] - o.bounds[1]))):
        x = F.layer_norm(x, x.shape[-1:], o.norm.weights[expert], o.norm.biases[expert], o.norm.eps)
        y = F.linear(x, o.weights[expert], o.biases[expert])
        parts.append(F.gelu(y.float()).type_as(y) if o.activation else y)
    y = torch.cat(parts)
    return y if o.residual is None else y + o.residual


@pytest.mark.parametrize("impl", ["auto", "cpu", "cpu int8", "composite", "plain PyTorch"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_linear(timed: Timed, dtype: str, workload: str, product: str, impl: str) -> None:
    o = operands(product, DTYPES[dtype], workload)
    group = f"expert_linear {workload} {product} {dtype}"
    flops = 2.0 * o.bounds[-1] * o.weights[0].numel()
    if impl == "plain PyTorch":
        timed(group, flops, lambda: by_plain_calls(o))
        return
    weights: list[Tensor] = o.weights
    if impl.endswith(" int8"):
        if not library.available():
            pytest.skip(f"needs the compiled library, which {library.why_unavailable()}")
        weights = [quantize(weight, o.x.dtype) for weight in o.weights]
    timed(
        group,
        flops,
        lambda: expert_linear(
            o.x,
            weights,
            o.biases,
            bounds=o.bounds,
            norm=o.norm,
            activation=o.activation,
            residual=o.residual,
            impl=impl.removesuffix(" int8"),
        ),
    )


@pytest.mark.parametrize("impl", ["auto", "cpu", "composite", "plain PyTorch"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(timed: Timed, dtype: str, product: str, impl: str) -> None:
    """Forward and backward."""
    o = operands(product, DTYPES[dtype], "pairs")
    leaves = [o.x, *o.weights, *o.biases, *o.norm.weights, *o.norm.biases]
    for leaf in leaves if o.residual is None else [*leaves, o.residual]:
        leaf.requires_grad_()
    seed = torch.randn(o.bounds[-1], len(o.biases[0])).to(o.x.dtype)

    def forward() -> Tensor:
        if impl == "plain PyTorch":
            return by_plain_calls(o)
        vectors: dict[str, Any] = {"norm": o.norm, "activation": o.activation}
        vectors["residual"] = o.residual
        return expert_linear(o.x, o.weights, o.biases, bounds=o.bounds, impl=impl, **vectors)

    def step() -> Tensor:
        with torch.inference_mode(False):
            return torch.autograd.grad(forward(), leaves, seed)[0]

    flops = 6.0 * o.bounds[-1] * o.weights[0].numel()
    timed(f"gradients {product} {dtype}", flops, step)
