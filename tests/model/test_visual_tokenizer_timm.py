"""Encoder and decoder of the visual tokenizer against timm's BEiT, whose parameters have the same names."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from _compat import import_torchscale, need_torchscale
from tokenizer_cases import CONFIG, pictures, tokenizer
from torch import nn

from beit3_fast.parity import assert_parity, model_parity

need_torchscale()
import_torchscale()  # Makes torchvision importable, which timm needs.
beit = pytest.importorskip("timm.models.beit", exc_type=ImportError)


def timms(own: nn.Module, **shape: Any) -> Any:
    """timm's BEiT with the weights of ours, strictly by name, in fp64."""
    theirs = beit.Beit(
        num_classes=0,
        embed_dim=CONFIG.embed_dim,
        num_heads=CONFIG.num_heads,
        qkv_bias=True,
        use_abs_pos_emb=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **shape,
    )
    theirs.load_state_dict(own.state_dict())
    return theirs.double().eval()


@pytest.mark.parametrize("impl", ["composite", "auto"])
@torch.no_grad()
def test_the_encoder(impl: str) -> None:
    own = tokenizer(impl=impl).encoder
    theirs = timms(own, img_size=32, patch_size=8, depth=CONFIG.depth)
    rows = theirs.fc_norm(theirs.forward_features(pictures().double())[:, 1:])
    assert_parity(model_parity(own(pictures()), rows))


@torch.no_grad()
def test_the_decoder() -> None:
    own = tokenizer().decoder
    theirs = timms(own, img_size=4, patch_size=1, in_chans=CONFIG.code_dim, depth=1)
    grid = torch.randn(3, CONFIG.code_dim, 4, 4)
    rows = theirs.fc_norm(theirs.forward_features(grid.double())[:, 1:])
    assert_parity(model_parity(own(grid), rows))
