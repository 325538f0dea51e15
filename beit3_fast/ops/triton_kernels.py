"""The Triton kernels as the ops call them; triton is imported only where one of them is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from beit3_fast.derived import derived
from beit3_fast.errors import KernelUnavailable

_CAPABILITY = (8, 0)


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
        for op in ("expert_linear", "shared_attention"):
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


@torch.library.custom_op("beit3_fast::triton_expert_linear", mutates_args=())
def expert_linear(
    x: Tensor,
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
) -> Tensor:
    """As ``beit3_fast.reference.expert_linear``; where there are ``parts``, equally many for each weight and stacked
    along O, the weights give only their shape."""
    kernels = _kernels("expert_linear", x.device.type)
    sources = [*(parts or weights), *biases, *norm_weights, *norm_biases]
    each = len(parts) // len(weights)

    def fold() -> Any:
        whole = weights
        if parts:
            whole = [torch.cat(parts[i : i + each]) for i in range(0, len(parts), each)]
        return kernels.fold(whole, biases, norm_weights, norm_biases)

    # The same sources may be one expert's or several experts'.
    shape = (each, len(weights), len(biases), len(norm_weights))
    folded = derived(f"folded {shape}", sources, fold)
    y, _ = kernels.expert_linear(x, folded, residual, rows, bounds, eps, activation)
    return cast(Tensor, y)


@expert_linear.register_fake
def _(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.custom_op("beit3_fast::triton_shared_attention", mutates_args=())
def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_vision: Tensor,
    cu_text: Tensor,
    cu_vision_q: Tensor | None,
    cu_text_q: Tensor | None,
    positions_q: Tensor | None,
    longest: int,
    longest_q: int,
    num_heads: int,
    scale: float,
    mask: str,
) -> tuple[Tensor, Tensor]:
    """o [Rq, C] and log-sum-exp fp32 [Rq, H]; ``longest``: most keys and most queries of a sample."""
    kernels = _kernels("shared_attention", q.device.type)
    keys, queries = _segments(
        cu_vision, cu_text, cu_vision_q, cu_text_q, positions_q, longest, longest_q
    )
    done = kernels.shared_attention(q, k, v, keys, queries, num_heads, scale, mask, with_lse=True)
    return done.o, done.lse


@shared_attention.register_fake
def _(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    num_heads = arguments[-3]
    return q.new_empty(q.shape), q.new_empty((q.shape[0], num_heads), dtype=torch.float32)


@torch.library.custom_op("beit3_fast::triton_shared_attention_backward", mutates_args=())
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
    longest: int,
    longest_q: int,
    num_heads: int,
    scale: float,
    mask: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels("_shared_attention_backward", q.device.type)
    keys, queries = _segments(
        cu_vision, cu_text, cu_vision_q, cu_text_q, positions_q, longest, longest_q
    )
    gradients = kernels.shared_attention_backward(
        grad.contiguous(), q, k, v, o, lse, keys, queries, num_heads, scale, mask
    )
    return cast(tuple[Tensor, Tensor, Tensor], gradients)


@_shared_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest, ctx.longest_q, ctx.num_heads, ctx.scale, ctx.mask = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    numbers = (ctx.longest, ctx.longest_q, ctx.num_heads, ctx.scale, ctx.mask)
    return (*_shared_attention_backward(grad, *ctx.saved_tensors, *numbers), *[None] * 10)


shared_attention.register_autograd(_backward, setup_context=_setup_context)


def _segments(
    cu_vision: Tensor,
    cu_text: Tensor,
    cu_vision_q: Tensor | None,
    cu_text_q: Tensor | None,
    positions_q: Tensor | None,
    longest: int,
    longest_q: int,
) -> tuple[Any, Any]:
    make = _import("shared_attention").Segments
    keys = make(cu_vision, cu_text, longest)
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
