"""expert_linear: a grouped matrix product with LayerNorm, bias, GELU and residual inside.

    y[r] = activation(LayerNorm_e(x[r]) W_e^T + b_e) + residual[r]      for bounds[e] <= r < bounds[e + 1]

One call of a Multiway layer instead of one per modality plus a split and a concatenation. Exact (erf) GELU;
LayerNorm statistics, GELU and residual in fp32 inside the kernels. Method: BEiT-3 (arXiv 2208.10442) for the
experts, Magneto (arXiv 2210.06423) for the LayerNorm in front of every product.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.composite.expert_linear import PLAIN, expert_linear_backward, residual_gradient
from beit3_fast.composite.expert_linear import expert_linear as composite_impl
from beit3_fast.derived import derived, needs_grad
from beit3_fast.errors import ShapeError
from beit3_fast.ops import cpu_kernels, cuda_kernels, dispatch, library, triton_kernels
from beit3_fast.ops.float8_linear import float8_linear
from beit3_fast.ops.operands import (
    Leaves,
    Measured,
    Norm,
    Weight,
    check,
    flat,
    measured,
    rounding,
    shape,
)
from beit3_fast.ops.packed_weight import PANEL, PackedWeight, packed_size
from beit3_fast.reference.expert_linear import expert_linear as reference_impl

logger = logging.getLogger("beit3_fast")


def expert_linear(
    x: Tensor | Measured,
    weights: Sequence[Weight],
    biases: Sequence[Weight] | None = None,
    *,
    bounds: Sequence[int],
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Multiply rows of expert e with the weights of expert e.

    x [M, I]: fp32, bf16 or fp16 (fp64 too in "reference" and "composite"). ``weights``: per expert [O, I], or a
    tuple of tensors stacked along O (query, key, value). ``biases``: per expert [O], stacked likewise.
    ``bounds``: E + 1 ascending row numbers from 0 to R. ``residual`` [M, O]. Without ``rows``, M = R; with
    ``rows`` int64 [R], sorted row r is row rows[r] of x, residual and result, and rows of the result that it
    does not name are zero; it must not name a row twice. Returns [M, O] in x's dtype. Under torch.autocast the product
    is computed and returned in its dtype, LayerNorm in that of its parameters, the residual added in its own.

    Differentiable in every tensor argument but ``rows``. Raises ShapeError for operands that do not fit,
    ConfigError and KernelUnavailable for ``impl``. A ``Measured`` x brings the statistics that LayerNorm needs.
    """
    operands: dict[str, Any] = {"bounds": bounds, "norm": norm, "activation": activation}
    operands |= {"residual": residual, "rows": rows, "impl": impl}
    return measured_expert_linear(x, weights, biases, **operands, leaves="nothing").rows


def measured_expert_linear(
    x: Tensor | Measured,
    weights: Sequence[Weight],
    biases: Sequence[Weight] | None = None,
    *,
    bounds: Sequence[int],
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    impl: str = "auto",
    leaves: Leaves = "all",
    stores: bool = True,
) -> Measured:
    """As ``expert_linear``, with what the implementation ``leaves`` for the next op: "all", which is its row statistics
    ("triton" and "cuda" leave them) and of a product in float8 the next one's operand ("cuda"); of that operand the
    "scales"; or "nothing". ``stores=False``: such a product is the only reader of the rows, and they need not be in memory
    as they are."""
    given = measured(x)
    x, parts, width, *_ = given
    check(x, parts, width, weights, biases, bounds, norm, activation, residual, rows)
    rows = None if rows is None else dispatch.rows_in_memory(rows)
    used = [e for e in range(len(weights)) if bounds[e] < bounds[e + 1]] or [0]
    if len(used) < len(weights):
        weights = [weights[e] for e in used]
        biases = None if biases is None else [biases[e] for e in used]
        if norm is not None:
            norm = Norm([norm.weights[e] for e in used], [norm.biases[e] for e in used], norm.eps)
        bounds = [bounds[used[0]], *(bounds[e + 1] for e in used)]
    norm_weights, norm_biases, eps = norm or Norm((), ())
    tensors = [x, *flat(weights), *flat(biases or ()), *norm_weights, *norm_biases]
    if residual is not None:
        tensors.append(residual)
    packed = any(isinstance(part, PackedWeight) for part in flat(weights))
    to = rounding(flat(weights)[0])
    misfit = cuda_kernels.linear_misfit(x.shape[1], shape(weights[0])[0], to == "float8")
    at = dispatch.situation(
        "expert_linear",
        tensors,
        int8=to == "int8",
        packed=packed,
        float8=to == "float8",
        misfit=misfit,
    )
    choice = dispatch.choose(at, impl)
    if to == "float8":
        if not at.needs_grad:
            own = [_stack(bias) for bias in biases or ()]
            tail = (residual, rows, tuple(bounds), eps, activation or "none")
            operands = (given, weights, own, norm_weights, norm_biases, tail)
            return float8_linear(choice.impl, at, *operands, leaves, stores)
        _warn_of_unpacking(to, "has no gradients of float8 products")
    if not given.stored:
        raise ShapeError(
            "x is in memory in 8 bits alone, which only products with weights in 8 bits by impl='cuda' read"
        )
    if to == "int8" and (choice.impl != "cpu" or at.needs_grad):
        _warn_of_unpacking(
            to, dict(choice.rejected).get("cpu", "has no gradients of int8 products")
        )
    if at.autocast and choice.impl in ("cpu", "cuda", "triton"):
        lowered = (weights, biases, bounds, norm, activation, residual, rows, choice.impl)
        return Measured(_lowered(x, *lowered))
    tail = (residual, rows, tuple(bounds), eps, activation or "none")
    if choice.impl == "cpu":
        return Measured(_cpu(x, weights, biases, norm_weights, norm_biases, tail, at.needs_grad))
    if choice.impl in ("cuda", "triton"):
        vectors = (biases, norm_weights, norm_biases)
        measure = leaves == "all"
        return _on_gpu(choice.impl, given, weights, *vectors, tail, at.needs_grad, measure)
    run = reference_impl if choice.impl == "reference" else composite_impl
    stacked = [_stack(weight) for weight in weights]
    stacked_biases = [_stack(bias) for bias in biases or ()]
    return Measured(run(x, stacked, stacked_biases, norm_weights, norm_biases, *tail))


def _lowered(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Weight] | None,
    bounds: Sequence[int],
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    rows: Tensor | None,
    impl: str,
) -> Tensor:
    """The call under autocast for a kernel, which reads all its operands in one dtype."""
    lower = torch.get_autocast_dtype(x.device.type)

    def cast(weight: Weight) -> Weight:
        if isinstance(weight, tuple):
            return tuple(_in_dtype(part, lower) for part in weight)
        return _in_dtype(weight, lower)

    with torch.autocast(x.device.type, enabled=False):
        if rows is not None:
            count, x = x.shape[0], x[rows]
            residual = None if residual is None else residual[rows]
        if norm is not None:
            ranges = zip(norm.weights, norm.biases, pairwise(bounds), strict=True)
            parts = [
                F.layer_norm(x[start:stop].to(gamma.dtype), gamma.shape, gamma, beta, norm.eps)
                for gamma, beta, (start, stop) in ranges
            ]
            x = torch.cat(parts)
        y = expert_linear(
            x.to(lower),
            [cast(weight) for weight in weights],
            None if biases is None else [cast(bias) for bias in biases],
            bounds=bounds,
            activation=activation,
            impl=impl,
        )
        y = y if residual is None else residual + y
        return y if rows is None else y.new_zeros(count, y.shape[1]).index_copy(0, rows, y)


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype:
        return weight
    if isinstance(weight, PackedWeight):
        return weight if weight.is_rounded else weight.unpack(dtype)
    if needs_grad(weight):
        return weight.to(dtype)
    return derived(f"in {dtype}", (weight,), lambda: weight.detach().to(dtype))


@cache
def _warn_of_unpacking(to: str, reason: str) -> None:
    logger.warning(
        "weights rounded to %s are unpacked for a call, which is slow: the kernel %s", to, reason
    )


def _stack(weight: Weight) -> Tensor:
    if isinstance(weight, PackedWeight):
        return weight.unpack()
    if isinstance(weight, Tensor):
        return weight
    if any(isinstance(part, PackedWeight) for part in weight):
        return torch.cat([_stack(part) for part in weight])
    if needs_grad(*weight):
        return torch.cat(weight)
    return derived("stacked", weight, lambda: torch.cat(weight))


def _cpu(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Weight] | None,
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    tail: tuple[Any, ...],
    with_grad: bool,
) -> Tensor:
    compiling, ordered = torch.compiler.is_compiling(), dispatch.rows_in_memory
    op: Any = cpu_kernels.expert_linear if compiling else _op()
    stacked: list[Tensor] = []
    packed: list[Tensor] = []
    if with_grad or (compiling and not isinstance(flat(weights)[0], PackedWeight)):
        stacked = [ordered(_stack(weight)) for weight in weights]
    else:
        groups = [weight if isinstance(weight, tuple) else (weight,) for weight in weights]
        heights = {part.shape[0] for parts in groups for part in parts}
        apart = len(heights) == 1 and heights.pop() % PANEL == 0
        for parts in groups:
            stacked.append(_stand_in(parts))
            packed += map(packed_form, parts) if apart else [_packed_whole(parts)]
    vectors = [
        [ordered(t) for t in group]
        for group in ([_stack(bias) for bias in biases or ()], norm_weights, norm_biases)
    ]
    residual, rows, bounds, eps, activation = tail
    residual = None if residual is None else ordered(residual)
    if with_grad and activation == "gelu":
        # In two steps, the first of which is kept: the op's own gradient would compute it again.
        y = F.gelu(op(ordered(x), stacked, packed, *vectors, None, rows, bounds, eps, "none"))
        if residual is None:
            return y
        return residual + y if rows is None else y.index_add(0, rows, residual[rows])
    y = op(ordered(x), stacked, packed, *vectors, residual, rows, bounds, eps, activation)
    return cast(Tensor, y)


def _on_gpu(
    impl: str,
    x: Measured,
    weights: Sequence[Weight],
    biases: Sequence[Weight] | None,
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    tail: tuple[Any, ...],
    with_grad: bool,
    measure: bool,
) -> Measured:
    groups = [weight if isinstance(weight, tuple) else (weight,) for weight in weights]
    apart = not with_grad and len({len(parts) for parts in groups}) == 1
    if apart:
        stacked, parts = [_stand_in(own) for own in groups], flat(groups)
    else:
        stacked, parts = [_stack(weight) for weight in weights], []
    residual, rows, bounds, *rest = tail
    residual = None if residual is None else dispatch.rows_in_memory(residual)
    stacked_biases = [_stack(bias) for bias in biases or ()]
    vectors = (stacked_biases, list(norm_weights), list(norm_biases))
    operands = (stacked, parts, *vectors, residual, rows, list(bounds), *rest)
    own = dispatch.rows_in_memory(x.rows)
    given = x.parts if norm_weights else None
    if impl == "cuda":
        y, left = cuda_kernels.expert_linear(own, given, x.width, *operands, measure)
        return Measured(y, left, cuda_kernels.STATISTICS_WIDTH) if measure else Measured(y)
    # Where GELU's operand is kept for the backward pass, the kernel leaves no statistics beside it.
    measure = measure and not (with_grad and rest[-1] == "gelu")
    y, _, left = triton_kernels.expert_linear(own, given, x.width, *operands, with_grad, measure)
    return Measured(y, left, triton_kernels.STATISTICS_WIDTH) if measure else Measured(y)


def packed_form(weight: Tensor) -> Tensor:
    """A weight [O, I] or [O, ...] in the layout that the CPU kernels read, packed on its first use."""
    if isinstance(weight, PackedWeight):
        return weight.packed
    return derived(
        "packed",
        (weight,),
        lambda: torch.ops.beit3_fast.pack_weight(
            dispatch.rows_in_memory(weight.detach().flatten(1))
        ),
    )


def _packed_whole(parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return packed_form(parts[0])
    sources = [part.packed if isinstance(part, PackedWeight) else part for part in parts]
    if sources[0].dtype is torch.int8:
        return derived("packed whole", sources, lambda: _join_int8(parts))
    return derived(
        "packed whole",
        sources,
        lambda: torch.ops.beit3_fast.pack_weight(torch.cat([_stack(part) for part in parts])),
    )


def _join_int8(parts: Sequence[Any]) -> Tensor:
    whole = torch.cat([part.unpack(torch.float32) for part in parts])
    joined: Tensor = torch.ops.beit3_fast.quantize_weight(whole)
    return joined


def _stand_in(parts: tuple[Tensor, ...]) -> Tensor:
    """The shape of the weight stacked from parts, without memory: the kernel reads the packed form."""
    rows = sum(part.shape[0] for part in parts)
    first = parts[0]
    return torch.empty((), dtype=first.dtype, device=first.device).expand(rows, first.shape[1])


def _op() -> Any:
    """The compiled op, with its shape function and gradient registered."""
    _register()
    return torch.ops.beit3_fast.expert_linear.default


@library.once
def _register() -> None:
    library.load()

    @torch.library.register_fake("beit3_fast::pack_weight")
    def _(weight: Tensor) -> Tensor:
        return weight.new_empty(packed_size(weight.shape, weight.element_size()))

    @torch.library.register_fake("beit3_fast::quantize_weight")
    def _(weight: Tensor) -> Tensor:
        return weight.new_empty(packed_size(weight.shape, 1), dtype=torch.int8)

    @torch.library.register_fake("beit3_fast::pack_transposed")
    def _(x: Tensor) -> Tensor:
        return x.new_empty(packed_size(x.T.shape, x.element_size()))

    @torch.library.register_fake("beit3_fast::transposed")
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[1], x.shape[0])

    @torch.library.register_fake("beit3_fast::layer_norm_gradients")
    def _(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)

    @torch.library.register_fake("beit3_fast::unpack_weight")
    def _(packed: Tensor, out_features: int, in_features: int) -> Tensor:
        dtype = torch.float32 if packed.dtype is torch.int8 else packed.dtype
        return packed.new_empty(out_features, in_features, dtype=dtype)

    @torch.library.register_fake("beit3_fast::expert_linear")
    def _(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], weights[0].shape[0])

    torch.library.register_autograd(
        "beit3_fast::expert_linear", _backward, setup_context=_setup_context
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, packed, biases, norm_weights, norm_biases, residual, rows, *rest = inputs
    ctx.sizes = [len(group) for group in (weights, biases, norm_weights, norm_biases)]
    ctx.num_packed, ctx.has_residual, ctx.rest = len(packed), residual is not None, rest
    ctx.save_for_backward(x, rows, *weights, *biases, *norm_weights, *norm_biases)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, rows, *parameters = ctx.saved_tensors
    weights, biases, norm_weights, norm_biases = triton_kernels.regrouped(parameters, ctx.sizes)
    # Second derivatives come from PyTorch's steps alone.
    ours = dispatch.faster_gradients(x.dtype) and not torch.is_grad_enabled()
    steps = cpu_kernels.GRADIENTS if ours else PLAIN
    bounds, eps, activation = ctx.rest
    vectors = (biases, norm_weights, norm_biases)
    dx, *lists = expert_linear_backward(
        grad, x, weights, *vectors, rows, bounds, eps, activation, steps
    )
    dresidual = residual_gradient(grad, rows) if ctx.has_residual else None
    dweights, dbiases, dgammas, dbetas = lists
    packed = [None] * ctx.num_packed
    return dx, dweights, packed, dbiases, dgammas, dbetas, dresidual, None, None, None, None


cpu_kernels.expert_linear.register_autograd(_backward, setup_context=_setup_context)
