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


class _Shape(NamedTuple):
    """Row ranges of the experts, features in and out, whether there are LayerNorm and named rows.

    ``plain``: no GELU and no residual, as in the head over all tokens.
    """

    bounds: tuple[int, ...]
    inner: int
    out: int
    norm: bool = True
    named: bool = False
    plain: bool = False

    @property
    def name(self) -> str:
        """Rows and features."""
        return f"{self.bounds[-1]} rows, {self.inner} -> {self.out}"


_LINEAR = (
    _Shape((0, 5, 5, 21), 72, 40),
    _Shape((0, 7, 19), 35, 33, norm=False, named=True),
    # More parts of statistics than a product takes (_row_statistics.MOST_PARTS).
    _Shape((0, 4, 11), 24 * 17, 24),
    # More steps along the features than a tile has stages.
    _Shape((0, 23, 40), 336, 80),
)
# 16 bits have classes of their own for many rows.
_MANY_ROWS = (
    _Shape((0, 197, 300), 336, 192),
    _Shape((0, 260), 208, 131, norm=False, plain=True),
)
# CUDA kernels take features in multiples of 8. On 132 multiprocessors: low tiles; of which four and two blocks have each
# a share of K; high tiles, one by one, in clusters of two, and of four where rows are not named.
_LINEAR_ON_CUDA = (
    _Shape((0, 5, 5, 21), 72, 40),
    _Shape((0, 7, 19), 136, 200, norm=False, named=True),
    _Shape((0, 150, 230), 520, 264),
    _Shape((0, 197), 520, 264, norm=False, named=True),
    _Shape((0, 197), 264, 1160),
    _Shape((0, 90, 197), 264, 1160, norm=False, named=True),
    _Shape((0, 4200), 264, 512),
    _Shape((0, 4200), 72, 512, named=True),
    _Shape((0, 8448), 72, 256),
    _Shape((0, 4096, 8448), 264, 256, norm=False, named=True),
    _Shape((0, 4200, 6100), 264, 392),
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
    residual: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> _Product:
        """The same product with every tensor changed."""
        weights, biases, norm_weights, norm_biases = (
            [change(t) for t in group] for group in self[1:5]
        )
        own = (weights, biases, norm_weights, norm_biases)
        residual = None if self.residual is None else change(self.residual)
        return _Product(change(self.x), *own, residual)


def _on_triton(own: _Product, rows: Any, rest: Any, with_grad: bool) -> tuple[Tensor, ...]:
    x, weights, *others = own
    # With statistics of x, as an op before would have left them, and without.
    given = moments(x.detach(), 24) if own.norm_weights and rows is None else None
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
    shapes: tuple[_Shape, ...] = (),
    product: Callable[[_Product, Any, Any, bool], tuple[Tensor, ...]] = _on_triton,
) -> list[Any]:
    """Name, and for kernel, plain PyTorch and formula: y, and with gradients those of all operands."""
    generator, results = torch.Generator().manual_seed(0), []
    draw = _Draw(generator, dtype)
    more = () if dtype == torch.float32 else _MANY_ROWS
    for shape in shapes or (*_LINEAR, *more):
        experts, count = len(shape.bounds) - 1, shape.bounds[-1]
        held = count + 2 * shape.named
        here = _Product(
            draw(held, shape.inner, shift=3.0),
            [draw(shape.out, shape.inner, scale=shape.inner**-0.5) for _ in range(experts)],
            [draw(shape.out) for _ in range(experts)],
            [draw(shape.inner, scale=0.5, shift=1.0) for _ in range(experts * shape.norm)],
            [draw(shape.inner) for _ in range(experts * shape.norm)],
            None if shape.plain else draw(held, shape.out),
        )
        seed = draw(held, shape.out)
        rows = torch.randperm(held, generator=generator)[:count] if shape.named else None
        rest = (list(shape.bounds), 1e-5, "none" if shape.plain else "gelu")

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
        results.append((shape.name, *found))
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
        leaves = {
            f"{field}[{place}]": leaf
            for field, group in own._asdict().items()
            for place, leaf in enumerate(group if isinstance(group, list) else [group])
            if leaf is not None
        }
        gradients = torch.autograd.grad(found["y"], list(leaves.values()), seed)
        found |= dict(zip(leaves, gradients, strict=True))
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
