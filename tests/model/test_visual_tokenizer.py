"""The visual tokenizer: numerics by another implementation, files in the published layout, names."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_cases import CONFIG, pictures, tokenizer

from beit3_fast.checkpoint import CheckpointMismatch, load_checkpoint, save_checkpoint
from beit3_fast.errors import CheckpointError, ConfigError, InputError, ShapeError
from beit3_fast.model.visual_tokenizer import (
    VISUAL_TOKENIZERS,
    VisualTokenizer,
    create_visual_tokenizer,
)


def official(own: VisualTokenizer) -> dict[str, Any]:
    """A training checkpoint as it was published: the teacher and its scaling are among the weights."""
    teacher = {
        "teacher_model.visual.conv1.weight": torch.randn(8, 3, 8, 8),
        "teacher_model.logit_scale": torch.tensor(4.6),
        "scaling_layer.shift": torch.randn(1, 3, 1, 1),
        "scaling_layer.scale": torch.rand(1, 3, 1, 1),
    }
    return {
        "model": {**own.state_dict(), **teacher},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 99,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vqkd", lr=5e-5),
    }


def test_codes_by_the_published_formula() -> None:
    own = tokenizer().double()
    with torch.no_grad():
        z = own.encode_task_layer(own.encoder(pictures().double()))
    z = z / z.norm(dim=-1, keepdim=True)
    codes = own.quantize.embedding.weight
    distances = (z[:, :, None] - codes).square().sum(-1)
    assert torch.equal(own.tokenize(pictures().double()), distances.argmin(-1))
    made = own(pictures().double())
    assert torch.equal(made.codes, distances.argmin(-1))
    torch.testing.assert_close(made.commitment, distances.amin(-1).mean() / 8)
    grid = codes[made.codes].view(3, 4, 4, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(made.features, own.decode_task_layer(own.decoder(grid)))


def test_a_published_file_loads(tmp_path: Path) -> None:
    own = tokenizer()
    torch.save(official(own), tmp_path / "vqkd.pth")
    for name in (CONFIG, None):
        read = create_visual_tokenizer(name, tmp_path / "vqkd.pth")
        assert read.config == CONFIG
        assert not read.training
        assert torch.equal(read.tokenize(pictures()), own.tokenize(pictures()))
        assert read.identity() == own.identity()
    report = load_checkpoint(tokenizer(), tmp_path / "vqkd.pth")
    assert set(report.dropped.values()) == {"the tokenizer's teacher is not part of it"}
    assert len(report.dropped) == 4
    assert report.loaded == list(own.state_dict())


def test_a_file_of_ours_says_what_it_is(tmp_path: Path) -> None:
    own = tokenizer()
    own.name = "vqkd_tiny"
    save_checkpoint(own, tmp_path / "model.safetensors")
    read = create_visual_tokenizer(checkpoint=tmp_path / "model.safetensors")
    assert (read.config, read.name) == (CONFIG, "vqkd_tiny")
    assert torch.equal(read.tokenize(pictures()), own.tokenize(pictures()))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    content = official(tokenizer())
    del content["model"]["quantize.embedding.weight"]
    torch.save(content, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"no visual tokenizer, it lacks 'quantize\.emb"):
        create_visual_tokenizer(None, tmp_path / "less.pth")
    with pytest.raises(ConfigError, match="device must be"):
        create_visual_tokenizer(CONFIG, device="gpu")
    with pytest.raises(CheckpointMismatch, match=r"missing: quantize\.embedding\.weight"):
        create_visual_tokenizer(CONFIG, tmp_path / "less.pth")
    content = official(tokenizer())
    content["model"]["encoder.blocks.0.gamma_1"] = torch.ones(128)
    torch.save(content, tmp_path / "more.pth")
    with pytest.raises(CheckpointMismatch, match=r"unexpected: encoder\.blocks\.0\.gamma_1"):
        create_visual_tokenizer(CONFIG, tmp_path / "more.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vqkd",), "unknown visual tokenizer 'vqkd'; known are"),
        ((), "needs a name, one of"),
        (({"width": 3},), "no configuration of a visual tokenizer"),
        (({"img_size": 33},), "img_size must be a multiple of patch_size"),
        (({"depth": 0},), "depth must be a positive integer"),
        (({"decay": 1.0},), r"decay must be a number in \[0, 1\)"),
    ],
)
def test_configurations_that_make_no_sense(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_visual_tokenizer(*arguments)


def test_names_and_shapes_of_the_published_ones() -> None:
    assert [name for name in VISUAL_TOKENIZERS if name != "vqkd_tiny"] == [
        "vqkd_encoder_base_decoder_1x768x12_clip",
        "vqkd_encoder_base_decoder_3x768x12_clip",
        "vqkd_encoder_base_decoder_1x768x12_dino",
    ]
    with torch.device("meta"):
        own = VisualTokenizer(VISUAL_TOKENIZERS["vqkd_encoder_base_decoder_3x768x12_clip"])
    shapes = {name: tuple(tensor.shape) for name, tensor in own.state_dict().items()}
    assert shapes["encoder.pos_embed"] == shapes["decoder.pos_embed"] == (1, 197, 768)
    assert shapes["decoder.patch_embed.proj.weight"] == (768, 32, 1, 1)
    assert shapes["encoder.blocks.11.attn.q_bias"] == (768,)
    assert shapes["decoder.blocks.2.mlp.fc1.weight"] == (3072, 768)
    assert shapes["encode_task_layer.2.weight"] == (32, 768)
    assert shapes["decode_task_layer.2.weight"] == (512, 768)
    assert shapes["quantize.embedding.weight"] == (8192, 32)
    assert shapes["quantize.cluster_size"] == shapes["quantize.embedding.cluster_size"] == (8192,)
    assert len([name for name in shapes if ".blocks." in name]) == 15 * 13
    assert "decoder.blocks.3.norm1.weight" not in shapes
    tables = {
        f"{side}.{part}" for side in ("encoder", "decoder") for part in ("cls_token", "pos_embed")
    }
    assert own.no_weight_decay() == tables <= shapes.keys()


def test_images_of_another_size() -> None:
    with pytest.raises(ShapeError, match=r"must be \[B, C, 32, 32\], got \[1, 3, 40, 32\]"):
        tokenizer().tokenize(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ConfigError, match=r"unknown fields \['pixels'\]"):
        create_visual_tokenizer("vqkd_tiny", pixels=3)


def test_what_tells_one_tokenizer_from_another() -> None:
    own, other = tokenizer(), tokenizer(replace(CONFIG, num_heads=4))
    other.load_state_dict(own.state_dict())
    assert not torch.equal(own.tokenize(pictures()), other.tokenize(pictures()))
    assert own.identity() != other.identity(), "heads are in no weight"
    with torch.no_grad():
        other = tokenizer()
        other.decoder.fc_norm.weight.add_(1.0)
        assert own.identity() == other.identity(), "codes do not depend on the decoder"
        other.encode_task_layer[2].bias.add_(1.0)
        assert own.identity() != other.identity()


def test_images_that_are_not_finite() -> None:
    images = pictures()
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(InputError, match=r"image 1 of 3 has .* not finite"):
        tokenizer().tokenize(images)


def test_autocast_spares_the_codebook() -> None:
    own = tokenizer()
    with torch.autocast("cpu", torch.bfloat16):
        assert own(pictures()).commitment.dtype == torch.float32
        assert own(pictures()).features.dtype == torch.bfloat16
