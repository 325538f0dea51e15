"""head_top_k: the likeliest classes of a linear head and their log probabilities, without its logits where that is built.

    z = x W^T + b      log p_v = z_v - log sum_u exp(z_u)      the highest log p_v of the allowed classes v

A word of a caption is chosen among 64,010; of all logits no more than a few are ever wanted. The CUDA kernels keep them
on the chip; elsewhere they come from expert_linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_fast.composite.head_top_k import likeliest
from beit3_fast.derived import derived
from beit3_fast.errors import ShapeError
from beit3_fast.ops import cuda_decoding, dispatch, library
from beit3_fast.ops.expert_linear import expert_linear
from beit3_fast.ops.packed_weight import PackedWeight
from beit3_fast.reference.head_top_k import head_top_k as reference_impl


@torch.no_grad()
def head_top_k(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: int,
    *,
    allowed: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Name the ``count`` likeliest classes of every row, best first: log p fp32 [R, count] and ids int64 [R, count].

    x [R, D], weight [V, D], bias [V] or None: fp32, bf16 or fp16 (fp64 too in "reference" and "composite", with log p in
    fp64), one dtype (autocast aside). ``allowed`` bool [V]: the classes that may be named; all of them count in the
    softmax. Of equals "composite" takes what torch.topk takes, the others the lower id.

    "cuda" writes no logits; "cpu" and "composite" make them with ``expert_linear`` of that name, which also rounds them
    to x's dtype. "cpu" looks at them twice, both times in the nearest cache, where PyTorch's calls take ten passes. Not differentiable. Raises ShapeError for operands that do not fit, ConfigError and KernelUnavailable
    for ``impl``.
    """
    _check(x, weight, bias, count, allowed)
    operands = [x, weight] if bias is None else [x, weight, bias]
    misfit = cuda_decoding.head_misfit(x.shape[1], len(weight), count)
    if isinstance(weight, PackedWeight):
        misfit = "takes weights as they are, these are packed"
    choice = dispatch.choose(dispatch.situation("head_top_k", operands, misfit=misfit), impl)
    if choice.impl == "reference":
        return reference_impl(x, weight, bias, allowed, count)
    if choice.impl == "cuda":
        lower = dispatch.autocast_dtype(x) or x.dtype
        own = None if bias is None else _in_dtype(bias, lower)
        plain = _in_dtype(weight, lower)
        log_p, ids = cuda_decoding.head_top_k(x.to(lower), plain, own, allowed, count)
        return log_p, ids
    biases = None if bias is None else [bias]
    logits = expert_linear(x, [weight], biases, bounds=(0, len(x)), impl=impl)
    if choice.impl == "cpu" and logits.dtype in (torch.float32, torch.bfloat16):
        return compiled_likeliest(logits, count, allowed)
    return likeliest(logits, count, allowed)


def compiled_likeliest(logits: Tensor, count: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``composite.head_top_k.likeliest``, of equals the lower id, for logits [R, V] of fp32 or bf16 on a CPU."""
    allowed = None if allowed is None else allowed.contiguous()
    log_p, ids = _op()(dispatch.rows_in_memory(logits), allowed, count)
    return log_p, ids


def _op() -> Any:
    """The compiled op, with its shape function registered."""
    _register()
    return torch.ops.beit3_fast.likeliest.default


@library.once
def _register() -> None:
    library.load()

    @torch.library.register_fake("beit3_fast::likeliest")
    def _(logits: Tensor, allowed: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        log_p = logits.new_empty(len(logits), count, dtype=torch.float32)
        return log_p, logits.new_empty(len(logits), count, dtype=torch.int64)


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Itself, or its copy, which is kept: autocast asks for it at every step."""
    if weight.dtype == dtype:
        return weight
    return derived(f"in {dtype}", (weight,), lambda: weight.detach().to(dtype))


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: int, allowed: Tensor | None
) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "allowed": allowed}
    for name, tensor in named.items():
        if tensor is None and name in ("bias", "allowed"):
            continue
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != x.device:
            raise ShapeError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise ShapeError(
            f"x must be a floating-point tensor [R, D], got {x.dtype} of shape {list(x.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ShapeError(
            f"weight must have shape [V, D] with D = {x.shape[1]}, got {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ShapeError(f"bias must have shape [V] = [{len(weight)}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not dispatch.multiplies_with(x, tensor):
            raise ShapeError(
                f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}; convert it or run under torch.autocast, "
                "which leaves float64 alone"
            )
    if allowed is not None and (allowed.dtype != torch.bool or allowed.shape != weight.shape[:1]):
        raise ShapeError(
            f"allowed must be bool [V] = [{len(weight)}], got {allowed.dtype} of shape {list(allowed.shape)}"
        )
    if not isinstance(count, int) or not 1 <= count <= len(weight):
        raise ShapeError(
            f"count must be from 1 to the number of classes, {len(weight)}, got {count!r}"
        )
