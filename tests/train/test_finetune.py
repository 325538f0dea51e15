"""A downstream task as a file says: the losses and figures are the official ones, and any of our files begins it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_cases import model

from beit3_fast import cli
from beit3_fast.checkpoint import save_checkpoint
from beit3_fast.config import BEiT3Config
from beit3_fast.data import Processor, Tokenizer
from beit3_fast.data.paired import PairedData, read_paired
from beit3_fast.data.question_batch import answer_scores, question_batch
from beit3_fast.errors import ConfigError
from beit3_fast.model.visual_tokenizer import VisualTokenizerConfig
from beit3_fast.train import TrainOptions, read_finetuning, read_log, read_recipe
from beit3_fast.train.downstream import DOWNSTREAM
from beit3_fast.train.question_answering import QuestionAnswering, answer_accuracy
from beit3_fast.train.tokenizer_recipe import read_tokenizer_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"

RECIPE = """
[model]
name = "beit3_tiny_patch16_32_TASK"
embed_dim = 32
num_heads = 2
ffn_dim = 64
img_size = 48
patch_size = 8
max_text_positions = 66
[data]
index = "INDEX.jsonl"
tokenizer = "world.spm"
batch_size = 4
[held_out]
index = "HELD.jsonl"
[train]
steps = 3
lr = 1e-3
warmup_steps = 1
save_every = 2
"""
FILES = {
    "vqav2": ("vqa.train", "vqa.rest_val"),
    "retrieval": ("coco_retrieval.train", "coco_retrieval.val"),
}

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")


def write(world: Path, task: str, changes: tuple[tuple[str, str], ...] = ()) -> Path:
    index, held = FILES[task]
    text = RECIPE.replace("TASK", task).replace("INDEX", index).replace("HELD", held)
    if task == "vqav2":
        text = text.replace("batch_size", 'answers = "answer2label.txt"\nbatch_size')
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = world / f"{task}.toml"
    path.write_text(text)
    return path


@needs_toml
@pytest.mark.parametrize("task", sorted(DOWNSTREAM))
def test_the_command(
    task: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(model(world, seed=7), world / "pretrained.safetensors")
    begin = ("[data]", 'checkpoint = "pretrained.safetensors"\n[data]')
    call = ["finetune", "--config", str(write(world, task, (begin,))), "--quiet", "--json"]
    assert cli.main([*call, "--out", str(tmp_path / "run")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["skipped"]) == (3, 0)
    head = {"vqav2": "head.0.weight", "retrieval": "vision_head.weight"}[task]
    assert report["begun"].startswith(f"from {world / 'pretrained.safetensors'}; begins anew: ")
    assert head in report["begun"]
    assert "beit3." not in report["begun"].partition("anew")[2]
    assert all(0 <= value <= 1 for value in report["held_out"].values())
    for name in ("report.json", "report.html", "curves.png", "examples.png", "model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size
    lines = read_log(tmp_path / "run")
    assert cli.main([*call, "--out", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert read_log(tmp_path / "run") == lines, "a finished run is left as it is"
    assert cli.main([*call, "--out", str(tmp_path / "scratch"), "--from-scratch"]) == 0
    scratch = json.loads(capsys.readouterr().out)
    assert scratch["begun"] == "from scratch"
    assert read_log(tmp_path / "scratch")[0]["loss"] != lines[0]["loss"]


@needs_toml
def test_another_start_is_another_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = world / "pretrained.safetensors", tmp_path / "run"
    save_checkpoint(model(world, seed=7), file)
    begin = ("[data]", f'checkpoint = "{file.name}"\n[data]')
    recipe = write(world, "vqav2", (begin,))
    call = ["finetune", "--config", str(recipe), "--quiet", "--json", "--out", str(out)]
    assert cli.main(call) == 0
    report = (out / "report.json").read_bytes()
    capsys.readouterr()
    began = "holds another run, of another [model] checkpoint (it has sha256 "
    assert cli.main([*call, "--from-scratch"]) == 1
    said = capsys.readouterr().err
    assert began in said
    assert "now none, from scratch" in said
    save_checkpoint(model(world, seed=8), file)
    assert cli.main(call) == 1
    said = capsys.readouterr().err
    assert began in said
    assert "now sha256 " in said
    assert (out / "report.json").read_bytes() == report
    save_checkpoint(model(world, seed=7), world / "moved.safetensors")
    recipe.write_text(recipe.read_text().replace(file.name, "moved.safetensors"))
    assert cli.main(call) == 0, "the same weights under another name"


@needs_toml
def test_the_checkpoint_s_weights_are_the_first(world: Path) -> None:
    own = model(world, seed=7)
    save_checkpoint(own, world / "pretrained.safetensors")
    begin = ("[data]", 'checkpoint = "pretrained.safetensors"\n[data]')
    made, loaded = read_finetuning(write(world, "vqav2", (begin,))).make_model()
    assert loaded is not None
    assert torch.equal(made.beit3.text_embed.weight, own.beit3.text_embed.weight)
    answers = (world / "answer2label.txt").read_text().splitlines()
    assert made.head[-1].out_features == len(answers)


def questions(world: Path, batch_size: int = 6) -> PairedData[Any]:
    rows = read_paired(world / "vqa.train.jsonl", answer_scores)
    processor = Processor(Tokenizer(world / "world.spm"), image_size=48)
    return PairedData(rows, batch_size, processor, lambda b, t: question_batch(b, t, 30))


@needs_toml
def test_questions_cost_what_the_official_engine_counts(world: Path) -> None:
    recipe = read_finetuning(write(world, "vqav2", (("[held", "[augment]\ncrop = 1.0\n[held"),)))
    recipe = replace(recipe, data=replace(recipe.data, answers=None))
    made, _ = replace(recipe, model={**recipe.model, "num_classes": 30}).make_model()
    data = questions(world)
    batch, objective = data[0], QuestionAnswering()
    scores = batch.scores.clone()
    scores[0] *= 0.3
    batch = replace(batch, scores=scores)
    logits = made(batch.image, batch.tokens, batch.padding)
    official = F.binary_cross_entropy_with_logits(logits, scores) * 30
    loss, terms = objective(made, batch, objective.counts(batch))
    assert torch.allclose(loss, official)
    assert torch.equal(terms["answers"], loss.detach())
    halves = [
        replace(batch, **{f.name: getattr(batch, f.name)[own] for f in fields(batch)})
        for own in (slice(0, 2), slice(2, 6))
    ]
    shares = [objective(made, half, {"questions": 6})[0] for half in halves]
    assert torch.allclose(sum(shares), official)  # type: ignore[arg-type]


def test_accuracy_is_the_score_of_the_likeliest_answer(world: Path) -> None:
    data = questions(world, batch_size=4)
    rows = [data.rows[0]._replace(target=((3, 0.6), (4, 1.0))), *data.rows[1:]]
    rows[1] = rows[1]._replace(target=())
    data = PairedData(rows, 4, data.processor, data.collate)

    class Always(torch.nn.Linear):
        def forward(self, image: Any, question: Any, padding_mask: Any) -> Any:  # type: ignore[override]
            return F.one_hot(torch.full((len(image),), 3), 30).float()

    expected = sum(dict(row.target).get(3, 0.0) for row in rows) / len(rows)
    assert expected >= 0.6 / len(rows)
    judged = Always(1, 1).train()
    assert answer_accuracy(judged, data) == {"accuracy": pytest.approx(expected)}
    assert not judged.training, "drop path would draw"


def test_recall_knows_the_captions_of_an_image(world: Path) -> None:
    rows = read_paired(world / "coco_retrieval.val.jsonl", DOWNSTREAM["retrieval"].target)
    count = len({row.target for row in rows})
    assert len(rows) == 2 * count

    class Known(torch.nn.Linear):
        """Images are right; so are texts but the first, which is taken for the last image."""

        def encode_image(self, images: list[str], **_: Any) -> Any:
            assert images == [row.image for row in rows[::2]]
            return torch.eye(count)

        def encode_text(self, texts: Any) -> Any:
            right = torch.eye(count).repeat_interleave(2, dim=0)
            right[0] = right[-1]
            return right

    processor = Processor(Tokenizer(world / "world.spm"), image_size=48)
    data = PairedData(rows, 4, processor, lambda batch, targets: batch)
    judged = Known(1, 1).train()
    found = DOWNSTREAM["retrieval"].score(judged, data)
    assert not judged.training, "drop path would draw"
    assert found["IR@1"] == pytest.approx(1 - 1 / len(rows))
    assert found["TR@1"] == 1.0


def test_recall_over_index_files_with_the_same_ids(world: Path, tmp_path: Path) -> None:
    """An image is its file: ids begin anew in each index, and an image may be in two of them."""
    held, more = world / "coco_retrieval.val.jsonl", world / "coco_retrieval.train.jsonl"
    entry = json.loads(held.read_text().splitlines()[0])
    again = {**entry, "image_id": 77, "image_path": str(world / "images/.." / entry["image_path"])}
    (tmp_path / "again.jsonl").write_text(json.dumps(again))
    target = DOWNSTREAM["retrieval"].target
    rows = [
        row for name in (held, more, tmp_path / "again.jsonl") for row in read_paired(name, target)
    ]
    images = list(dict.fromkeys(row.image for row in rows[:-1]))
    assert len({row.target for row in rows}) < len(images)

    class Known(torch.nn.Linear):
        def encode_image(self, given: list[str], **_: Any) -> Any:
            assert given == images
            return torch.eye(len(images))

        def encode_text(self, texts: Any) -> Any:
            return torch.eye(len(images))[[*(images.index(row.image) for row in rows[:-1]), 0]]

    processor = Processor(Tokenizer(world / "world.spm"), image_size=48)
    data = PairedData(rows, 4, processor, lambda batch, targets: batch)
    assert set(DOWNSTREAM["retrieval"].score(Known(1, 1), data).values()) == {1.0}


@needs_toml
def test_epochs_become_steps_and_images_are_few(world: Path) -> None:
    changes = (
        ("batch_size", "epochs = 2\nwarmup_epochs = 0.5\nbatch_size"),
        ("steps = 3", "accumulation = 2"),
        ("warmup_steps = 1\n", ""),
        ("[train]", "images = 3\n[train]"),
    )
    recipe = read_finetuning(write(world, "retrieval", changes))
    made, _ = recipe.make_model()
    data, held_out = recipe.make_data(made), recipe.make_held_out(made)
    options = recipe.options(data)
    rows = len(data.rows)
    assert (options.steps, options.warmup_steps) == (round(2 * rows / 8), round(rows / 16))
    assert (
        replace(recipe, data=replace(recipe.data, epochs=1e-6, warmup_epochs=0.0))
        .options(data)
        .steps
        == 1
    )
    assert held_out is not None
    assert len(held_out.rows) == 6
    assert len({row.image for row in held_out.rows}) == 3


@needs_toml
def test_images_that_are_trained_on_are_not_held_out(world: Path) -> None:
    both = ('"vqa.rest_val.jsonl"', '["vqa.rest_val.jsonl", "vqa.trainable_val.jsonl"]')
    trained_on = ('"vqa.train.jsonl"', '["vqa.train.jsonl", "vqa.trainable_val.jsonl"]')
    recipe = read_finetuning(write(world, "vqav2", (both, trained_on)))
    with pytest.raises(ConfigError, match=r"\[held_out\] must name images .* got .*png. in both"):
        recipe.make_held_out(recipe.make_model()[0])


@needs_toml
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("_vqav2", "_captioning", r"ends in _vqav2, _retrieval.*got 'beit3_tiny_patch16_32_captioning'"),
        ("[train]", "[loss]\nsmoothing = 0.1\n[train]", r"\[loss\] has no field 'smoothing'"),
        ("[held_out]", "[heldout]", r"expected sections .*'held_out'.*got 'heldout'"),
        ('index = "vqa.train', 'index = 3 # "', "index must be an index file"),
        ("batch_size = 4", "batch_size = 0", "batch_size must be a positive integer"),
        ("batch_size = 4", "epochs = -1", "epochs must be a number of at least 0"),
        ("batch_size = 4", "epochs = 0", "epochs must be above 0"),
        ("batch_size = 4", "epochs = 2\nwarmup_epochs = 2", "warmup_epochs must be below epochs, 2, got 2"),
        ("[train]", "images = 0\n[train]", "images must be a positive integer"),
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense(old: str, new: str, message: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_finetuning(write(world, "vqav2", ((old, new),)))


PRESETS = sorted((EXAMPLES / "recipes").glob("*.toml"))


@needs_toml
@pytest.mark.parametrize("path", PRESETS, ids=[path.stem for path in PRESETS])
def test_presets_have_the_published_numbers(path: Path) -> None:
    stage, size = path.stem.split("_")[0], path.stem.split("_")[-1]
    if stage == "pretrain":
        pretraining = read_recipe(path)
        options, batch = pretraining.train, sum(vars(pretraining.mix).values())
    elif stage == "tokenizer":
        distillation = read_tokenizer_recipe(path)
        options, batch = distillation.train, distillation.data.batch_size
    else:
        recipe = read_finetuning(path)
        options, batch = recipe.train, recipe.data.batch_size
    samples = batch * options.accumulation
    expected = {
        "pretrain": (6144, 1e-3, 1.0, 0.05),
        "contrastive": (16384, 3e-5, 0.95, 0.05),
        "tokenizer": (512, 2e-4, 1.0, 1e-4),
        "vqa": (128, {"base": 3e-5, "large": 2e-5}.get(size), 1.0, 0.01),
        "retrieval": (
            3072,
            5e-5 if size == "large" else 2e-4 if "coco" in path.stem else 1e-4,
            {"base": 0.65, "large": 0.85}.get(size),
            0.05,
        ),
    }[stage]
    assert (samples, options.lr, options.layer_decay, options.weight_decay) == expected


@needs_toml
def test_presets_there_are() -> None:
    stems = {path.stem for path in PRESETS}
    assert {f"pretrain_{size}" for size in ("base", "large", "giant")} <= stems
    assert "tokenizer_base" in stems
    for stage in ("contrastive", "vqa", "retrieval_coco", "retrieval_flickr30k"):
        assert {f"{stage}_base", f"{stage}_large"} <= stems
    own = read_finetuning(EXAMPLES / "recipes/vqa_base.toml")
    assert (own.train.head_lr_scale, own.train.clip_grad) == (20.0, math.inf)


@needs_toml
def test_the_stages_of_the_demonstration_fit() -> None:
    sizes = dict(read_recipe(EXAMPLES / "pretrain_world.toml").model)
    del sizes["name"], sizes["num_classes"]
    stages = {"contrastive_world": None, "finetune_world_vqa": "contrastive"}
    for name, before in {**stages, "finetune_world_retrieval": "contrastive"}.items():
        own = read_finetuning(EXAMPLES / f"{name}.toml")
        assert sizes.items() <= own.model.items()
        assert own.model.get("checkpoint") == (before and f"{before}/model.safetensors")
        assert own.held_out is not None
        assert "train" not in str(own.held_out.index)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_every_option_is_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--options"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "  clip_grad = 3.0\n" in said
    for field in fields(TrainOptions):
        assert f"  {field.name} = " in said
        assert f"``{field.name}``" in said
    for own in fields(VisualTokenizerConfig if "tokenizer" in command else BEiT3Config):
        assert f"  {own.name} = " in said
        assert "tokenizer" in command or f"``{own.name}``" in said
