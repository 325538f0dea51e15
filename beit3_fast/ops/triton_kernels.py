"""The Triton kernels as the ops call them; triton is imported only where one of them is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from beit3_fast.composite.expert_linear import residual_gradient
from beit3_fast.composite.masked_linear_cross_entropy import masked_linear_cross_entropy_backward
from beit3_fast.errors import KernelUnavailable
from beit3_fast.kernels._tiles import STATISTICS_WIDTH
from beit3_fast.ops.folding import folded_weights

T = TypeVar("T")

_CAPABILITY = (8, 0)
# Keys and values of wider heads do not fit into shared memory beside the tiles that ship.
WIDEST_HEAD = 128


@cache
def why_unavailable(device: str) -> str | None:
    """Why the kernels cannot run on tensors of this device type, or None."""
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "takes CUDA tensors; CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
            )
    elif device != "cuda":
        return f"takes CUDA tensors, these are on {device}"
    elif not torch.cuda.is_available():
        return "takes CUDA tensors, and this torch sees no GPU"
    elif torch.version.hip is not None:
        return "takes NVIDIA GPUs, this torch was built for AMD's"
    elif torch.cuda.get_device_capability() < _CAPABILITY:
        wanted, found = (
            ".".join(map(str, own)) for own in (_CAPABILITY, torch.cuda.get_device_capability())
        )
        return f"needs a GPU of compute capability {wanted} or newer, this one has {found}"
    try:
        for op in ("expert_linear", "shared_attention", "masked_linear_cross_entropy"):
            _import(op)
    except Exception as error:
        return f"needs triton 3.6 or newer, whose import failed: {type(error).__name__}: {error}"
    return None


def obstacle(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take such a call, or None."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    # Not to be traced; a compiled call that cannot run says so when it runs.
    reason = None if torch.compiler.is_compiling() else why_unavailable(device)
    if reason is None and device == "cpu" and dtype is torch.bfloat16:
        return (
            "takes float32 and float16 on a CPU: Triton's interpreter multiplies bfloat16 wrongly"
        )
    return reason


def _on_its_device(op: Callable[..., T]) -> Callable[..., T]:
    """Triton launches on the current device, whatever the device of its operands; here it is that of the first."""

    @wraps(op)
    def run(*operands: Any) -> T:
        if operands[0].device.type != "cuda":
            return op(*operands)
        with torch.cuda.device(operands[0].device):
            return op(*operands)

    return run


@torch.library.custom_op("beit3_fast::triton_expert_linear", mutates_args=())
@_on_its_device
def expert_linear(
    x: Tensor,
    x_parts: Tensor | None,
    x_width: int,
    weights: list[Tensor],
    parts: list[Tensor],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    residual: Tensor | None,
    rows: Tensor | None,
    bounds: list[int],
    eps: float,
    activation: str,
    keep: bool,
    measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``beit3_fast.reference.expert_linear``; where there are ``parts``, equally many for each weight and stacked
    along O, the weights give only their shape. With ``keep`` and GELU the second result is what GELU was taken of,
    [M, O], for the backward pass; else it is empty. With ``measure`` the third has the row statistics of the first,
    fp32 [M, T, 2]; else it is empty. ``x_parts``: those of x, in parts of ``x_width`` columns."""
    kernels = _kernels("expert_linear", x.device.type)
    folded = folded_weights(weights, parts, biases, norm_weights, norm_biases)
    # Rows that ``rows`` does not name are zero.
    allocate = x.new_empty if rows is None else x.new_zeros
    z = allocate(_kept_shape(x, weights, activation, keep))
    done = kernels.expert_linear(
        x,
        folded,
        residual,
        rows,
        bounds,
        eps,
        activation,
        statistics=None if x_parts is None else _statistics(x_parts, x_width),
        with_statistics=measure,
        z=z if z.numel() else None,
    )
    y, left = done
    if left is None:
        return y, z, x.new_empty(_left_shape(y, measure), dtype=torch.float32)
    return y, z, left.parts


@expert_linear.register_fake
def _(
    x: Tensor, x_parts: Tensor | None, x_width: int, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    activation, keep, measure = rest[-3:]
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    z = x.new_empty(_kept_shape(x, weights, activation, keep))
    return y, z, x.new_empty(_left_shape(y, measure), dtype=torch.float32)


def _kept_shape(x: Tensor, weights: list[Tensor], activation: str, keep: bool) -> tuple[int, int]:
    out = weights[0].shape[0]
    return (x.shape[0], out) if keep and activation == "gelu" else (0, out)


def _left_shape(y: Tensor, measure: bool) -> tuple[int, int, int]:
    rows, features = y.shape
    return (rows if measure else 0, -(-features // STATISTICS_WIDTH), 2)


def _statistics(parts: Tensor, width: int) -> Any:
    return _import("_row_statistics").RowStatistics(parts.contiguous(), width)


@torch.library.custom_op("beit3_fast::triton_expert_linear_backward", mutates_args=())
@_on_its_device
def _expert_linear_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    z: Tensor,
    rows: Tensor | None,
    bounds: list[int],
    eps: float,
) -> list[Tensor]:
    """Gradients of x, then of the weights, biases, norm weights and norm biases of every expert."""
    kernels = _kernels("_expert_linear_backward", x.device.type)
    vectors = (biases, norm_weights, norm_biases)
    gradients = kernels.expert_linear_backward(
        grad if grad.stride(-1) == 1 else grad.contiguous(),
        x,
        folded_weights(weights, [], *vectors),
        weights,
        *vectors,
        z if z.numel() else None,
        rows,
        bounds,
        eps,
    )
    return [gradients[0], *(own for group in gradients[1:] for own in group)]


@_expert_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, *groups: Any) -> list[Tensor]:
    operands = [x, *(own for group in groups[:4] for own in group)]
    return [own.new_empty(own.shape) for own in operands]


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, weights, parts, biases, norm_weights, norm_biases, residual, rows, *rest = inputs
    ctx.sizes = [len(group) for group in (weights, biases, norm_weights, norm_biases)]
    ctx.num_parts, ctx.has_residual = len(parts), residual is not None
    ctx.bounds, ctx.eps, activation, keep, _ = rest
    ctx.kept = keep or activation != "gelu"
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, rows, output[1], *weights, *biases, *norm_weights, *norm_biases)


def _linear_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    if not ctx.kept:
        raise RuntimeError(
            "triton_expert_linear: a gradient needs what keep=True keeps; beit3_fast.ops asks for it"
        )
    x, rows, z, *flat = ctx.saved_tensors
    groups = regrouped(flat, ctx.sizes)
    dx, *gradients = _expert_linear_backward(grad, x, *groups, z, rows, ctx.bounds, ctx.eps)
    dweights, dbiases, dgammas, dbetas = regrouped(gradients, ctx.sizes)
    dresidual = residual_gradient(grad, rows) if ctx.has_residual else None
    parts = [None] * ctx.num_parts
    vectors = (dbiases, dgammas, dbetas)
    return dx, None, None, dweights, parts, *vectors, dresidual, *[None] * 6


def regrouped(flat: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    """A flat list cut into lists of these sizes."""
    feed = iter(flat)
    return [list(islice(feed, size)) for size in sizes]


expert_linear.register_autograd(_linear_backward, setup_context=_setup_linear)


@torch.library.custom_op("beit3_fast::triton_shared_attention", mutates_args=())
@_on_its_device
def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_vision: Tensor,
    cu_text: Tensor,
    cu_vision_q: Tensor | None,
    cu_text_q: Tensor | None,
    positions_q: Tensor | None,
    valid: Tensor | None,
    longest: int,
    longest_q: int,
    num_heads: int,
    scale: float,
    mask: str,
    measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [Rq, C], log-sum-exp fp32 [Rq, H], with ``measure`` the row statistics of o in parts of one head, fp32
    [Rq, H, 2] (else empty). ``valid`` bool [Rt]: the text keys that are no padding (None: all); ``longest``: most keys and most
    queries of a sample."""
    kernels = _kernels("shared_attention", q.device.type)
    keys, queries = _segments(
        cu_vision, cu_text, cu_vision_q, cu_text_q, positions_q, valid, longest, longest_q
    )
    options = {"with_lse": True, "with_statistics": measure}
    done = kernels.shared_attention(q, k, v, keys, queries, num_heads, scale, mask, **options)
    if done.statistics is None:
        return done.o, done.lse, done.lse.new_empty(0, num_heads, 2)
    return done.o, done.lse, done.statistics.parts


@shared_attention.register_fake
def _(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_heads, *_, measure = arguments[-4:]
    rows = q.shape[0]
    lse, parts = (
        q.new_empty(shape, dtype=torch.float32)
        for shape in ((rows, num_heads), (rows if measure else 0, num_heads, 2))
    )
    return q.new_empty(q.shape), lse, parts


@torch.library.custom_op("beit3_fast::triton_shared_attention_backward", mutates_args=())
@_on_its_device
def _shared_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_vision: Tensor,
    cu_text: Tensor,
    cu_vision_q: Tensor | None,
    cu_text_q: Tensor | None,
    positions_q: Tensor | None,
    valid: Tensor | None,
    longest: int,
    longest_q: int,
    num_heads: int,
    scale: float,
    mask: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels("_shared_attention_backward", q.device.type)
    keys, queries = _segments(
        cu_vision, cu_text, cu_vision_q, cu_text_q, positions_q, valid, longest, longest_q
    )
    gradients = kernels.shared_attention_backward(
        grad.contiguous(), q, k, v, o, lse, keys, queries, num_heads, scale, mask
    )
    return cast(tuple[Tensor, Tensor, Tensor], gradients)


@_shared_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.longest, ctx.longest_q, ctx.num_heads, ctx.scale, ctx.mask, _ = inputs
    o, lse, parts = output
    ctx.mark_non_differentiable(lse, parts)
    ctx.save_for_backward(*tensors[:3], o, lse, *tensors[3:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    numbers = (ctx.longest, ctx.longest_q, ctx.num_heads, ctx.scale, ctx.mask)
    return (*_shared_attention_backward(grad, *ctx.saved_tensors, *numbers), *[None] * 12)


shared_attention.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("beit3_fast::triton_masked_linear_cross_entropy", mutates_args=())
@_on_its_device
def masked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Losses [M] and peaks [M, 2], as ``beit3_fast.composite.masked_linear_cross_entropy`` gives them."""
    kernels = _kernels("masked_linear_cross_entropy", x.device.type)
    done = kernels.losses(x, weight, bias, rows, targets, label_smoothing)
    return cast(tuple[Tensor, Tensor], done)


@torch.library.custom_op("beit3_fast::triton_masked_linear_cross_entropy_backward", mutates_args=())
@_on_its_device
def cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    peaks: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as ``beit3_fast.composite.masked_linear_cross_entropy`` gives them."""
    kernels = _kernels("masked_linear_cross_entropy", x.device.type)
    operands = (grad.contiguous(), x, weight, bias, rows, targets, peaks, label_smoothing)
    slopes = partial(kernels.slopes, *operands)
    return masked_linear_cross_entropy_backward(*operands, slopes)


def _segments(
    cu_vision: Tensor,
    cu_text: Tensor,
    cu_vision_q: Tensor | None,
    cu_text_q: Tensor | None,
    positions_q: Tensor | None,
    valid: Tensor | None,
    longest: int,
    longest_q: int,
) -> tuple[Any, Any]:
    make = _import("shared_attention").Segments
    keys = make(cu_vision, cu_text, longest)
    if valid is not None:
        keys = keys._replace(valid=valid.contiguous().view(torch.uint8))
    if positions_q is None:
        return keys, keys
    return keys, make(cu_vision_q, cu_text_q, longest_q, positions_q)


def _kernels(op: str, device: str) -> Any:
    """The module in ``kernels/``. Raises KernelUnavailable where it cannot run on this device type."""
    reason = why_unavailable(device)
    if reason is not None:
        raise KernelUnavailable(f"{op}: impl='triton' was asked for, but it {reason}.")
    return _import(op)


def _import(op: str) -> Any:
    return import_module(f"beit3_fast.kernels.{op}")


reset: Callable[[], None] = why_unavailable.cache_clear
