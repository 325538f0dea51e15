"""Which implementation of an op runs, and why not the others.

``impl="auto"`` takes the first candidate that applies and is known to be the faster one here; an
implementation asked for by name either runs or raises KernelUnavailable with the reason. The environment
variable ``BEIT3_FAST_IMPL`` replaces "auto" and nothing else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.derived import is_transformed, needs_grad
from beit3_fast.errors import ConfigError, KernelUnavailable
from beit3_fast.ops import cuda_kernels, kernel_check, library, triton_kernels

logger = logging.getLogger("beit3_fast")

IMPLEMENTATIONS = ("reference", "composite", "cpu", "triton", "cuda", "flash_attn", "xformers")
# The ops of a layer, which `explain` tells of.
OPS = ("expert_linear", "shared_attention")
# Triton stands in front of CUDA until a GPU has timed both.
_AUTO_ORDER = ("cpu", "triton", "cuda", "composite")
_NOT_BUILT = (
    "is not part of this version of beit3_fast; use 'auto', 'cpu', 'cuda', 'triton', 'composite' "
    "or 'reference'"
)
_NO_MASK_TENSOR = "takes mask structures, not a mask tensor"
_NO_PADDING = "takes batches without padding, this one is padded (torch.compile, capture)"
_TRANSFORMED = "has reverse-mode gradients only, not torch.func's and not forward-mode ones"
_INTERPRETED = "runs in an interpreter on CPU tensors: where it is asked for by name, not in 'auto'"


class Situation(NamedTuple):
    """All that a choice depends on."""

    op: str
    device: str
    dtype: torch.dtype
    needs_grad: bool
    autocast: bool
    compiling: bool
    mask_tensor: bool
    padding: bool = False
    int8: bool = False
    packed: bool = False
    float8: bool = False
    # Whether torch.func or forward-mode differentiation sees the call.
    transformed: bool = False
    # Why the CUDA kernels do not take operands of these sizes.
    misfit: str | None = None
    # Columns of a head of attention.
    head_width: int = 0


@dataclass(frozen=True)
class Choice:
    """The implementation taken, and the reason against each one that was passed over."""

    impl: str
    rejected: tuple[tuple[str, str], ...]


def autocast_enabled(device: str) -> bool:
    """Whether operands of this device type are under autocast; "meta" and others know none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast wants this operand multiplied; None where it leaves it alone (off, fp64)."""
    device = tensor.device.type
    if tensor.dtype is torch.float64 or not autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def multiplies_with(x: Tensor, other: Tensor) -> bool:
    """Whether two operands are of one dtype, or of two that autocast turns into one."""
    if x.dtype == other.dtype:
        return True
    lower = autocast_dtype(x)
    return lower is not None and lower == autocast_dtype(other)


def situation(
    op: str,
    tensors: list[Tensor],
    mask_tensor: bool = False,
    padding: bool = False,
    int8: bool = False,
    packed: bool = False,
    float8: bool = False,
    misfit: str | None = None,
    head_width: int = 0,
) -> Situation:
    """The situation of a call: ``tensors`` are all operands, the first one gives device and dtype.

    ``padding``: whether rows of the batch are padding that no query may see (``PaddedLayout``); ``int8``: whether the weights are rounded to int8, which only the CPU kernels multiply as such; ``packed``: whether
    they are kept only in the layout of those kernels; ``float8``: whether they are rounded to float8; ``misfit``: why
    the CUDA kernels do not take these sizes; ``head_width``: columns of a head of attention.
    """
    first = tensors[0]
    lower = autocast_dtype(first)
    return Situation(
        op=op,
        device=first.device.type,
        dtype=lower or first.dtype,
        needs_grad=needs_grad(*tensors),
        autocast=lower is not None,
        compiling=torch.compiler.is_compiling(),
        mask_tensor=mask_tensor,
        padding=padding,
        int8=int8,
        packed=packed,
        float8=float8,
        transformed=is_transformed(),
        misfit=misfit,
        head_width=head_width,
    )


def _cpu_obstacle(at: Situation) -> str | None:
    """Why the compiled CPU kernels cannot take this call, or None."""
    if at.op not in (*OPS, "cached_attention", "head_top_k"):
        return "has no kernel for this op"
    if at.device != "cpu":
        return f"takes CPU tensors, these are on {at.device}"
    if at.float8:
        return "has no float8 products"
    if at.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, got {str(at.dtype).removeprefix('torch.')}"
    if at.op == "cached_attention":
        if at.needs_grad:
            return "has no gradients of cached keys"
    elif at.padding:
        return _NO_PADDING
    if library.available():
        return None
    return f"needs the compiled library, which {library.why_unavailable()}"


def _cpu_slower(at: Situation) -> str | None:
    """Why "auto" expects another implementation to be faster than the CPU kernels, or None.

    docs/measurements.md holds the figures behind these rules.
    """
    if at.int8:
        return None
    if at.autocast and not at.needs_grad:
        return "would keep the weights a second time, in autocast's dtype"
    level = library.cpu_isa()
    if at.needs_grad and at.op == "expert_linear" and not faster_gradients(at.dtype):
        return "recomputes in the backward pass what composite keeps"
    if at.needs_grad and at.op == "shared_attention" and not level.startswith(("avx512", "amx")):
        return "was not seen to be the faster one with gradients on a CPU without AVX-512"
    if at.compiling and not at.packed:
        return "is opaque to torch.compile, which fuses composite"
    if level == "portable":
        return "has only its portable path on this CPU (no AVX2)"
    if at.op == "expert_linear":
        amx = library.cpu_features().get("amx_bf16")
        if at.dtype is torch.bfloat16 and amx and level != "amx_bf16":
            return f"is held at {level}, and oneDNN uses AMX"
    return None


def faster_gradients(dtype: torch.dtype) -> bool:
    """Whether the CPU kernels' products of this dtype are faster than PyTorch's, that of a gradient with its transposing, too."""
    return dtype is torch.bfloat16 or library.cpu_isa() == "amx_bf16"


def _cuda_obstacle(at: Situation) -> str | None:
    """Why the CUDA kernels cannot take this call, or None."""
    if at.mask_tensor and at.op != "cached_attention":
        return _NO_MASK_TENSOR
    if at.padding:
        return _NO_PADDING
    return cuda_kernels.obstacle(_cuda_op(at), at.device, at.dtype, at.needs_grad) or at.misfit


def _cuda_op(at: Situation) -> str:
    """The kernel's own name for the op."""
    return "float8_linear" if at.float8 and at.op == "expert_linear" else at.op


def _triton_obstacle(at: Situation) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    if at.op not in (*OPS, "masked_linear_cross_entropy"):
        return "has no kernel for this op"
    if at.mask_tensor:
        return _NO_MASK_TENSOR
    if at.float8:
        return "has no float8 products"
    if at.head_width > triton_kernels.WIDEST_HEAD:
        return f"takes heads of at most {triton_kernels.WIDEST_HEAD} columns, got {at.head_width}"
    return triton_kernels.obstacle(at.device, at.dtype)


def _obstacle(impl: str, at: Situation) -> str | None:
    if at.transformed and impl in ("cpu", "cuda", "triton"):
        return _TRANSFORMED
    if impl == "cpu":
        return _cpu_obstacle(at)
    if impl == "cuda":
        return _cuda_obstacle(at)
    if impl == "triton":
        return _triton_obstacle(at)
    return None if impl in ("reference", "composite") else _NOT_BUILT


@lru_cache(maxsize=1024)
def _choose(at: Situation, requested: str, doubts: tuple[str | None, str | None]) -> Choice:
    if requested not in ("auto", *IMPLEMENTATIONS):
        raise ConfigError(
            f"impl must be 'auto' or one of {list(IMPLEMENTATIONS)}, got {requested!r}"
        )
    if requested != "auto":
        obstacle = _obstacle(requested, at)
        if obstacle:
            raise KernelUnavailable(
                f"{at.op}: impl={requested!r} was asked for, but it {obstacle}. "
                "Use impl='auto' to fall back."
            )
        passed_over = tuple(
            (name, _obstacle(name, at) or f"was not asked for: impl={requested!r} was")
            for name in IMPLEMENTATIONS
            if name != requested
        )
        return Choice(requested, passed_over)
    against = {
        "cpu": _obstacle("cpu", at) or _cpu_slower(at),
        "cuda": _obstacle("cuda", at) or doubts[0],
        "triton": _obstacle("triton", at) or (doubts[1] if at.device == "cuda" else _INTERPRETED),
        "composite": None,
    }
    impl = next(name for name in _AUTO_ORDER if against[name] is None)
    rejected = [
        (name, against[name] or f"stands behind {impl}") for name in _AUTO_ORDER if name != impl
    ]
    others = [name for name in IMPLEMENTATIONS if name not in (*_AUTO_ORDER, "reference")]
    rejected += [(name, _obstacle(name, at) or _NOT_BUILT) for name in others]
    rejected.append(("reference", "is the readable formula, kept for checking"))
    first = "triton" if at.device == "cuda" else "cpu"
    logger.info("%s: %s; not %s: %s", at.op, impl, first, dict(rejected).get(first, "-"))
    return Choice(impl, tuple(rejected))


def choose(at: Situation, requested: str = "auto") -> Choice:
    """The implementation for a situation.

    Raises ConfigError for an unknown name and KernelUnavailable when a named implementation cannot run.
    """
    return _chosen(requested, *at)


def _chosen(requested: str, *fields: Any) -> Choice:
    at = Situation(*fields)
    if requested == "auto":
        requested = os.environ.get("BEIT3_FAST_IMPL") or "auto"
    of_cuda = of_triton = None
    if requested == "auto" and at.device == "cuda":
        takes_triton = _obstacle("triton", at) is None
        if takes_triton:
            of_triton = kernel_check.doubt(at.op, at.dtype, at.needs_grad)
        # What is not the first choice is not checked.
        if not (takes_triton and of_triton is None) and _obstacle("cuda", at) is None:
            of_cuda = kernel_check.doubt(_cuda_op(at), at.dtype, at.needs_grad, "cuda")
    return _choose(at, requested, (of_cuda, of_triton))


# torch.compile makes the choice while it traces and does not trace how (see kernel_check.doubt).
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rows_in_memory(tensor: Tensor) -> Tensor:
    """The tensor itself if the elements of its rows lie side by side, as the kernels read them, or a copy."""
    return tensor if tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


reset: Callable[[], None] = _choose.cache_clear
