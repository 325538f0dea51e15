"""Models with weights of 8 bits, what goes into them and what comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import beit3_fast
from beit3_fast.ops.packed_weight import PackedWeight

TASKS = ("vqav2", "nlvr2", "retrieval", "captioning", "imageclassification")
NAME = "beit3_tiny_patch16_32_vqav2"


def inputs(task: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(3, 3, 32, 32, generator=generator).to(dtype)
    text = torch.tensor([[0, 7, 9, 11, 2], [0, 5, 2, 1, 1], [0, 8, 6, 2, 1]])
    padding = (text == 1).long()
    if task == "imageclassification":
        return (image,)
    if task == "nlvr2":
        return image, image.flip(0), text, padding
    if task == "captioning":
        return image, text, padding, (text > 6).long()
    return image, text, padding


def flat(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([p.float().flatten() for p in parts if p is not None])


@torch.no_grad()
def outputs(model: Any, task: str = "vqav2") -> Tensor:
    dtype = next(model.parameters()).dtype
    options = {"only_infer": True} if task == "retrieval" else {}
    return flat(model(*inputs(task, dtype), **options))


def models(dtype: str, task: str = "vqav2", **options: Any) -> tuple[Any, Any]:
    """A model and the same with its weights rounded to ``dtype``."""
    torch.manual_seed(1)
    plain = beit3_fast.create_model(f"beit3_tiny_patch16_32_{task}", **options)
    with torch.no_grad():
        # Biases and LayerNorms that are not what they begin as.
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rounded = beit3_fast.create_model(f"beit3_tiny_patch16_32_{task}", dtype=dtype, **options)
    rounded.load_state_dict(plain.state_dict())
    return plain, rounded


def weights(model: Any) -> list[PackedWeight]:
    """The rounded ones."""
    return [p for p in model.parameters() if isinstance(p, PackedWeight) and p.is_rounded]
