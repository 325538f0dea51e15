"""BEiT3Config: the published sizes, derived counts, and refusal of contradictions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from beit3_fast.config import SIZES, BEiT3Config
from beit3_fast.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "width", "heads", "ffn", "layers", "patch", "attention", "vl"),
    [
        ("base", 768, 12, 3072, 12, 16, "decoupled", 0),
        ("large", 1024, 16, 4096, 24, 16, "decoupled", 0),
        ("giant", 1408, 16, 6144, 40, 14, "shared", 3),
        ("tiny", 64, 4, 128, 2, 16, "decoupled", 0),
    ],
)
def test_published_sizes(
    size: str, width: int, heads: int, ffn: int, layers: int, patch: int, attention: str, vl: int
) -> None:
    config = SIZES[size]
    assert (config.embed_dim, config.num_heads, config.ffn_dim) == (width, heads, ffn)
    assert (config.num_layers, config.patch_size) == (layers, patch)
    assert (config.attention, config.vl_expert_layers) == (attention, vl)
    assert config.layer_norm_eps == 1e-5
    assert config.max_text_positions == 1024
    assert config.vocab_size == (100 if size == "tiny" else 64010)


def test_head_widths() -> None:
    assert [SIZES[size].head_dim for size in ("base", "large", "giant")] == [64, 64, 88]


@pytest.mark.parametrize(
    ("img_size", "grid", "tokens"),
    [
        (224, (14, 14), 197),
        (480, (30, 30), 901),
        ((224, 384), (14, 24), 337),
        ([32, 16], (2, 1), 3),
    ],
)
def test_grids(img_size: Any, grid: tuple[int, int], tokens: int) -> None:
    config = BEiT3Config(img_size=img_size)
    assert config.grid_size == grid
    assert config.num_vision_tokens == tokens
    assert config.image_shape == (grid[0] * 16, grid[1] * 16)


@pytest.mark.parametrize("size", SIZES)
def test_dictionaries_come_back_equal(size: str) -> None:
    config = SIZES[size].replace(img_size=(4 * SIZES[size].patch_size,) * 2, modalities=("text",))
    assert BEiT3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(BEiT3Config.from_dict(config.to_dict())) == hash(config)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"embed_dim": 0}, "embed_dim must be a positive integer, got 0"),
    ({"num_heads": -1}, "num_heads must be a positive integer, got -1"),
    ({"num_layers": 2.0}, "num_layers must be a positive integer, got 2.0"),
    ({"ffn_dim": "3072"}, "ffn_dim must be a positive integer, got '3072'"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"patch_size": 0}, "patch_size"),
    ({"in_chans": None}, "in_chans"),
    ({"embed_dim": 100, "num_heads": 12}, "multiple of num_heads, got 100 and 12"),
    ({"img_size": 225}, "multiples of patch_size 16, got 225"),
    ({"img_size": (224, 230)}, r"multiples of patch_size 16, got \(224, 230\)"),
    ({"img_size": 0}, "positive multiples"),
    ({"img_size": -16}, "positive multiples"),
    ({"img_size": (32, 32, 32)}, "img_size"),
    ({"img_size": "224"}, "img_size"),
    ({"img_size": 224.0}, "img_size"),
    ({"max_text_positions": 2}, "at least 3"),
    ({"attention": "joint"}, "'decoupled', 'shared'.*got 'joint'"),
    ({"drop_path_rate": 1.0}, r"\[0, 1\), got 1.0"),
    ({"drop_path_rate": -0.1}, r"\[0, 1\)"),
    ({"drop_path_rate": float("nan")}, r"\[0, 1\), got nan"),
    ({"drop_path_rate": "0.1"}, r"\[0, 1\), got '0.1'"),
    ({"layer_norm_eps": 0.0}, r"layer_norm_eps must be in \(0, 1\), got 0.0"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
    ({"layer_norm_eps": "1e-5"}, "layer_norm_eps"),
    ({"vl_expert_layers": 1.5}, "vl_expert_layers"),
    ({"vl_expert_layers": 13}, "between 0 and num_layers 12, got 13"),
    ({"modalities": ()}, "modalities"),
    ({"modalities": ("audio",)}, "'vision', 'text'.*'audio'"),
    ({"modalities": ("text", "text")}, "must be a tuple of some"),
    ({"normalize_output": "no"}, "normalize_output must be True or False, got 'no'"),
    ({"checkpoint_activations": "x"}, "checkpoint_activations must be True or False"),
    ({"modalities": "vision"}, "must be a tuple of some.*got 'vision'"),
    ({"modalities": None}, "modalities.*got None"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BEiT3Config(**fields)


@pytest.mark.parametrize("make", [BEiT3Config().replace, lambda **f: BEiT3Config.from_dict(f)])
def test_unknown_fields_are_named(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown configuration fields \['depth'\].*num_layers"):
        make(depth=3)
