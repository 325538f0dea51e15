"""A run as a file says, by the command, from the world to the report."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import data, model

from beit3_fast import cli
from beit3_fast.checkpoint import read_checkpoint, save_checkpoint
from beit3_fast.data.masked_batch import TERMS
from beit3_fast.data.mixed import Mix
from beit3_fast.errors import ConfigError, InputError
from beit3_fast.train import TrainOptions, evaluate, read_log, read_recipe

EXAMPLE = Path(__file__).parents[2] / "examples/pretrain_world.toml"

RECIPE = """
[model]
name = "beit3_tiny_patch16_32_pretraining"
embed_dim = 32
num_heads = 2
img_size = 48
patch_size = 8
num_classes = 16
max_text_positions = 66
[data]
image = ["imagenet.train.index.jsonl"]
text = "text.train.jsonl"
pair = "coco_retrieval.train.jsonl"
tokenizer = "world.spm"
[held_out]
pair = "coco_retrieval.val.jsonl"
text = "text.val.jsonl"
image = "imagenet.val.index.jsonl"
batches = 2
[mix]
image = 2
text = 2
pair = 2
[masking]
min_block = 4
random_words = 0.1
[loss]
text = 0.5
[train]
steps = 4
lr = 1e-3
warmup_steps = 2
save_every = 3
betas = [0.9, 0.99]
"""


@pytest.fixture
def recipe(world: Path) -> Path:
    path = world / "recipe.toml"
    path.write_text(RECIPE)
    return path


needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")


@needs_toml
def test_the_command(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main([*call, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["skipped"]) == (4, 0)
    assert report["held_out"].keys() == set(TERMS)
    assert all(own["predictions"] > 0 for own in report["held_out"].values())
    lines = read_log(tmp_path / "run")
    last = lines[-1]
    weighted = sum(last[term] for term in TERMS) - 0.5 * last["text"]
    assert last["loss"] == pytest.approx(weighted, rel=1e-5)
    for name in ("report.json", "curves.png", "model.safetensors", "codes.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size
    assert json.loads((tmp_path / "run/report.json").read_text()) == report
    assert cli.main(call) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("run: 4 steps, 0 skipped")
    own = report["held_out"]["image"]
    assert f"image: {own['accuracy']:.1%} of {own['predictions']} right" in said[1]
    assert read_log(tmp_path / "run") == lines, "a finished run is left as it is"


@needs_toml
def test_numbers_that_are_not_finite_are_null_in_reports(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = RECIPE.replace("steps = 4", "steps = 3").replace("lr = 1e-3", "lr = 1e25")
    recipe.write_text(changed.replace("warmup_steps = 2", "warmup_steps = 0"))
    call = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main([*call, "--json"]) == 0

    def no_json(name: str) -> None:
        raise ValueError(name)

    for text in (capsys.readouterr().out, (tmp_path / "run/report.json").read_text()):
        report = json.loads(text, parse_constant=no_json)
        assert report["loss"] is None
        assert report["skipped"] > 0


@needs_toml
def test_first_weights_of_another_spread_are_another_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(call) == 0
    recipe.write_text(f"{RECIPE}[initial]\nlinear = 0.1\n")
    assert cli.main(call) == 1
    said = capsys.readouterr().err
    assert "of another [initial] (it has linear=None, " in said
    assert "now linear=0.1, patches=None" in said


@needs_toml
def test_a_recipe_may_begin_with_a_byte_order_mark(recipe: Path) -> None:
    own = read_recipe(recipe)
    recipe.write_text(RECIPE, encoding="utf-8-sig")
    assert read_recipe(recipe) == own


@needs_toml
def test_every_section_arrives(recipe: Path, tmp_path: Path) -> None:
    own = read_recipe(recipe)
    model = own.make_model()
    again = read_recipe(recipe).make_model()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert model.config.embed_dim == 32
    assert model.config.vocab_size == own.make_data(model, tmp_path).processor.tokenizer.vocab_size  # type: ignore[union-attr]
    assert own.train == TrainOptions(
        steps=4, lr=1e-3, warmup_steps=2, save_every=3, betas=(0.9, 0.99)
    )
    assert own.masking.random_words == 0.1
    data = own.make_data(model, tmp_path)
    assert data.mix == Mix(2, 2, 2)
    assert len(data.rows["image"]) == 10
    held_out = own.make_held_out(model, data)
    assert held_out is not None
    assert len(held_out.rows["image"]) == 6
    assert held_out.visual_tokens is data.visual_tokens
    both = replace(own, held_out=replace(own.held_out, image="imagenet.train.index.jsonl"))
    with pytest.raises(ConfigError, match=r"\[held_out\] must name images .*, and 10 such images"):
        both.make_held_out(model, data)
    kept = read_checkpoint(tmp_path / "codes.safetensors").state["centres"]
    assert torch.equal(kept, own.make_data(model, tmp_path).visual_tokens.centres)  # type: ignore[union-attr]


@needs_toml
@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_can_be_no_folder(
    place: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    call = ["pretrain", "--config", str(recipe), "--quiet", "--out", str(tmp_path / place)]
    assert cli.main(call) == 1
    said = capsys.readouterr().err
    assert f"the folder '{tmp_path / place}' cannot be made" in said
    assert "give the path of a folder, there or not" in said


@needs_toml
def test_texts_alone(recipe: Path, tmp_path: Path) -> None:
    words = RECIPE.replace("num_classes = 16", 'modalities = ["text"]')
    alone = (
        words.replace("\nimage = 2", "").replace("\npair = 2", "").replace("steps = 4", "steps = 2")
    )
    recipe.write_text(alone)
    call = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(call) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["held_out"].keys() == {"text"}
    assert read_log(tmp_path / "run")[-1]["mfu"] > 0


@needs_toml
@pytest.mark.parametrize(
    ("modality", "missing", "kinds"),
    [("text", "images", "image, pair"), ("vision", "texts", "text, pair")],
)
def test_a_mix_that_the_model_cannot_see(
    modality: str, missing: str, kinds: str, recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(RECIPE.replace("[data]", f'modalities = ["{modality}"]\n[data]'))
    own = read_recipe(recipe)
    model = own.make_model()
    message = rf'a model of modalities \["{modality}"\] takes no {missing}, but \[mix\] has samples of {kinds}; '
    with pytest.raises(ConfigError, match=message):
        own.make_data(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_toml
def test_only_what_is_trained_on_is_augmented(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("[loss]", "[augment]\ncrop = 0.5\nflip = 0.5\n[loss]"))
    own = read_recipe(recipe)
    recipe.write_text(RECIPE)
    plain = read_recipe(recipe)
    model = own.make_model()
    data = own.make_data(model, tmp_path)
    held_out, as_they_are = own.make_held_out(model, data), plain.make_held_out(model, data)
    assert held_out is not None
    assert as_they_are is not None
    assert torch.equal(held_out[0].images, as_they_are[0].images)
    assert not torch.equal(data[0].images, plain.make_data(model, tmp_path)[0].images)


@needs_toml
def test_a_run_begins_with_given_weights(recipe: Path, world: Path) -> None:
    first = read_recipe(recipe).make_model()
    with torch.no_grad():
        first.mim_head.bias.fill_(3.0)
    state = {n: t for n, t in first.state_dict().items() if not n.startswith("mlm_head")}
    save_checkpoint(state, world / "begin.safetensors")
    recipe.write_text(RECIPE.replace("[data]", 'checkpoint = "begin.safetensors"\n[data]', 1))
    model = read_recipe(recipe).make_model()
    assert bool((model.mim_head.bias == 3.0).all())
    assert model.mlm_head.weight.abs().max() > 0


@needs_toml
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[mix]", "[mixture]", r"expected sections \['model', 'data'.*got 'mixture'"),
        ("min_block", "min_blocks", r"\[masking\] has no field 'min_blocks'; it has \['image'"),
        ("steps = 4", f"seed = {2**70}", r"seed must be an integer from 0 to 2\*\*63 - 1, got 118"),
        ("steps = 4", "steps = 0", r"\[train\] steps must be an integer of at least 1"),
        ('name = "beit3', 'title = "beit3', r"\[model\] needs a name"),
        ("_pretraining", "_retrieval", r"no classes|must end in _pretraining"),
        ("[model]", "[model", "cannot be read"),
        ('text = "text.train', 'text = 3 # "text.train', "must be an index file or a list"),
        ("embed_dim = 32", "depth = 32", "unknown configuration fields"),
        ("embed_dim = 32", "checkpoint = 3", r"\[model\] checkpoint must name a file, got 3"),
        ("betas = [0.9, 0.99]", "betas = 0.9", "betas must be two numbers"),
        ("min_block = 4", "max_aspect = inf", "max_aspect must be a finite number"),
        ("batches = 2", "batches = 0", r"\[held_out\] batches must be an integer of at least 1"),
        ("[loss]", '[codes]\nimages = "x"\n[loss]', r"\[codes\] images must be an integer"),
        ("[loss]", "[codes]\ntokenizer = 3\n[loss]", r"\[codes\] tokenizer must name a file"),
        (
            "[loss]",
            '[codes]\ncache = "codes.safetensors"\n[augment]\nflip = 0.5\n[loss]',
            r"codes of whole images, not of those that \[augment\] changes",
        ),
    ],
)
def test_recipes_that_make_no_sense(
    old: str, new: str, message: str, recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(RECIPE.replace(old, new, 1))

    def make() -> None:
        own = read_recipe(recipe)
        own.make_data(own.make_model(), tmp_path)

    with pytest.raises(ConfigError, match=message):
        make()


@needs_toml
def test_codes_of_another_recipe_are_not_taken_over(recipe: Path, tmp_path: Path) -> None:
    own = read_recipe(recipe)
    own.make_data(own.make_model(), tmp_path)
    assert own.make_data(own.make_model(), tmp_path).visual_tokens is not None
    for old, new in (
        ("num_classes = 16", "num_classes = 8"),
        ("[loss]", "[codes]\nimages = 5\n[loss]"),
        ("imagenet.train.index.jsonl", "imagenet.val.index.jsonl"),
        ("[train]", "[train]\nseed = 5"),
    ):
        assert old in RECIPE
        recipe.write_text(RECIPE.replace(old, new, 1))
        other = read_recipe(recipe)
        with pytest.raises(ConfigError, match="has codes of another recipe: of other images, or"):
            other.make_data(other.make_model(), tmp_path)


@needs_toml
def test_an_id_that_is_none_names_its_line(recipe: Path, world: Path, tmp_path: Path) -> None:
    text = world / "text.train.jsonl"
    before = text.read_text()
    text.write_text(before + '{"text_segment": [5, 99999999999999999999999]}\n')
    own = read_recipe(recipe)
    try:
        with pytest.raises(InputError, match=r"line \d+ of .*token ids are numbers from 0 to"):
            own.make_data(own.make_model(), tmp_path)
    finally:
        text.write_text(before)


@needs_toml
def test_the_example_can_be_read() -> None:
    own = read_recipe(EXAMPLE)
    assert own.model["name"].endswith("_pretraining")
    assert own.train.steps > 0


def test_the_world_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["world", str(tmp_path / "w"), "--scenes", "3", "--held-out", "2", "--texts", "4"]
    assert cli.main([*call, "--pixels", "32"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'w'}: 7 scenes\n"
    assert len(list((tmp_path / "w/images").rglob("*.png"))) == 7
    assert cli.main(call) == 1
    assert "holds another world" in capsys.readouterr().err


def test_scores_count_right_predictions(world: Path) -> None:
    own, batches = model(world), data(world, Mix(image=2, text=3))
    batch = batches[0]
    word = int(batch.words.mode().values)
    with torch.no_grad():
        own.mlm_head.weight.zero_()
        own.mlm_head.bias.zero_()
        own.mlm_head.bias[word] = 1.0
    scores: dict[str, Any] = evaluate(own, batches, 1)
    assert scores.keys() == {"image", "text"}
    share = float((batch.words == word).float().mean())
    assert scores["text"] == pytest.approx((share, share, len(batch.words)))
    assert scores["image"].predictions == len(batch.codes)
    assert not own.training
