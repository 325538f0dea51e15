"""First weights of another size than the official ones: those that are named, with the spread that is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from train_cases import make_world

from beit3_fast.checkpoint import save_checkpoint
from beit3_fast.errors import ConfigError
from beit3_fast.model import create_model
from beit3_fast.train import read_finetuning
from beit3_fast.train.initial import Initial

TABLES = "beit3.encoder.embed_positions."


def drawn(initial: Initial) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = create_model("beit3_tiny_patch16_32_vqav2", num_classes=30)
    initial.draw(model)
    return dict(model.state_dict())


def test_each_option_is_the_spread_of_its_weights_and_of_no_others() -> None:
    official = drawn(Initial())
    for initial, std, chosen in (
        (Initial(linear=0.3), 0.3, ("_proj.", ".fc", "dense.", "head.0.w", "head.3.w")),
        (Initial(patches=0.4), 0.4, ("vision_embed.proj.w",)),
        (Initial(image_positions=0.2), 0.2, (f"{TABLES}A.",)),
        (Initial(text_positions=0.1), 0.1, (f"{TABLES}B.",)),
    ):
        own = drawn(initial)
        changed = {name for name in own if not torch.equal(own[name], official[name])}
        weights = {name for name in own if own[name].dim() in (2, 4)}
        assert changed == {name for name in weights if any(part in name for part in chosen)}
        for name in changed:
            assert float(own[name].std()) == pytest.approx(std, rel=0.2), name


def test_officially_positions_are_ten_times_as_large_as_words_and_patches_smaller() -> None:
    own = drawn(Initial())
    assert float(own[f"{TABLES}B.weight"].std()) == pytest.approx(1, rel=0.1)
    assert float(own["beit3.text_embed.weight"].std()) == pytest.approx(64**-0.5, rel=0.1)
    assert float(own["beit3.vision_embed.proj.weight"].std()) == pytest.approx(1 / 48, rel=0.1)


@pytest.mark.parametrize("value", [0, -1.0, "small", True, float("inf")])
def test_what_is_no_spread(value: float) -> None:
    with pytest.raises(ConfigError, match="linear must be a positive number"):
        Initial(linear=value)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
def test_a_checkpoint_takes_the_place_of_what_was_drawn(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    name = "beit3_tiny_patch16_32_retrieval"
    torch.manual_seed(1)
    own = create_model(name, max_text_positions=66, vocab_size=500)
    save_checkpoint(own.state_dict(), tmp_path / "own.safetensors", config=own.config, name=name)
    (tmp_path / "recipe.toml").write_text(
        f'[model]\nname = "{name}"\nmax_text_positions = 66\nvocab_size = 500\ncheckpoint = "own.safetensors"\n'
        f'[data]\nindex = "{world}/coco_retrieval.train.jsonl"\n[initial]\nlinear = 0.3\n'
    )
    recipe = read_finetuning(tmp_path / "recipe.toml")
    made, _ = recipe.make_model()
    assert torch.equal(made.vision_head.weight, own.vision_head.weight)
    scratch, _ = recipe.from_scratch().make_model()
    assert float(scratch.vision_head.weight.detach().std()) == pytest.approx(0.3, rel=0.2)
