"""timm's names for the vision branch of BEiT-3, turned back into the official ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_RULES = (
    (r"patch_embed\.proj\.(weight|bias)", r"beit3.vision_embed.proj.\1"),
    (r"blocks\.(\d+)\.norm1\.(weight|bias)", r"beit3.encoder.layers.\1.self_attn_layer_norm.A.\2"),
    (r"blocks\.(\d+)\.norm2\.(weight|bias)", r"beit3.encoder.layers.\1.final_layer_norm.A.\2"),
    (
        r"blocks\.(\d+)\.attn\.norm\.(weight|bias)",
        r"beit3.encoder.layers.\1.self_attn.inner_attn_ln.A.\2",
    ),
    (
        r"blocks\.(\d+)\.attn\.proj\.(weight|bias)",
        r"beit3.encoder.layers.\1.self_attn.out_proj.A.\2",
    ),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"beit3.encoder.layers.\1.ffn.A.\2.\3"),
    (r"blocks\.(\d+)\.mlp\.norm\.(weight|bias)", r"beit3.encoder.layers.\1.ffn.A.ffn_layernorm.\2"),
    (r"norm\.(weight|bias)", r"beit3.encoder.layer_norm.A.\1"),
)
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


def recognise(names: Mapping[str, Tensor]) -> bool:
    """True for a state dict of timm's vision transformers with BEiT-3's inner norms."""
    return "pos_embed" in names and "blocks.0.attn.norm.weight" in names


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names and shapes. Names that no rule knows stay as they are.

    timm keeps neither the mask token nor the two rows before the class token in the position table; nothing reads
    these rows, and both become zeros.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _QKV.fullmatch(name)
        if match and tensor.shape[:1].numel() % 3 == 0:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                out[f"beit3.encoder.layers.{match[1]}.self_attn.{part}_proj.A.{match[2]}"] = piece
        elif name == "pos_embed" and tensor.dim() == 3 and tensor.shape[0] == 1:
            rows = torch.cat([tensor.new_zeros(2, tensor.shape[2]), tensor[0]])
            out["beit3.encoder.embed_positions.A.weight"] = rows
        elif name == "cls_token":
            out["beit3.vision_embed.cls_token"] = tensor
            out["beit3.vision_embed.mask_token"] = torch.zeros_like(tensor)
        else:
            out[_rename(name)] = tensor
    return out


def _rename(name: str) -> str:
    for pattern, new in _RULES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return name
