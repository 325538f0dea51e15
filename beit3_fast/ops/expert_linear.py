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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.composite.expert_linear import expert_linear as composite_impl
from beit3_fast.composite.expert_linear import expert_linear_backward
from beit3_fast.derived import derived, needs_grad
from beit3_fast.errors import ShapeError
from beit3_fast.ops import cpu_kernels, dispatch, library, triton_kernels
from beit3_fast.ops.packed_weight import PackedWeight
from beit3_fast.reference.expert_linear import expert_linear as reference_impl

logger = logging.getLogger("beit3_fast")

Weight = Tensor | tuple[Tensor, ...]


class Norm(NamedTuple):
    """LayerNorm in front of the product: one weight and bias [I] per expert, and epsilon."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    eps: float = 1e-5


def expert_linear(
    x: Tensor,
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
    does not name are zero; it must not name a row twice. Returns [M, O] in x's dtype (autocast aside).

    Differentiable in every tensor argument but ``rows``. Raises ShapeError for operands that do not fit,
    ConfigError and KernelUnavailable for ``impl``.
    """
    _check(x, weights, biases, bounds, norm, activation, residual, rows)
    used = [e for e in range(len(weights)) if bounds[e] < bounds[e + 1]] or [0]
    if len(used) < len(weights):
        weights = [weights[e] for e in used]
        biases = None if biases is None else [biases[e] for e in used]
        if norm is not None:
            norm = Norm([norm.weights[e] for e in used], [norm.biases[e] for e in used], norm.eps)
        bounds = [bounds[used[0]], *(bounds[e + 1] for e in used)]
    norm_weights, norm_biases, eps = norm or Norm((), ())
    tensors = [x, *_flat(weights), *_flat(biases or ()), *norm_weights, *norm_biases]
    if residual is not None:
        tensors.append(residual)
    kept = [part for part in _flat(weights) if isinstance(part, PackedWeight)]
    int8 = any(part.is_int8 for part in kept)
    at = dispatch.situation("expert_linear", tensors, int8=int8, packed=bool(kept))
    choice = dispatch.choose(at, impl)
    if int8 and (choice.impl != "cpu" or at.needs_grad):
        _warn_of_int8(dict(choice.rejected).get("cpu", "has no gradients of int8 products"))
    tail = (residual, rows, tuple(bounds), eps, activation or "none")
    if choice.impl == "cpu":
        return _cpu(x, weights, biases, norm_weights, norm_biases, tail, at.needs_grad)
    if choice.impl == "triton":
        return _triton(x, weights, biases, norm_weights, norm_biases, tail, at.needs_grad)
    run = reference_impl if choice.impl == "reference" else composite_impl
    stacked = [_stack(weight) for weight in weights]
    stacked_biases = [_stack(bias) for bias in biases or ()]
    return run(x, stacked, stacked_biases, norm_weights, norm_biases, *tail)


@cache
def _warn_of_int8(reason: str) -> None:
    logger.warning(
        "weights rounded to int8 are unpacked for a call, which is slow: the kernel %s", reason
    )


def _flat(weights: Sequence[Weight]) -> list[Tensor]:
    return [part for w in weights for part in (w if isinstance(w, tuple) else (w,))]


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


def _shape(weight: Weight) -> tuple[int, ...]:
    if isinstance(weight, Tensor):
        return tuple(weight.shape)
    return (sum(part.shape[0] for part in weight), *weight[0].shape[1:])


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
    if with_grad or (compiling and not isinstance(_flat(weights)[0], PackedWeight)):
        stacked = [ordered(_stack(weight)) for weight in weights]
    else:
        groups = [weight if isinstance(weight, tuple) else (weight,) for weight in weights]
        heights = {part.shape[0] for parts in groups for part in parts}
        apart = len(heights) == 1 and heights.pop() % _PANEL == 0
        for parts in groups:
            stacked.append(_stand_in(parts))
            packed += map(_packed, parts) if apart else [_packed_whole(parts)]
    vectors = [
        [ordered(t) for t in group]
        for group in ([_stack(bias) for bias in biases or ()], norm_weights, norm_biases)
    ]
    residual, rows, *rest = tail
    residual, rows = (None if t is None else ordered(t) for t in (residual, rows))
    return op(ordered(x), stacked, packed, *vectors, residual, rows, *rest)


def _triton(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Weight] | None,
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    tail: tuple[Any, ...],
    with_grad: bool,
) -> Tensor:
    groups = [weight if isinstance(weight, tuple) else (weight,) for weight in weights]
    apart = not with_grad and len({len(parts) for parts in groups}) == 1
    if apart:
        stacked, parts = [_stand_in(own) for own in groups], _flat(groups)
    else:
        stacked, parts = [_stack(weight) for weight in weights], []
    residual, rows, bounds, *rest = tail
    residual = None if residual is None else dispatch.rows_in_memory(residual)
    stacked_biases = [_stack(bias) for bias in biases or ()]
    vectors = (stacked_biases, list(norm_weights), list(norm_biases))
    x = dispatch.rows_in_memory(x)
    return triton_kernels.expert_linear(
        x, stacked, parts, *vectors, residual, rows, list(bounds), *rest
    )


# Columns of a panel of packed weights (csrc/cpu/kernels.h): equal parts of whole panels can lie apart.
_PANEL = 32


def _packed(weight: Tensor) -> Tensor:
    if isinstance(weight, PackedWeight):
        return weight.packed
    return derived(
        "packed",
        (weight,),
        lambda: torch.ops.beit3_fast.pack_weight(dispatch.rows_in_memory(weight.detach())),
    )


def _packed_whole(parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return _packed(parts[0])
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
        size = torch.library.get_ctx().new_dynamic_size()
        return weight.new_empty(size)

    @torch.library.register_fake("beit3_fast::quantize_weight")
    def _(weight: Tensor) -> Tensor:
        size = torch.library.get_ctx().new_dynamic_size()
        return weight.new_empty(size, dtype=torch.int8)

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
    x, rows, *flat = ctx.saved_tensors
    groups = []
    for size in ctx.sizes:
        groups.append(flat[:size])
        flat = flat[size:]
    weights, biases, norm_weights, norm_biases = groups
    dx, *lists = expert_linear_backward(
        grad, x, weights, biases, norm_weights, norm_biases, rows, *ctx.rest
    )
    dresidual = None
    if ctx.has_residual:
        dresidual = grad
        if rows is not None:
            dresidual = torch.zeros_like(grad).index_copy(0, rows, grad[rows])
    dweights, dbiases, dgammas, dbetas = lists
    packed = [None] * ctx.num_packed
    return dx, dweights, packed, dbiases, dgammas, dbetas, dresidual, None, None, None, None


for _traceable in (triton_kernels.expert_linear, cpu_kernels.expert_linear):
    _traceable.register_autograd(_backward, setup_context=_setup_context)


def _check(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Weight] | None,
    bounds: Sequence[int],
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    rows: Tensor | None,
) -> None:
    for name, tensor in (("x", x), ("residual", residual), ("rows", rows)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "x"):
            raise ShapeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise ShapeError(
            f"x must be a floating-point tensor [M, I], got {x.dtype} of shape {tuple(x.shape)}"
        )
    _check_tensors("weights", weights)
    if biases is not None:
        _check_tensors("biases", biases)
    if not dispatch.autocast_enabled(x.device.type):
        others = [] if residual is None else [residual]
        for tensor in (*_flat(weights), *_flat(biases or ()), *others):
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise ShapeError(
                    f"weights, biases and residual must have x's dtype and device ({x.dtype}, {x.device}), "
                    f"got {tensor.dtype}, {tensor.device}; convert them or run under torch.autocast"
                )
    rounded = {isinstance(part, PackedWeight) and part.is_int8 for part in _flat(weights)}
    if len(rounded) > 1:
        raise ShapeError("weights must be rounded to int8 all together or not at all")
    features = x.shape[1]
    out, inner = (*_shape(weights[0]), 0)[:2]
    for expert, weight in enumerate(weights):
        if _shape(weight) != (out, inner) or inner != features:
            raise ShapeError(
                f"weights[{expert}] must have shape [O, I] = [{out}, {features}] like x and the other "
                f"experts, got {list(_shape(weight))}"
            )
    if biases is not None:
        _check_vectors("biases", [_shape(bias) for bias in biases], len(weights), out)
    if norm is not None:
        if not isinstance(norm, Norm):
            raise ShapeError(f"norm must be a Norm of beit3_fast.ops, got {type(norm).__name__}")
        _check_tensors("norm.weights", norm.weights)
        _check_tensors("norm.biases", norm.biases)
        if not isinstance(norm.eps, (float, int)) or not 0 <= norm.eps < float("inf"):
            raise ShapeError(
                f"norm.eps must be a number, finite and not negative, got {norm.eps!r}"
            )
        _check_vectors("norm.weights", [t.shape for t in norm.weights], len(weights), features)
        _check_vectors("norm.biases", [t.shape for t in norm.biases], len(weights), features)
    if activation not in (None, "gelu"):
        raise ShapeError(f"activation must be None or 'gelu', got {activation!r}")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ShapeError(f"rows must be int64 [R], got {rows.dtype} of shape {tuple(rows.shape)}")
    count = x.shape[0] if rows is None else rows.shape[0]
    if (
        not isinstance(bounds, (list, tuple))
        or len(bounds) != len(weights) + 1
        or not all(isinstance(bound, (int, torch.SymInt)) for bound in bounds)
        or bounds[0] != 0
        or bounds[-1] != count
        or any(bounds[e] > bounds[e + 1] for e in range(len(weights)))
    ):
        raise ShapeError(
            f"bounds must be a list of {len(weights) + 1} ascending row numbers from 0 to {count}, "
            f"got {bounds!r}"
        )
    if rows is not None and rows.device.type == "cpu" and not torch.compiler.is_compiling():
        derived(f"distinct rows of {x.shape[0]}", (rows,), lambda: _check_rows(rows, x.shape[0]))
    if residual is not None and tuple(residual.shape) != (x.shape[0], out):
        raise ShapeError(
            f"residual must have shape [M, O] = [{x.shape[0]}, {out}], got {list(residual.shape)}"
        )


def _check_rows(rows: Tensor, count: int) -> bool:
    named = rows.unique()
    if named.numel() and not 0 <= int(named[0]) <= int(named[-1]) < count:
        raise ShapeError(
            f"rows must name rows of x, 0 to {count - 1}, got {int(named[0])} to {int(named[-1])}"
        )
    if named.numel() != rows.numel():
        raise ShapeError("rows must not name a row twice")
    return True


def _check_tensors(name: str, tensors: Any) -> None:
    """One tensor, or one tuple of tensors, for each expert."""
    if tensors is None or isinstance(tensors, (str, Tensor)) or not hasattr(tensors, "__len__"):
        raise ShapeError(
            f"{name} must be a list, one entry per expert, got {type(tensors).__name__}"
        )
    if name == "weights" and not len(tensors):
        raise ShapeError("weights must hold at least one expert, got none")
    for expert, entry in enumerate(tensors):
        parts = entry if isinstance(entry, tuple) else (entry,)
        if not parts or not all(isinstance(part, Tensor) and part.dim() for part in parts):
            raise ShapeError(
                f"{name}[{expert}] must be a tensor or a tuple of tensors, got {type(entry).__name__}"
            )


def _check_vectors(name: str, shapes: Sequence[Sequence[int]], experts: int, size: int) -> None:
    if [tuple(shape) for shape in shapes] != [(size,)] * experts:
        raise ShapeError(
            f"{name} must hold {experts} tensors of shape [{size}], "
            f"got {[list(shape) for shape in shapes]}"
        )
