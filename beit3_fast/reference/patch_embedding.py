"""patch_embedding by its formula: every patch meets one weight, tokens and positions are added."""

from __future__ import annotations

import torch
from torch import Tensor


def patch_embedding(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor,
    positions: Tensor | None,
    masked: Tensor | None,
) -> Tensor:
    """y[b, 0] = cls_token + positions[0]; y[b, 1 + p] = W patch[b, p] + bias + positions[1 + p].

    images [B, K, H, W], weight [C, K, P, P], bias and tokens [C], positions [1 + patches, C]; where masked
    [B, patches] is set, mask_token takes the product's place. Patches are numbered row by row. Returns
    [B, 1 + patches, C] in the images' dtype. Computed in fp32, in fp64 for fp64 operands; one rounding at the end.
    """
    compute = torch.promote_types(images.dtype, torch.float32)
    size = weight.shape[-1]
    patches = images.to(compute).unfold(2, size, size).unfold(3, size, size)
    y = torch.einsum("bkhwyx,ckyx->bhwc", patches, weight.to(compute)).flatten(1, 2)
    if bias is not None:
        y = y + bias.to(compute)
    if masked is not None:
        y = torch.where(masked[..., None], mask_token.to(compute), y)
    y = torch.cat([cls_token.to(compute).expand(len(y), 1, -1), y], dim=1)
    if positions is not None:
        y = y + positions.to(compute)
    return y.to(images.dtype)
