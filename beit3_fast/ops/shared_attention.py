"""shared_attention: one softmax over the vision and text keys of each sample.

    o = softmax(scale q K^T) V      K, V: the sample's vision rows and its text rows, wherever they lie

Rows are packed (``TokenLayout``): no padding, no mask tensor. Masks are structure:

- "bidirectional": every query sees every key of its sample;
- "seq2seq": text sees the image and text up to itself, the image sees the image (captioning);
- "causal": every query sees keys up to itself in the order vision, text.

A bool tensor is accepted as well, by the CPU kernels and by PyTorch's own attention, one sample at a time.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit3_fast.composite.shared_attention import shared_attention as composite_impl
from beit3_fast.composite.shared_attention import visible_places
from beit3_fast.errors import ShapeError
from beit3_fast.float8 import Quantized
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import cuda_kernels, dispatch, library, triton_kernels
from beit3_fast.ops.operands import Measured
from beit3_fast.padded_layout import PaddedLayout
from beit3_fast.reference.shared_attention import shared_attention as reference_impl

MASKS = ("bidirectional", "seq2seq", "causal")


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    *,
    num_heads: int,
    scale: float | None = None,
    mask: str | Tensor = "bidirectional",
    queries: TokenLayout | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend from the query rows to the keys of the same sample.

    q [Rq, C], k and v [R, C]: fp32, bf16 or fp16 (fp64 too in "reference" and "composite"), C = H * D; column
    slices of one fused tensor are fine. ``layout`` describes the key rows; ``queries`` the query rows when they
    are only some of them (``TokenLayout.select``). ``scale`` defaults to D ** -0.5. ``mask`` is one of MASKS or
    a bool tensor [N, N] or [B, N, N], True where a query may look, over the longest image's tokens followed by
    the longest text's, samples in the caller's order. Returns [Rq, C] in q's dtype, under torch.autocast in its (operands
    are then rounded to it, as for PyTorch's own attention; "reference" leaves them); a query that sees no key gives zeros.

    Differentiable in q, k and v. Raises ShapeError for operands that do not fit, ConfigError and
    KernelUnavailable for ``impl``.
    """
    how: dict[str, Any] = {"num_heads": num_heads, "scale": scale, "mask": mask, "queries": queries}
    return measured_shared_attention(q, k, v, layout, **how, impl=impl, measure=False).rows


def measured_shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    *,
    num_heads: int,
    scale: float | None = None,
    mask: str | Tensor = "bidirectional",
    queries: TokenLayout | None = None,
    impl: str = "auto",
    measure: bool = True,
    v_scales: Tensor | None = None,
) -> Measured:
    """As ``shared_attention``; where ``measure`` asks for them, the result has its row statistics if the implementation
    leaves them ("triton" and "cuda" do). ``v_scales`` fp32 [R, ceil(C / 128)], those that v would have in 8 bits: the
    only reader of the result is a product in float8, and "cuda" may leave it in 8 bits alone."""
    queries = layout if queries is None else queries
    _check(q, k, v, layout, queries, num_heads, scale, mask)
    valid = layout.valid if isinstance(layout, PaddedLayout) else None
    # There are no weights whose copy in autocast's dtype would have to be kept, as for expert_linear.
    width = q.shape[1] // num_heads
    sizes: dict[str, Any] = {"misfit": cuda_kernels.attention_misfit(width), "head_width": width}
    given = (isinstance(mask, Tensor), valid is not None)
    at = dispatch.situation("shared_attention", [q, k, v], *given, **sizes)
    at = at._replace(autocast=False)
    choice = dispatch.choose(at, impl)
    lower = dispatch.autocast_dtype(q)
    if lower is not None and choice.impl != "reference":
        q, k, v = (t.to(lower) for t in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            own: dict[str, Any] = {"num_heads": num_heads, "scale": scale, "mask": mask}
            own |= {"queries": queries, "impl": choice.impl, "measure": measure}
            return measured_shared_attention(q, k, v, layout, **own)
    if scale is None:
        scale = (q.shape[1] // num_heads) ** -0.5
    if choice.impl in ("cpu", "cuda", "triton"):
        selected = queries is not layout
        q, k, v = (dispatch.rows_in_memory(t) for t in (q, k, v))
        where = (
            layout.cu_vision,
            layout.cu_text,
            queries.cu_vision if selected else None,
            queries.cu_text if selected else None,
            queries.positions if selected else None,
        )
        how = (num_heads, scale, mask)
        if choice.impl == "cpu":
            seen = None
            if isinstance(mask, Tensor):
                seen = _packed_mask(mask, layout)
                mask = "bidirectional"
            return Measured(_op()(q, k, v, *where, num_heads, scale, mask, seen))
        lengths = (layout.longest, queries.longest)
        if choice.impl == "cuda":
            if v_scales is not None and not (measure and cuda_kernels.attention_rounds(at.device)):
                v_scales = None
            operands = (q, k, v, *where, *lengths, *how, measure, v_scales)
            o, parts, *rounded = cuda_kernels.shared_attention(*operands)
            if v_scales is not None:
                return Measured.in_8_bits(o, parts, width, Quantized(*rounded))
            return Measured(o, parts, width) if measure else Measured(o)
        real = None if valid is None else valid.flatten()
        o, _, parts = triton_kernels.shared_attention(
            q, k, v, *where, real, *lengths, *how, measure
        )
        return Measured(o, parts, q.shape[1] // num_heads) if measure else Measured(o)
    if choice.impl != "reference":
        # Of PyTorch's attention only the formula in separate calls has forward-mode derivatives.
        with sdpa_kernel(SDPBackend.MATH) if at.transformed else nullcontext():
            return Measured(composite_impl(q, k, v, layout, queries, num_heads, scale, mask))
    if isinstance(layout, PaddedLayout) and valid is not None:
        mask = visible_places(layout, layout, mask)
    return Measured(reference_impl(q, k, v, layout, queries, num_heads, scale, mask))


def _packed_mask(mask: Tensor, layout: TokenLayout) -> Tensor:
    """A mask tensor with its samples in the order of the rows, as the compiled op reads it."""
    if mask.dim() == 3 and not layout.in_order:
        mask = mask[list(layout.order)]
    return mask.contiguous()


def _op() -> Any:
    """The compiled op, with its shape function and gradient registered."""
    _register()
    return torch.ops.beit3_fast.shared_attention.default


@library.once
def _register() -> None:
    library.load()

    @torch.library.register_fake("beit3_fast::shared_attention")
    def _(q: Tensor, *_: Any) -> Tensor:
        return q.new_empty(q.shape)

    @torch.library.register_fake("beit3_fast::shared_attention_gradients")
    def _(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    torch.library.register_autograd(
        "beit3_fast::shared_attention", _backward, setup_context=_setup_context
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_heads, ctx.scale, ctx.mask, seen = inputs
    ctx.save_for_backward(*tensors, seen)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, seen = ctx.saved_tensors
    own = (ctx.num_heads, ctx.scale, ctx.mask, seen)
    op = torch.ops.beit3_fast.shared_attention_gradients.default
    return (*op(grad.contiguous(), *tensors, *own), *[None] * 9)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    queries: TokenLayout,
    num_heads: int,
    scale: float | None,
    mask: str | Tensor,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not q.dtype.is_floating_point:
        raise ShapeError(f"q must have a floating-point dtype, got {q.dtype}")
    for name, own in (("layout", layout), ("queries", queries)):
        if not isinstance(own, TokenLayout):
            raise ShapeError(f"{name} must be a TokenLayout, got {type(own).__name__}")
    check_numbers(num_heads, scale)
    if q.dim() != 2 or num_heads < 1 or not q.shape[1] or q.shape[1] % num_heads:
        raise ShapeError(
            f"q must have shape [Rq, H * D] with H = num_heads = {num_heads} and D of 1 or more, "
            f"got {list(q.shape)}"
        )
    if q.shape[0] != queries.num_rows:
        raise ShapeError(f"q must have one row per query: {queries.num_rows}, got {q.shape[0]}")
    expected = (layout.num_rows, q.shape[1])
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != expected:
            raise ShapeError(
                f"{name} must have shape [R, C] = {list(expected)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ShapeError(
                f"{name} must have q's dtype and device ({q.dtype}, {q.device}), "
                f"got {tensor.dtype}, {tensor.device}"
            )
    for name, own in (("layout", layout), ("queries", queries)):
        # A layout may name a type of device alone, which stands for the current one.
        if own.device.type != q.device.type or own.device.index not in (None, q.device.index):
            raise ShapeError(
                f"{name} must be on q's device {q.device}, got {own.device}; make it with device=q.device"
            )
    if queries is not layout and (
        queries.batch_size != layout.batch_size or queries.positions is None
    ):
        raise ShapeError("queries must come from layout.select(...) of the same batch")
    if isinstance(mask, str):
        if mask not in MASKS:
            raise ShapeError(f"mask must be one of {MASKS} or a bool tensor, got {mask!r}")
        return
    if not isinstance(mask, Tensor):
        raise ShapeError(f"mask must be one of {MASKS} or a bool tensor, got {type(mask).__name__}")
    tokens = layout.mask_size
    shapes = ((tokens, tokens), (layout.batch_size, tokens, tokens))
    if mask.device != q.device:
        raise ShapeError(f"a mask tensor must be on q's device {q.device}, got {mask.device}")
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        raise ShapeError(
            f"a mask tensor must be bool, True where a query may look, of shape {list(shapes[0])} or "
            f"{list(shapes[1])}, got {mask.dtype} of shape {list(mask.shape)}"
        )


def check_numbers(num_heads: int, scale: float | None) -> None:
    """Raises ShapeError for what is no number of heads or no scale."""
    if not isinstance(num_heads, int):
        raise ShapeError(f"num_heads must be an integer, got {num_heads!r}")
    if scale is not None and not (isinstance(scale, (float, int)) and 0 <= scale < float("inf")):
        raise ShapeError(f"scale must be a number, finite and not negative, got {scale!r}")
