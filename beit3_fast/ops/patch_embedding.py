"""patch_embedding: images become rows, the class token in front, in one product.

    y[b, 0]     = cls_token + positions[0]
    y[b, 1 + p] = W patch[b, p] + bias + positions[1 + p]      (mask_token for the product where masked[b, p])

The compiled CPU kernel gathers the patches of some rows into the cache and multiplies them there; bias and
positions are added to the product before it is stored, and no product is computed for a masked patch. Everywhere
else it is ``expert_linear`` on gathered patches, and calls of PyTorch around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_fast.composite.patch_embedding import patch_embedding as composite_impl
from beit3_fast.derived import derived, needs_grad
from beit3_fast.errors import ShapeError
from beit3_fast.ops import dispatch, library
from beit3_fast.ops.expert_linear import expert_linear, packed_form
from beit3_fast.ops.packed_weight import PackedWeight
from beit3_fast.reference.patch_embedding import patch_embedding as reference_impl


def patch_embedding(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor,
    positions: Tensor | None = None,
    masked: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Embed the patches of images, row by row of patches.

    images [B, K, H, W], H and W positive multiples of P; weight [C, K, P, P]; bias, cls_token and mask_token [C];
    positions [1 + patches, C]; all of one floating dtype (autocast aside). masked [B, patches], bool or 0/1.
    Returns [B, 1 + patches, C] in that dtype. Differentiable in every tensor argument but ``masked``. ``impl`` as
    for ``expert_linear``, whose choice it follows. Raises ShapeError for operands that do not fit, ConfigError and
    KernelUnavailable for ``impl``.
    """
    own = (images, weight, bias, cls_token, mask_token)
    return _embed(*own, positions, masked, impl, with_words=False)[0]


def patch_embedding_and_words(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor,
    positions: Tensor,
    masked: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``patch_embedding`` with positions and without them, the "words" of images: two tensors [B, 1 + patches, C] by one product."""
    own = (images, weight, bias, cls_token, mask_token)
    rows, words = _embed(*own, positions, masked, impl, with_words=True)
    if words is None:
        words = _embed(*own, None, masked, impl, with_words=False)[0]
    return rows, words


def _embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor,
    positions: Tensor | None,
    masked: Tensor | None,
    impl: str,
    with_words: bool,
) -> tuple[Tensor, Tensor | None]:
    rows, columns = grid_of(images, weight)
    _check(images, weight, bias, cls_token, mask_token, positions, masked, rows * columns)
    if masked is not None:
        masked = masked.bool()
    optional = [t for t in (bias, positions) if t is not None]
    tensors = [images, weight, cls_token, mask_token, *optional]
    at = dispatch.situation("expert_linear", tensors)
    choice = dispatch.choose(at, impl)
    if choice.impl == "reference":
        own = (images, weight, bias, cls_token, mask_token, positions, masked)
        return reference_impl(*own), None
    fused = choice.impl == "cpu" and all(tensor.dtype == images.dtype for tensor in tensors)
    if fused and not (at.needs_grad or at.autocast or at.compiling):
        whole = [None if t is None else t.contiguous() for t in (bias, cls_token, mask_token)]
        places = [None if t is None else t.contiguous() for t in (positions, masked)]
        found: tuple[Tensor, Tensor] = _op()(
            images.contiguous(),
            packed_form(weight),
            *whole,
            *places,
            weight.shape[-1],
            with_words,
        )
        shape = (images.shape[0], 1 + rows * columns, weight.shape[0])
        embedded, words = found
        return embedded.view(shape), words.view(shape) if with_words else None
    if needs_grad(weight) or isinstance(weight, PackedWeight):
        matrix = weight.flatten(1)
    else:
        matrix = derived("matrix", (weight,), lambda: weight.detach().flatten(1))

    def product(patches: Tensor, bias: Tensor | None) -> Tensor:
        biases = None if bias is None else [bias]
        return expert_linear(patches, [matrix], biases, bounds=(0, patches.shape[0]), impl=impl)

    bare = composite_impl(images, weight, bias, cls_token, mask_token, masked, product)
    return bare if positions is None else bare + positions, bare


def grid_of(images: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows and columns of patches. Raises ShapeError unless images is [B, K, H, W] in whole patches."""
    channels, patch = weight.shape[1], weight.shape[-1]
    if (
        images.dim() != 4
        or images.shape[1] != channels
        or images.shape[2] % patch
        or images.shape[3] % patch
        or not images.shape[2:].numel()
    ):
        raise ShapeError(
            f"images must be [B, {channels}, H, W] with H and W positive multiples of "
            f"{patch}, got {list(images.shape)}; resize them (see beit3_fast.Processor)"
        )
    if not images.is_floating_point():
        raise ShapeError(
            f"images must be floating point and normalised, got {images.dtype}; "
            "use beit3_fast.Processor"
        )
    return images.shape[2] // patch, images.shape[3] // patch


def _check(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor,
    positions: Tensor | None,
    masked: Tensor | None,
    patches: int,
) -> None:
    if not dispatch.multiplies_with(images, weight):
        raise ShapeError(
            f"images must have the model's dtype, {weight.dtype}, got {images.dtype}; convert them or run "
            "under torch.autocast, which leaves float64 alone"
        )
    width = weight.shape[0]
    wanted = {
        "bias": (bias, [width]),
        "cls_token": (cls_token, [width]),
        "mask_token": (mask_token, [width]),
        "positions": (positions, [1 + patches, width]),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ShapeError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
    if masked is not None and tuple(masked.shape) != (images.shape[0], patches):
        raise ShapeError(
            f"vision_masked_position must be [B, patches] = [{images.shape[0]}, {patches}], "
            f"got {list(masked.shape)}"
        )


@library.once
def _op() -> Any:
    """The compiled op, with its shape function registered once."""
    library.load()

    @torch.library.register_fake("beit3_fast::patch_embedding")
    def _(
        images: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        cls_token: Tensor,
        mask_token: Tensor,
        positions: Tensor | None,
        masked: Tensor | None,
        patch: int,
        with_words: bool = False,
    ) -> tuple[Tensor, Tensor]:
        patches = (images.shape[2] // patch) * (images.shape[3] // patch)
        rows, width = images.shape[0] * (1 + patches), cls_token.shape[0]
        return images.new_empty(rows, width), images.new_empty(rows if with_words else 0, width)

    return torch.ops.beit3_fast.patch_embedding.default
