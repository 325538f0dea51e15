"""The small calls on which a kernel is checked on a user's machine: every class of tiles, every mask.

Each compares the kernel with the formula in fp64, by the rule that the tests use (``beit3_fast.parity``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.composite import expert_linear as composite_linear
from beit3_fast.ops import cuda_kernels, triton_kernels
from beit3_fast.ops.kernel_cases_attention import (
    cuda_shared_attention,
    shared_attention,
    shared_attention_backward,
)
from beit3_fast.ops.kernel_cases_decoding import cuda_cached_attention, cuda_head_top_k
from beit3_fast.ops.kernel_cases_float8 import cuda_float8_linear, moments, statistics_parity
from beit3_fast.parity import Parity, op_parity
from beit3_fast.reference import expert_linear as linear_formula
from beit3_fast.reference import masked_linear_cross_entropy as head_formula

# Row ranges of the experts, features in and out, LayerNorm, gathered rows.
_LINEAR = (
    ((0, 5, 5, 21), 72, 40, True, False),
    ((0, 7, 19), 35, 33, False, True),
    # More parts of statistics than a product takes (_row_statistics.MOST_PARTS).
    ((0, 4, 11), 24 * 17, 24, True, False),
)
_MANY_ROWS = ((0, 197, 300), 128, 192, True, False)
# CUDA kernels take features in multiples of 8, and more rows show more of the order in which they work.
_LINEAR_ON_CUDA = (
    ((0, 5, 5, 21), 72, 40, True, False),
    ((0, 7, 19), 136, 200, False, True),
    ((0, 2100, 2500), 264, 392, True, False),
)


def expert_linear(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The product with LayerNorm, bias, GELU and residual, and the row statistics that it leaves."""
    parities = {}
    for name, *results in _linear(dtype, device, with_grad=False):
        for part in results[0]:
            parities[f"{part}, {name}"] = op_parity(*(own[part] for own in results))
    return parities


def expert_linear_backward(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The forward pass again, as it keeps what the backward pass reads, and the gradients of every operand."""
    parities = {}
    for name, *results in _linear(dtype, device, with_grad=True):
        for operand in results[0]:
            own = (result[operand] for result in results)
            parities[f"{operand}, {name}"] = op_parity(*own, gradient=operand != "y")
    return parities


def masked_linear_cross_entropy(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The losses."""
    return {"losses": op_parity(*(own["losses"] for own in _head(dtype, device, with_grad=False)))}


def masked_linear_cross_entropy_backward(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The losses again, and the gradients of rows, weight and bias."""
    results = _head(dtype, device, with_grad=True)
    return {
        name: op_parity(*(own[name] for own in results), gradient=name != "losses")
        for name in results[0]
    }


def cuda_expert_linear(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The product with LayerNorm, bias, GELU and residual, and the row statistics that it leaves, in CUDA C++."""
    parities = {}
    own: dict[str, Any] = {"shapes": _LINEAR_ON_CUDA, "product": _on_cuda}
    for name, *results in _linear(dtype, device, with_grad=False, **own):
        y, left = results[0]["y"], results[0]["statistics"]
        parities[f"y, {name}"] = op_parity(*(each["y"] for each in results))
        statistics = statistics_parity(left, y, cuda_kernels.STATISTICS_WIDTH)
        parities[f"statistics, {name}"] = statistics
    return parities


CASES: dict[str, Callable[[torch.dtype, str], dict[str, Parity]]] = {
    "expert_linear": expert_linear,
    "expert_linear_backward": expert_linear_backward,
    "shared_attention": shared_attention,
    "shared_attention_backward": shared_attention_backward,
    "masked_linear_cross_entropy": masked_linear_cross_entropy,
    "masked_linear_cross_entropy_backward": masked_linear_cross_entropy_backward,
}
CUDA_CASES: dict[str, Callable[[torch.dtype, str], dict[str, Parity]]] = {
    "cuda_expert_linear": cuda_expert_linear,
    "cuda_float8_linear": cuda_float8_linear,
    "cuda_shared_attention": cuda_shared_attention,
    "cuda_cached_attention": cuda_cached_attention,
    "cuda_head_top_k": cuda_head_top_k,
}


class _Draw:
    """Random numbers, rounded to a dtype."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self.generator, self.dtype = generator, dtype

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale + shift).to(self.dtype)


class _Product(NamedTuple):
    """Operands of a product, in the order in which every implementation takes them."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    residual: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> _Product:
        """The same product with every tensor changed."""
        weights, biases, norm_weights, norm_biases = (
            [change(t) for t in group] for group in self[1:5]
        )
        own = (weights, biases, norm_weights, norm_biases)
        return _Product(change(self.x), *own, change(self.residual))


def _on_triton(own: _Product, rows: Any, rest: Any, with_grad: bool) -> tuple[Tensor, ...]:
    x, weights, *others = own
    # With statistics of x, as an op before would have left them, and without.
    given = moments(x.detach(), 24) if rows is None else None
    options = (rows, *rest, with_grad, not with_grad)
    y, _, left = triton_kernels.expert_linear(x, given, 24, weights, [], *others, *options)
    return y, left


def _on_cuda(own: _Product, rows: Any, rest: Any, with_grad: bool) -> tuple[Tensor, ...]:
    x, weights, *others = own
    given = moments(x.detach(), 24) if rows is None else None
    return tuple(cuda_kernels.expert_linear(x, given, 24, weights, [], *others, rows, *rest, True))


def _linear(
    dtype: torch.dtype,
    device: str,
    *,
    with_grad: bool,
    shapes: tuple[Any, ...] = (),
    product: Callable[[_Product, Any, Any, bool], tuple[Tensor, ...]] = _on_triton,
) -> list[Any]:
    """Name, and for kernel, plain PyTorch and formula: y, and with gradients those of all operands."""
    generator, results = torch.Generator().manual_seed(0), []
    draw = _Draw(generator, dtype)
    # fp32 has one class of tiles, 16 bits have another one for many rows.
    more = () if dtype == torch.float32 else (_MANY_ROWS,)
    for bounds, inner, out, with_norm, with_rows in shapes or (*_LINEAR, *more):
        experts, count = len(bounds) - 1, bounds[-1]
        here = _Product(
            draw(count + 2 * with_rows, inner, shift=3.0),
            [draw(out, inner, scale=inner**-0.5) for _ in range(experts)],
            [draw(out) for _ in range(experts)],
            [draw(inner, scale=0.5, shift=1.0) for _ in range(experts * with_norm)],
            [draw(inner) for _ in range(experts * with_norm)],
            draw(count + 2 * with_rows, out),
        )
        seed = draw(count + 2 * with_rows, out)
        rows = torch.randperm(count + 2, generator=generator)[:count] if with_rows else None
        rest = (list(bounds), 1e-5, "gelu")

        def kernel(own: _Product, rows: Any = rows, rest: Any = rest) -> tuple[Tensor, ...]:
            moved = None if rows is None else rows.to(device)
            return product(own, moved, rest, with_grad)

        def plain(own: _Product, rows: Any = rows, rest: Any = rest) -> tuple[Tensor, ...]:
            y = composite_linear.expert_linear(*own, rows, *rest)
            return y, moments(y.detach(), triton_kernels.STATISTICS_WIDTH)

        def formula(own: _Product, rows: Any = rows, rest: Any = rest) -> tuple[Tensor, ...]:
            y = linear_formula.expert_linear(*own, rows, *rest)
            return y, moments(y.detach(), triton_kernels.STATISTICS_WIDTH)

        moved = here.map(lambda t: t.to(device))
        found = [
            _product_gradients(kernel, moved, seed.to(device), with_grad),
            _product_gradients(plain, here, seed, with_grad),
            _product_gradients(formula, here.map(Tensor.double), seed.double(), with_grad),
        ]
        results.append((f"{count} rows", *found))
    return results


def _product_gradients(
    product: Callable[[_Product], tuple[Tensor, ...]],
    operands: _Product,
    seed: Tensor,
    with_grad: bool,
) -> dict[str, Tensor]:
    own = operands.map(lambda t: t.detach().requires_grad_(with_grad))
    y, *left = product(own)
    found = {"y": y}
    if left and not with_grad:
        found["statistics"] = left[0]
    if with_grad:
        names = [
            f"{field}[{place}]"
            for field, group in own._asdict().items()
            for place in range(len(group) if isinstance(group, list) else 1)
        ]
        leaves = [t for group in own for t in (group if isinstance(group, list) else [group])]
        gradients = torch.autograd.grad(found["y"], leaves, seed)
        found |= dict(zip(names, gradients, strict=True))
    return {name: t.detach().cpu() for name, t in found.items()}


def _head(dtype: torch.dtype, device: str, *, with_grad: bool) -> list[dict[str, Tensor]]:
    """For kernel, plain PyTorch and formula: losses, and with gradients those of x, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    draw, smoothing = _Draw(generator, dtype), 0.1
    operands = [draw(40, 72, scale=2.0), draw(531, 72), draw(531)]
    rows = torch.randperm(40, generator=generator)[:19]
    targets = torch.randint(531, (19,), generator=generator)
    seed = torch.randn(19, generator=generator)

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        index = (rows.to(device), targets.to(device))
        losses, _ = triton_kernels.masked_linear_cross_entropy(x, weight, bias, *index, smoothing)
        return cast(Tensor, losses)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(x[rows], weight, bias).float()
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return head_formula.masked_linear_cross_entropy(x, weight, bias, rows, targets, smoothing)

    results = []
    for call, moved in (
        (kernel, [t.to(device) for t in operands]),
        (plain, operands),
        (formula, [t.double() for t in operands]),
    ):
        leaves = [t.detach().requires_grad_(with_grad) for t in moved]
        losses = call(*leaves)
        found = {"losses": losses}
        if with_grad:
            gradients = torch.autograd.grad(losses, leaves, seed.to(losses))
            found |= dict(zip(("x", "weight", "bias"), gradients, strict=True))
        results.append({name: t.detach().cpu() for name, t in found.items()})
    return results
