"""Reading attention masks in torchscale's form: nonzero means blocked, [N, N] over image then text."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_fast.errors import ShapeError
from beit3_fast.ops import MASKS
from beit3_fast.padded_layout import shapes_are_fixed
from beit3_fast.reference.shared_attention import visible_keys


def read_blocked_mask(
    blocked: Tensor, num_vision: int, num_text: int, text_padding: Tensor | None
) -> str | Tensor:
    """The mask structure that ``blocked`` [N, N] spells out, or a bool tensor for shared_attention.

    ``text_padding`` bool [B, Nt], True for padding: the tensor's text rows and columns are moved to the places
    that the packed texts have. Raises ShapeError for another shape.
    """
    if not isinstance(blocked, Tensor):
        raise ShapeError(f"attn_mask must be a tensor, got {type(blocked).__name__}")
    tokens = num_vision + num_text
    if tuple(blocked.shape) != (tokens, tokens):
        raise ShapeError(
            f"attn_mask must be [N, N] with N = {num_vision} vision + {num_text} text tokens = {tokens}, "
            f"nonzero where blocked, got {list(blocked.shape)}"
        )
    visible = blocked == 0
    if shapes_are_fixed():  # the layout keeps padding where it was, and masks it
        return visible
    for name in MASKS:
        vision = torch.arange(num_vision, device=blocked.device)
        text = torch.arange(num_text, device=blocked.device)
        if torch.equal(visible, visible_keys(name, vision, text, num_vision, num_text)):
            return name
    if text_padding is None or not bool(text_padding.any()):
        return visible
    longest = int((~text_padding).sum(1).max())
    masks = visible.new_zeros(text_padding.shape[0], num_vision + longest, num_vision + longest)
    for sample, padding in enumerate(text_padding):
        kept = torch.cat(
            [
                torch.arange(num_vision, device=blocked.device),
                (~padding).nonzero().flatten() + num_vision,
            ]
        )
        masks[sample, : len(kept), : len(kept)] = visible[kept][:, kept]
    return masks
