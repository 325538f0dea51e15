"""A small visual tokenizer whose weights matter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.model.visual_tokenizer import (
    VisualTokenizer,
    VisualTokenizerConfig,
    create_visual_tokenizer,
)

CONFIG = VisualTokenizerConfig(
    img_size=32,
    patch_size=8,
    embed_dim=128,
    num_heads=2,
    depth=2,
    decoder_depth=1,
    num_codes=40,
    code_dim=8,
    teacher_dim=24,
)


def tokenizer(config: VisualTokenizerConfig = CONFIG, impl: str = "auto") -> VisualTokenizer:
    """With weights and a codebook that matter."""
    torch.manual_seed(1)
    own = create_visual_tokenizer(config, impl=impl)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        own.quantize.embedding.weight.copy_(F.normalize(torch.randn(40, 8), dim=1))
        own.quantize.embedding.initted.fill_(1.0)
    return own


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
