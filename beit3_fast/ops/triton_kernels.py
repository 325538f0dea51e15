"""The Triton kernels as the ops call them; triton is imported only where one of them is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from beit3_fast.derived import derived, needs_grad
from beit3_fast.layout import TokenLayout

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
    elif torch.version.hip is not None:
        return "takes NVIDIA GPUs, this torch was built for AMD's"
    elif torch.cuda.get_device_capability() < _CAPABILITY:
        wanted, found = (
            ".".join(map(str, own)) for own in (_CAPABILITY, torch.cuda.get_device_capability())
        )
        return f"needs a GPU of compute capability {wanted} or newer, this one has {found}"
    try:
        for op in ("expert_linear", "shared_attention"):
            _kernels(op)
    except Exception as error:
        return f"needs triton 3.6 or newer, whose import failed: {type(error).__name__}: {error}"
    return None


def obstacle(device: str, dtype: torch.dtype, with_gradient: bool) -> str | None:
    """Why the kernels cannot take such a call, or None."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    reason = why_unavailable(device)
    if reason is None and device == "cpu" and dtype is torch.bfloat16:
        return (
            "takes float32 and float16 on a CPU: Triton's interpreter multiplies bfloat16 wrongly"
        )
    if reason is None and with_gradient:
        return "has no backward pass yet"
    return reason


def expert_linear(
    x: Tensor,
    weights: Sequence[tuple[Tensor, ...]],
    biases: Sequence[tuple[Tensor, ...]],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    residual: Tensor | None,
    rows: Tensor | None,
    bounds: Sequence[int],
    eps: float,
    activation: str,
) -> Tensor:
    """As ``beit3_fast.reference.expert_linear``, but every weight and bias is a tuple of parts stacked along O."""
    kernels = _kernels("expert_linear")
    sources = [part for parts in (*weights, *biases) for part in parts]
    sources += [*norm_weights, *norm_biases]

    def fold() -> Any:
        whole = [
            [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in group]
            for group in (weights, biases)
        ]
        return kernels.fold(*whole, norm_weights, norm_biases)

    # The same parts may be one expert's or several experts'.
    shape = [[len(parts) for parts in weights], len(biases), len(norm_weights)]
    folded = fold() if needs_grad(*sources) else derived(f"folded {shape}", sources, fold)
    y, _ = kernels.expert_linear(x, folded, residual, rows, bounds, eps, activation)
    return y


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    queries: TokenLayout,
    num_heads: int,
    scale: float,
    mask: str,
) -> Tensor:
    """As ``beit3_fast.reference.shared_attention``, for a mask structure."""
    kernels = _kernels("shared_attention")
    own, selected = _segments(layout), _segments(queries)
    return kernels.shared_attention(q, k, v, own, selected, num_heads, scale, mask).o


def _segments(layout: TokenLayout) -> Any:
    return _kernels("shared_attention").Segments(
        layout.cu_vision, layout.cu_text, layout.longest, layout.positions
    )


def _kernels(op: str) -> Any:
    return import_module(f"beit3_fast.kernels.{op}")


reset: Callable[[], None] = why_unavailable.cache_clear
