"""The image tower against timm's BEiT-3, weights carried over by timm's own conversion."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from _compat import SHAPES, fill, impls, import_torchscale, need_torchscale

from beit3_fast.config import BEiT3Config
from beit3_fast.model import BEiT3ForImageClassification
from beit3_fast.parity import assert_parity, model_parity

need_torchscale()
import_torchscale()  # Makes torchvision importable, which timm needs.
timm = pytest.importorskip("timm", exc_type=ImportError)

CONFIGS = {
    name: config.replace(
        normalize_output=False, embed_dim=width, ffn_dim=4 * width, img_size=img_size
    )
    for name, config in SHAPES.items()
    for width in [config.embed_dim]
    for img_size in [48 if name != "large" else 16]
}


@cache
def models(shape: str) -> tuple[Any, BEiT3ForImageClassification]:
    from timm.models.vision_transformer import checkpoint_filter_fn

    config: BEiT3Config = CONFIGS[shape]
    ours = BEiT3ForImageClassification(config, 40).eval()
    fill(ours)
    theirs = timm.create_model(
        "beit3_large_patch16_224" if shape == "large" else "beit3_base_patch16_224",
        pretrained=False,
        num_classes=40,
        img_size=config.img_size,
        depth=config.num_layers,
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
    ).eval()
    converted = checkpoint_filter_fn(dict(ours.state_dict()), theirs)
    theirs.load_state_dict(converted, strict=True)
    return theirs, ours


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32"))
@torch.no_grad()
def test_image_tower(impl: str, dtype: str, shape: str, batch: int) -> None:
    theirs, ours = models(shape)
    ours.beit3.impl = impl
    size = CONFIGS[shape].img_size
    image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
    tokens = ours.beit3(visual_tokens=image)["encoder_out"]
    assert_parity(model_parity(tokens, theirs.forward_features(image)), "tokens")
    assert_parity(model_parity(ours(image), theirs(image)), "logits")


@pytest.mark.parametrize("shape", CONFIGS)
@torch.no_grad()
def test_hidden_states(shape: str) -> None:
    theirs, ours = models(shape)
    size = CONFIGS[shape].img_size
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(9))
    layers = CONFIGS[shape].num_layers
    truth = theirs.forward_intermediates(
        image, indices=layers, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )
    states = ours.beit3(visual_tokens=image, return_all_hiddens=True)["encoder_states"]
    assert len(truth) == layers == len(states) - 1
    for mine, (patches, prefix) in zip(states[1:], truth, strict=True):
        assert_parity(model_parity(mine, torch.cat([prefix, patches], dim=1)), "a hidden state")
