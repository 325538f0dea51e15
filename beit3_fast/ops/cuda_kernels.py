"""The CUDA kernels of the compiled library as the ops call them: inference, in bf16 and fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from beit3_fast.errors import KernelUnavailable
from beit3_fast.float8 import BLOCK, E4M3
from beit3_fast.kernels._folded_weights import FoldedWeights
from beit3_fast.ops import library
from beit3_fast.ops.folding import folded_weights

OPS = ("expert_linear", "float8_linear", "shared_attention", "cached_attention", "head_top_k")
HEAD_WIDTHS = (64, 88)
MAX_EXPERTS = 3  # of a launch, as in csrc/cuda/expert_linear.h
STATISTICS_WIDTH = 128  # columns of a part of a row's statistics, likewise
# TMA moves and aligns by 16 bytes.
_ALIGNMENT = 16
_STEP = 8


@cache
def why_unavailable(device: str) -> str | None:
    """Why the kernels cannot run on tensors of this device type, or None."""
    if device != "cuda":
        return f"takes CUDA tensors, these are on {device}"
    built = library.cuda_architectures()
    if not built:
        return f"needs CUDA kernels in the compiled library, which {library.why_without_cuda()}"
    if not torch.cuda.is_available():
        return "takes CUDA tensors, and this torch sees no GPU"
    if torch.version.hip is not None:
        return "takes NVIDIA GPUs, this torch was built for AMD's"
    major, minor = torch.cuda.get_device_capability()
    if any(runs_on(arch, major, minor) for arch in built):
        return None
    return (
        f"was compiled for {', '.join(f'sm_{arch}' for arch in built)}, and this GPU has compute capability "
        f"{major}.{minor} (build again with BEIT3_FAST_CUDA_ARCHS={major}{minor})"
    )


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for an architecture such as "80", "90a" or "100f" runs on a GPU of this compute capability."""
    own_major, own_minor = divmod(int(arch.rstrip("af")), 10)
    if arch.endswith("a"):
        return (own_major, own_minor) == (major, minor)
    return own_major == major and own_minor <= minor


# From here on the tensor cores multiply e4m3.
_FLOAT8 = (8, 9)
_HOPPER = (9, 0)


def float8_obstacle() -> str | None:
    """Why products in float8 cannot run on the current device, where the other kernels can, or None."""
    if not torch.cuda.is_available():
        return None
    own = torch.cuda.get_device_capability()
    if own < _FLOAT8:
        return f"multiplies float8 from compute capability 8.9 on, and this GPU has {own[0]}.{own[1]}; use 'bfloat16'"
    for arch in library.cuda_architectures():
        if divmod(int(arch.rstrip("af")), 10) >= _FLOAT8 and runs_on(arch, *own):
            return None
    return (
        f"was not compiled with float8 products for compute capability {own[0]}.{own[1]} (build again with "
        f"BEIT3_FAST_CUDA_ARCHS={own[0]}{own[1]})"
    )


def obstacle(op: str, device: str, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why the kernels cannot take such a call, or None."""
    if op not in OPS:
        return "has no kernel for this op"
    reason = why_unavailable(device)
    if reason is None and op == "float8_linear":
        reason = float8_obstacle()
    if reason is not None:
        return reason
    if op == "float8_linear" and dtype is not torch.bfloat16:
        return f"takes bfloat16 beside float8, got {str(dtype).removeprefix('torch.')}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    if needs_grad:
        return "has no gradients; run it under torch.no_grad()"
    return None


def linear_misfit(features: int, out: int, float8: bool = False) -> str | None:
    """Why a product of these widths is none for the kernel, or None."""
    step = _ALIGNMENT if float8 else _STEP
    if features % step or out % step or not features or not out:
        return f"takes features in multiples of {step}, got {features} in and {out} out"
    return None


def attention_misfit(head_width: int) -> str | None:
    """Why heads of this width are none for the kernel, or None."""
    if head_width not in HEAD_WIDTHS:
        return f"takes heads of width {' or '.join(map(str, HEAD_WIDTHS))}, got {head_width}"
    return None


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows begin at multiples of 16 bytes and their elements lie side by side, or a copy."""
    size = tensor.element_size()
    fits = (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % _ALIGNMENT == 0
        and all(stride * size % _ALIGNMENT == 0 for stride in tensor.stride()[:-1])
    )
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("beit3_fast::cuda_expert_linear", mutates_args=())
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
    measure: bool,
) -> tuple[Tensor, Tensor]:
    """As ``beit3_fast.reference.expert_linear``; where there are ``parts``, equally many for each weight and stacked
    along O, the weights give only their shape. With ``measure`` the second result has the row statistics of the first,
    fp32 [M, T, 2]; else it is empty. ``x_parts``: those of x, in parts of ``x_width`` columns."""
    folded = folded_weights(weights, parts, biases, norm_weights, norm_biases)
    # Rows that ``rows`` does not name are zero.
    allocate = x.new_empty if rows is None else x.new_zeros
    y = allocate(x.shape[0], folded.weights.shape[1])
    left = allocate(_left_shape(y, measure), dtype=torch.float32)
    if not bounds[-1]:
        return y, left
    x = aligned(x)
    residual = None if residual is None else aligned(residual)
    moments = None
    if folded.sums is not None and x_parts is not None:
        moments = x_parts.contiguous()
    elif folded.sums is not None:
        moments, x_width = x.new_empty(x.shape[0], 2, dtype=torch.float32), x.shape[1]
        launch("row_statistics", x, rows, moments)
    own_parts = left if measure else None
    for e, own in expert_groups(bounds):
        few = FoldedWeights(*(None if t is None else t[e : e + len(own) - 1] for t in folded))
        tail = (moments, x_width, eps, residual, rows, own, activation == "gelu", y, own_parts)
        launch("expert_linear", x, *few, *tail)
    return y, left


@expert_linear.register_fake
def _(
    x: Tensor, x_parts: Any, x_width: int, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    return y, x.new_empty(_left_shape(y, rest[-1]), dtype=torch.float32)


def _left_shape(y: Tensor, measure: bool) -> tuple[int, int, int]:
    rows, features = y.shape
    return (rows if measure else 0, -(-features // STATISTICS_WIDTH), 2)


def expert_groups(bounds: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The experts of each launch: the first of them, and where each begins and the last ends."""
    for e in range(0, len(bounds) - 1, MAX_EXPERTS):
        own = [*bounds[e : e + MAX_EXPERTS + 1]]
        if own[0] < own[-1]:
            yield e, own


@torch.library.custom_op("beit3_fast::cuda_shared_attention", mutates_args=())
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
    measure: bool,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [Rq, C]; ``longest``: most keys and most queries of a sample. With ``measure`` the second result has the
    statistics of the heads of every row, fp32 [Rq, H, 2]; else it is empty. With ``v_scales`` fp32 [R, ceil(C / 128)],
    those that v would have in 8 bits, o is left in 8 bits alone: it has no rows, its numbers and scales are the third and
    the fourth result, else empty. See ``attention_rounds``."""
    o, left, numbers, scales = made = _of_attention(q, num_heads, measure, v_scales)
    where = (cu_vision, cu_text, cu_vision_q, cu_text_q, positions_q, longest, longest_q)
    if q.numel():
        operands = map(aligned, (q, k, v))
        parts = left if measure else None
        leaves: tuple[Tensor | None, ...] = (o, None, parts, None, None, None)
        if v_scales is not None:
            leaves = (None, None, parts, v_scales, numbers, scales)
        launch("shared_attention", *operands, *where, num_heads, scale, mask, *leaves)
    return made


@shared_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = ("num_heads", "scale", "mask", "measure", "v_scales")
    given = dict(zip(names, rest[7:], strict=False)) | options
    return _of_attention(q, given["num_heads"], given["measure"], given.get("v_scales"))


def _of_attention(
    q: Tensor, num_heads: int, measure: bool, v_scales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Places of o, the statistics of its heads, its numbers in 8 bits and their scales."""
    count, columns = q.shape
    whole, rounded = (count, 0) if v_scales is None else (0, count)
    return (
        q.new_empty(whole, columns),
        q.new_empty(count if measure else 0, num_heads, 2, dtype=torch.float32),
        q.new_empty(rounded, columns, dtype=E4M3),
        q.new_empty(rounded, -(-columns // BLOCK), dtype=torch.float32),
    )


def attention_rounds(device: str) -> bool:
    """Whether the kernel of attention can leave its result in 8 bits: that for compute capability 9.0 can."""
    if why_unavailable(device) is not None or torch.cuda.get_device_capability() != _HOPPER:
        return False
    return any(
        runs_on(arch, *_HOPPER) and arch.endswith("a") for arch in library.cuda_architectures()
    )


def launch(kernel: str, first: Tensor, *arguments: Any, **options: Any) -> None:
    """Calls the library's op that launches a kernel, on torch's current stream of that device."""
    reason = why_unavailable(first.device.type)
    if reason is not None:
        raise KernelUnavailable(f"{kernel}: impl='cuda' was asked for, but it {reason}.")
    stream = torch.cuda.current_stream(first.device).cuda_stream
    getattr(torch.ops.beit3_fast, f"launch_{kernel}")(first, *arguments, stream, **options)


reset: Callable[[], None] = why_unavailable.cache_clear
