"""masked_linear_cross_entropy: the loss of a linear head over the masked rows, without their logits in memory.

    z = x[rows[m]] W^T + b      L = log sum_v exp(z_v)      loss[m] = (1 - s) (L - z_target) + s mean_v (L - z_v)

For the heads of masked data modelling: 64,010 words, 8,192 visual tokens. Rows that are not named cost nothing,
and of the logits [M, V] no more than a slice exists at any time, in the forward and in the backward pass. Saved for
the backward pass: the operands and two fp32 numbers a row, the largest logit and the sum of the exponentials below
it; the logits are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_fast.composite.masked_linear_cross_entropy import (
    masked_linear_cross_entropy as composite_impl,
)
from beit3_fast.composite.masked_linear_cross_entropy import masked_linear_cross_entropy_backward
from beit3_fast.errors import ShapeError
from beit3_fast.ops import dispatch, triton_kernels
from beit3_fast.reference.masked_linear_cross_entropy import (
    masked_linear_cross_entropy as reference_impl,
)

REDUCTIONS = ("mean", "sum", "none")


def masked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the classes ``targets`` under the linear head, at the rows of x that ``rows`` names.

    x [R, D], weight [V, D], bias [V] or None: fp32, bf16 or fp16 (fp64 too in "reference" and "composite"), one
    dtype (autocast aside: there they are cast to its dtype). ``rows`` int64 [M] names rows of x, none or some, one
    of them also twice; ``targets`` int64 [M] their classes, 0 to V - 1. Returns a scalar for the reductions "mean"
    (over the named rows; zero where there are none) and "sum", losses [M] for "none": in fp32, for fp64 in fp64.

    Differentiable (once) in x, weight and bias; the gradient of a row that is not named is zero. In fp16 the loss must be
    scaled, as in PyTorch's own calls: the logits' gradients (about 1/V each) and those of the weights are rounded to
    fp16, which holds nothing below 3e-8 and loses digits below 6e-5. With 64,010 classes and no scale the gradient of
    most rows of the weight is rounding, and many are zero; bf16 and fp32 have the range. Raises ShapeError
    for operands that do not fit (rows and targets out of range: on the CPU; on a GPU their values are not read),
    ConfigError and KernelUnavailable for ``impl``.
    """
    _check(x, weight, bias, rows, targets, label_smoothing, reduction)
    operands = [x, weight] if bias is None else [x, weight, bias]
    at = dispatch.situation("masked_linear_cross_entropy", operands)
    choice = dispatch.choose(at, impl)
    if at.autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rest = (rows, targets, float(label_smoothing))
    # The composite op is opaque: forward-mode derivatives and torch.func do not see into it.
    if choice.impl == "reference" or (choice.impl == "composite" and at.transformed):
        losses = reference_impl(x, weight, bias, *rest)
    elif choice.impl == "triton":
        x, weight = dispatch.rows_in_memory(x), dispatch.rows_in_memory(weight)
        bias = None if bias is None else bias.contiguous()
        rest = (rows.contiguous(), targets.contiguous(), float(label_smoothing))
        losses, _ = triton_kernels.masked_linear_cross_entropy(x, weight, bias, *rest)
    else:
        losses, _ = _composite(x, weight, bias, *rest)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(1, len(rows))


@torch.library.custom_op("beit3_fast::masked_linear_cross_entropy", mutates_args=())
def _composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Losses [M] and peaks [M, 2]. One opaque op: a compiled graph serves any number of rows and of slices."""
    return composite_impl(x, weight, bias, rows, targets, label_smoothing)


@torch.library.custom_op("beit3_fast::masked_linear_cross_entropy_backward", mutates_args=())
def _composite_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    peaks: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return masked_linear_cross_entropy_backward(
        grad, x, weight, bias, rows, targets, peaks, label_smoothing
    )


def _register(forward: Any, backward: Any) -> None:
    """Shapes and gradient of an implementation: a pair of ops with the signatures of these two."""

    @forward.register_fake
    def _(x: Tensor, weight: Tensor, bias: Any, rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.new_empty(rows.shape, dtype=dtype), x.new_empty((rows.shape[0], 2), dtype=dtype)

    @backward.register_fake
    def _(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        dbias = weight.new_empty(0 if bias is None else weight.shape[0])
        return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *operands, ctx.label_smoothing = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*operands, output[1])

    def gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        dx, dweight, dbias = backward(grad, *ctx.saved_tensors, ctx.label_smoothing)
        return dx, dweight, dbias if dbias.numel() else None, None, None, None

    forward.register_autograd(gradient, setup_context=setup)


_register(_composite, _composite_backward)
_register(triton_kernels.masked_linear_cross_entropy, triton_kernels.cross_entropy_backward)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    label_smoothing: float,
    reduction: str,
) -> None:
    named = {"x": x, "weight": weight, "rows": rows, "targets": targets}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != x.device:
            raise ShapeError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise ShapeError(
            f"x must be a floating-point tensor [R, D], got {x.dtype} of shape {list(x.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not len(weight):
        raise ShapeError(
            f"weight must have shape [V, D] with D = {x.shape[1]} and at least one class, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ShapeError(f"bias must have shape [V] = [{len(weight)}], got {list(bias.shape)}")
    for name in ("weight", "bias"):
        if name in named and not dispatch.multiplies_with(x, named[name]):
            raise ShapeError(
                f"{name} must have x's dtype {x.dtype}, got {named[name].dtype}; convert it or run "
                "under torch.autocast, which leaves float64 alone"
            )
    for name, tensor in (("rows", rows), ("targets", targets)):
        if tensor.dim() != 1 or tensor.dtype != torch.int64:
            raise ShapeError(
                f"{name} must be int64 [M], got {tensor.dtype} of shape {list(tensor.shape)}"
            )
    if rows.shape != targets.shape:
        raise ShapeError(
            f"targets must name one class for each of the {len(rows)} rows, got {len(targets)}"
        )
    if not isinstance(label_smoothing, (float, int)) or not 0.0 <= label_smoothing <= 1.0:
        raise ShapeError(f"label_smoothing must be a number from 0 to 1, got {label_smoothing!r}")
    if reduction not in REDUCTIONS:
        raise ShapeError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and len(rows):
        _check_range("rows", rows, len(x), "rows of x")
        _check_range("targets", targets, len(weight), "classes")


def _check_range(name: str, index: Tensor, count: int, of: str) -> None:
    low, high = (int(t) for t in index.aminmax())
    if low < 0 or high >= count:
        raise ShapeError(f"{name} must name {of}, 0 to {count - 1}, got {low} to {high}")
