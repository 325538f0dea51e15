"""Small models with weights that matter, and batches for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit3_fast.config import SIZES, BEiT3Config
from beit3_fast.model import BEiT3, create_model
from beit3_fast.ops import library

TINY = SIZES["tiny"]
FORMS: dict[str, BEiT3Config] = {
    "released": TINY,
    "released, output not normalised": TINY.replace(normalize_output=False),
    "paper": TINY.replace(
        embed_dim=88, num_heads=1, attention="shared", num_layers=3, vl_expert_layers=2
    ),
    "paper, all layers": TINY.replace(
        attention="shared", num_layers=2, vl_expert_layers=2, img_size=28, patch_size=14
    ),
    "decoupled with pair experts": TINY.replace(vl_expert_layers=1),
    "shared attention only": TINY.replace(attention="shared"),
    "wide image": TINY.replace(img_size=(16, 48)),
    "another epsilon": TINY.replace(layer_norm_eps=0.01),
}


def need(impl: str) -> None:
    """Skip with the reason where an implementation cannot run."""
    if impl == "cpu" and not library.available():
        pytest.skip(f"cpu: the library {library.why_unavailable()}")


def randomize(model: nn.Module, seed: int = 0) -> Any:
    """Every parameter drawn anew: zeros and ones would hide a bias, a token or a norm that is not used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2 and "weight" in name:
                parameter.copy_(1.0 + 0.3 * values)
            elif "logit_scale" in name:
                parameter.copy_(torch.tensor(1.5))
            elif parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(values * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(values * 0.3)
    return model.eval()


def backbone(config: BEiT3Config = TINY, impl: str = "auto", seed: int = 0) -> BEiT3:
    """A BEiT3 in evaluation mode with random weights."""
    return randomize(BEiT3(config, impl), seed)


def task_model(task: str, impl: str = "auto", **overrides: Any) -> Any:
    """One of the five tiny task models with random weights."""
    return randomize(create_model(f"beit3_tiny_patch16_32_{task}", impl=impl, **overrides))


def images(batch: int, config: BEiT3Config = TINY, seed: int = 1) -> Tensor:
    """[B, 3, H, W] of the model's own size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.in_chans, *config.image_shape, generator=generator)


def texts(batch: int, tokens: int, config: BEiT3Config = TINY, seed: int = 2) -> Tensor:
    """int64 [B, Nt]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, tokens), generator=generator)


def padding(lengths: list[int], tokens: int) -> Tensor:
    """bool [B, Nt], True behind each sample's length."""
    return torch.arange(tokens)[None] >= torch.tensor(lengths)[:, None]
