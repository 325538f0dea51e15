"""From a teacher to pretraining on its codes, by the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _compat import import_torchscale, need_torchscale
from train_cases import config, model

from beit3_fast import cli
from beit3_fast.checkpoint import save_checkpoint
from beit3_fast.data.index_files import read_index
from beit3_fast.errors import ConfigError
from beit3_fast.model import BEiT3
from beit3_fast.train import read_log, read_recipe
from beit3_fast.train.teachers import TeacherOptions, backbone_teacher
from beit3_fast.train.tokenizer_recipe import read_tokenizer_recipe
from beit3_fast.train.visual_tokens import CodeFile, VisualTokens

EXAMPLE = Path(__file__).parents[2] / "examples/tokenizer_world.toml"

RECIPE = """
[model]
name = "vqkd_tiny"
img_size = 48
embed_dim = 32
num_heads = 2
num_codes = 16
[teacher]
checkpoint = "teacher.safetensors"
[data]
images = "imagenet.train.index.jsonl"
batch_size = 4
[held_out]
images = ["images/val"]
batch_size = 3
batches = 2
[augment]
flip = 0.5
[loss]
commitment = 0.5
[train]
steps = 3
lr = 1e-3
warmup_steps = 1
"""

PRETRAIN = """
[model]
name = "beit3_tiny_patch16_32_pretraining"
embed_dim = 32
num_heads = 2
img_size = 48
patch_size = 8
num_classes = 16
max_text_positions = 66
[data]
image = "imagenet.train.index.jsonl"
pair = "coco_retrieval.train.jsonl"
tokenizer = "world.spm"
[codes]
cache = "codes.safetensors"
[mix]
image = 2
pair = 2
[masking]
min_block = 4
[train]
steps = 2
"""

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")


@pytest.fixture(scope="module")
def begun(world: Path) -> Path:
    """A world with a teacher, a tokenizer that it taught, and codes by that."""
    save_checkpoint(model(world), world / "teacher.safetensors")
    (world / "tokenizer.toml").write_text(RECIPE)
    (world / "codes.toml").write_text(PRETRAIN)
    call = ["train-tokenizer", "--config", str(world / "tokenizer.toml"), "--quiet", "--json"]
    assert cli.main([*call, "--out", str(world / "tokenizer")]) == 0
    call = ["tokenize-images", str(world / "images"), "--quiet", "--json"]
    call += ["--checkpoint", str(world / "tokenizer/model.safetensors")]
    assert cli.main([*call, "--out", str(world / "codes.safetensors")]) == 0
    return world


@needs_toml
def test_images_of_a_recipe(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe names images, tokenizer and file; the command line goes before it."""
    recipe, tokenizer = begun / "codes.toml", begun / "tokenizer/model.safetensors"
    call = ["tokenize-images", "--config", str(recipe), "--quiet", "--json"]
    out = tmp_path / "codes.safetensors"
    own = read_recipe(recipe)
    assert own.codes.cache is not None
    assert cli.main([*call, "--checkpoint", str(tokenizer), "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    sources = own.data.under(begun)
    images = {
        row.image
        for kind in ("image", "pair")
        for path in sources[kind]
        for row in read_index(path, kind)
    }
    assert report["file"] == str(out)
    assert report["images"] == len(images)
    assert cli.main([*call, "--out", str(out)]) == 1
    assert (
        "expected --checkpoint ([codes] tokenizer), or a --config that names it"
        in capsys.readouterr().err
    )


@needs_toml
def test_training_by_command(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["train-tokenizer", "--config", str(begun / "tokenizer.toml"), "--quiet"]
    assert cli.main([*call, "--json", "--out", str(begun / "tokenizer")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["skipped"]) == (3, 0)
    assert report["held_out"].keys() == {"cosine", "mean_cosine", "used", "perplexity"}
    assert json.loads((begun / "tokenizer/report.json").read_text()) == report
    last = read_log(begun / "tokenizer")[-1]
    expected = last["reconstruction"] + 0.5 * last["commitment"]
    assert last["loss"] == pytest.approx(expected, rel=1e-5)
    assert cli.main([*call, "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("again: 3 steps, 0 skipped")
    assert said[1].startswith("held out: cosine to the teacher ")
    assert read_log(tmp_path / "again")[-1]["loss"] == last["loss"]


@needs_toml
def test_a_tokenizer_of_another_start_is_another_run(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, own = begun / "begun.toml", 'checkpoint = "tokenizer/model.safetensors"'
    recipe.write_text(RECIPE.replace("[teacher]", f"{own}\n[teacher]", 1))
    call = ["train-tokenizer", "--config", str(recipe), "--out", str(begun / "tokenizer")]
    assert cli.main([*call, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "of another [model] checkpoint (it has none, from scratch, now sha256 " in said


@needs_toml
def test_codes_by_command(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["tokenize-images", str(begun / "images"), "--quiet", "--out"]
    call += [str(begun / "codes.safetensors")]
    call += ["--checkpoint", str(begun / "tokenizer/model.safetensors")]
    assert cli.main(call) == 0
    images = len(CodeFile.load(begun / "codes.safetensors").images)
    said = capsys.readouterr().out
    assert f"codes of {images} images, 0 skipped; " in said
    assert said.endswith(f" of 16 codes used; {images} done before\n")


@needs_toml
def test_pretraining_on_codes(begun: Path, tmp_path: Path) -> None:
    live = PRETRAIN.replace("cache = ", "tokenizer = ").replace(
        "codes.safetensors", "tokenizer/model.safetensors"
    )
    (begun / "live.toml").write_text(live)
    both = PRETRAIN.replace("cache = ", 'tokenizer = "tokenizer/model.safetensors"\ncache = ')
    (begun / "both.toml").write_text(both)
    made = []
    for name in ("codes.toml", "live.toml", "both.toml"):
        recipe = read_recipe(begun / name)
        made.append(recipe.make_data(recipe.make_model(), tmp_path))
    assert not (tmp_path / "codes.safetensors").exists()
    assert isinstance(made[0].visual_tokens, CodeFile)
    assert isinstance(made[1].visual_tokens, VisualTokens)
    assert isinstance(made[2].visual_tokens, CodeFile), "the fastest, where a recipe names both"
    for number in range(3):
        assert torch.equal(made[0][number].codes, made[1][number].codes)
    assert made[0].identity == made[1].identity
    call = ["pretrain", "--config", str(begun / "codes.toml"), "--quiet", "--out"]
    assert cli.main([*call, str(tmp_path / "run")]) == 0
    assert len(read_log(tmp_path / "run")) == 2


@needs_toml
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_classes = 16", "num_classes = 17", "differ in their codes: 16 and 17"),
        ("img_size = 48", "img_size = 64", r"differ in their grid of patches: \(6, 6\) and"),
        ("cache =", 'tokenizer = "other.safetensors"\ncache =', "are not those of other.safet"),
    ],
)
def test_codes_that_do_not_fit(
    old: str, new: str, message: str, begun: Path, tmp_path: Path
) -> None:
    own = read_tokenizer_recipe(begun / "tokenizer.toml")
    other = own.make_tokenizer(own.make_teacher()).train()
    other(torch.randn(2, 3, 48, 48))
    save_checkpoint(other, begun / "other.safetensors")
    (begun / "other.toml").write_text(PRETRAIN.replace(old, new, 1))
    recipe = read_recipe(begun / "other.toml")
    with pytest.raises(ConfigError, match=message):
        recipe.make_data(recipe.make_model(), tmp_path)


@needs_toml
def test_codes_of_images_scaled_in_another_way(begun: Path, tmp_path: Path) -> None:
    codes = CodeFile.load(begun / "codes.safetensors")
    replace(codes, path=begun / "imagenet.safetensors", preset="imagenet").save()
    (begun / "imagenet.toml").write_text(PRETRAIN.replace("codes.safe", "imagenet.safe"))
    recipe = read_recipe(begun / "imagenet.toml")
    with pytest.raises(
        ConfigError, match=r"differ in their image preset: .*imagenet.* and .*square"
    ):
        recipe.make_data(recipe.make_model(), tmp_path)


@needs_toml
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[teacher]", "[professor]", r"expected sections \['model', 'teacher'"),
        ("num_codes", "codes", r"unknown fields \['codes'\] of a visual tokenizer"),
        ('checkpoint = "teacher', 'timm = "vit"\ncheckpoint = "no', "timm cannot make|not import"),
        ('checkpoint = "teacher.safetensors"', "", r"\[teacher\] a teacher is needed"),
        ('images = "imagenet', 'images = 3 # "', "must be a file, a folder or a list"),
        ('["images/val"]', '["images/train"]', "must name images .*, and 10 such images in all"),
        ("batch_size = 4", "batch_size = 0", "batch_size must be a positive integer"),
        ("batches = 2", "batches = 0", "batches must be an integer of at least 1, got 0"),
        ("commitment = 0.5", "commitment = -1", "commitment must be a number of at least 0"),
        ('[teacher]\ncheckpoint = "teacher.safetensors"', "", r"add a section \[teacher\]"),
    ],
)
def test_recipes_that_make_no_sense(old: str, new: str, message: str, begun: Path) -> None:
    (begun / "wrong.toml").write_text(RECIPE.replace(old, new, 1))

    def make() -> None:
        own = read_tokenizer_recipe(begun / "wrong.toml")
        teacher = own.make_teacher()
        tokenizer = own.make_tokenizer(teacher)
        own.make_data(tokenizer)
        own.make_held_out(tokenizer)
        own.make_objective(teacher)

    with pytest.raises(ConfigError, match=message):
        make()


@needs_toml
def test_the_example_can_be_read() -> None:
    own = read_tokenizer_recipe(EXAMPLE)
    assert own.model["name"] == "vqkd_tiny"
    assert own.train.steps > 0


def test_the_teachers_features(begun: Path) -> None:
    backbone = BEiT3(config(begun))
    backbone.load_state_dict(
        {n.removeprefix("beit3."): t for n, t in model(begun).state_dict().items() if "beit3." in n}
    )
    pictures = torch.rand(2, 3, 48, 48)
    teacher = backbone_teacher(begun / "teacher.safetensors")
    with torch.no_grad():
        rows = backbone.eval()(visual_tokens=pictures * 2 - 1)["encoder_out"][:, 1:]
    torch.testing.assert_close(teacher(pictures * 2 - 1), rows)
    save_checkpoint(backbone, begun / "imagenet.safetensors", preset="imagenet")
    other = backbone_teacher(begun / "imagenet.safetensors")
    mean, std = (torch.tensor(own)[:, None, None] for own in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        rows = backbone(visual_tokens=(pictures - mean) / std)["encoder_out"][:, 1:]
    torch.testing.assert_close(other(pictures * 2 - 1), rows, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_a_teacher_of_timm() -> None:
    need_torchscale()
    import_torchscale()  # Makes torchvision importable, which timm needs.
    timm: Any = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    teacher = TeacherOptions(timm="test_vit").make(Path())
    own = timm.create_model("test_vit").eval()
    own.load_state_dict(teacher.module.state_dict())
    pictures = torch.rand(1, 3, 160, 160)
    mean, std = (torch.tensor(own.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        rows = own.forward_features((pictures - mean) / std)[:, own.num_prefix_tokens :]
    torch.testing.assert_close(teacher(pictures * 2 - 1), rows, rtol=1e-4, atol=1e-4)
    assert teacher.identity.startswith("timm test_vit False ")
    with pytest.raises(ConfigError, match="timm cannot make 'nobody'"):
        TeacherOptions(timm="nobody").make(Path())
    with pytest.raises(ConfigError, match="has no rows for patches; take a vision transformer"):
        TeacherOptions(timm="test_resnet").make(Path())


def test_tokens_are_frozen(begun: Path) -> None:
    untaught = read_tokenizer_recipe(EXAMPLE).make_tokenizer(lambda _: torch.zeros(1, 3))  # type: ignore[arg-type]
    untaught.train()(torch.randn(2, 3, 48, 48))
    own = VisualTokens(untaught)
    assert not own.tokenizer.training
    assert own.identity == own.tokenizer.identity()
    assert own(torch.zeros(1, 3, 48, 48)).shape == (1, 9)
