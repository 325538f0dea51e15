"""Every released file, at reduced width, into every model that it is for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    BASE,
    CLASSES,
    LARGE,
    OFFICIAL,
    SHAPES,
    SMALL_BASE,
    SMALL_LARGE,
    TASKS,
    Size,
    Standin,
    branch_of,
    layout,
    same,
    torch_file,
    weights,
)

from beit3_fast.checkpoint import HEADS, CheckpointMismatch, load_checkpoint

SMALL = {"base": SMALL_BASE, "large": SMALL_LARGE}
FULL = {"base": BASE, "large": LARGE}
COUNTS = {
    ("backbone", "base", 224): 220_987_392,
    ("backbone", "large", 224): 672_702_464,
    ("pretrain", "base", 224): 276_510_730,
    ("pretrain", "large", 224): 746_709_514,
    ("itc", "base", 224): 222_167_041,
    ("itc", "large", 224): 674_799_617,
    ("vqav2", "base", 480): 228_110_649,
    ("vqav2", "large", 480): 682_985_529,
    ("vqav2", "large", 768): 684_423_225,
    ("nlvr2", "base", 224): 225_719_810,
    ("nlvr2", "large", 224): 681_109_506,
    ("captioning", "base", 480): 270_751_754,
    ("captioning", "large", 480): 739_033_610,
    ("retrieval", "base", 384): 222_458_881,
    ("retrieval", "large", 384): 675_188_737,
}


def grid_of(pixels: int) -> tuple[int, int]:
    return pixels // 16, pixels // 16


def model_for(task: str, size: Size, pixels: int) -> Standin:
    return Standin(layout(task, size, grid_of(pixels), 5), grid_size=grid_of(pixels))


def backbone(names: object) -> set[str]:
    return {n for n in names if n.startswith("beit3.")}  # type: ignore[attr-defined]


def test_there_are_29_files() -> None:
    assert len(OFFICIAL) == 29


@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_the_layout_has_the_published_number_of_parameters(case: tuple[str, str, int]) -> None:
    kind, size, pixels = case
    shapes = layout(kind, FULL[size], grid_of(pixels))
    assert sum(math.prod(shape) for shape in shapes.values()) == COUNTS[case]
    tensors = 40 * FULL[size].layers + (7 if kind == "vqav2" else 11)
    assert len(backbone(shapes)) == tensors


@pytest.mark.parametrize("file", OFFICIAL)
def test_a_file_loads_strictly_into_its_own_task(file: str, tmp_path: Path) -> None:
    kind, size_name, pixels = OFFICIAL[file]
    size = SMALL[size_name]
    state = weights(layout(kind, size, grid_of(pixels), 5))
    path = torch_file(tmp_path / file, {"model": state})
    task = {"pretrain": "captioning", "itc": "retrieval"}.get(kind, kind)
    model = model_for(task, size, pixels)
    report = load_checkpoint(model, path)
    foreign = {"mim_head.weight", "mim_head.bias"} if kind == "pretrain" else set()
    assert set(report.dropped) == foreign
    assert not report.problems()
    assert same(model.state_dict(), {n: t for n, t in state.items() if n not in foreign})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["pretrain", "itc"])
def test_fine_tuning_starts_from_a_file_without_the_head(
    kind: str, task: str, tmp_path: Path
) -> None:
    state = weights(layout(kind, SMALL_BASE, (14, 14)))
    path = torch_file(tmp_path / "x.pth", {"model": state})
    model = model_for(task, SMALL_BASE, 224)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = load_checkpoint(model, path, allow_missing=HEADS)
    after = model.state_dict()
    own_head = set(after) - backbone(after)
    assert set(report.missing) == own_head - set(state)
    assert set(report.dropped) == set(state) - set(after)
    assert same({n: after[n] for n in report.loaded}, {n: state[n] for n in report.loaded})
    assert same({n: after[n] for n in report.missing}, {n: before[n] for n in report.missing})
    if report.missing:
        with pytest.raises(CheckpointMismatch, match="allow_missing=HEADS") as caught:
            load_checkpoint(model_for(task, SMALL_BASE, 224), path)
        assert set(caught.value.report.missing) == own_head - set(state)


@pytest.mark.parametrize("source", TASKS)
@pytest.mark.parametrize("target", TASKS)
def test_a_file_of_another_task_is_refused_and_named(
    source: str, target: str, tmp_path: Path
) -> None:
    state = weights(layout(source, SMALL_BASE, (2, 2), 5))
    path = torch_file(tmp_path / "x.pth", {"model": state})
    model = Standin(layout(target, SMALL_BASE, (2, 2), 5))
    if source == target:
        load_checkpoint(model, path)
        return
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(model, path)
    assert set(caught.value.report.missing) == set(model.state_dict()) - set(state)


@pytest.mark.parametrize("branch", ["vision", "text"])
@pytest.mark.parametrize("kind", ["pretrain", "itc", "retrieval", "imageclassification"])
def test_one_branch_leaves_the_other_in_the_file(branch: str, kind: str, tmp_path: Path) -> None:
    shapes = layout(kind, SMALL_BASE, (14, 14))
    state = weights(shapes)
    path = torch_file(tmp_path / "x.pth", {"model": state})
    model = Standin(branch_of(shapes, branch))
    report = load_checkpoint(model, path)
    assert not report.problems()
    expected = {n: state[f"beit3.{n}"] for n in model.state_dict()}
    assert same(model.state_dict(), expected)
    other = {"vision": "text", "text": "vision"}[branch]
    reasons = set(report.dropped.values())
    assert f"the model has no {other} branch" in reasons
    assert f"the model has no {branch} branch" not in reasons


def test_a_large_file_in_a_base_model_is_told_by_its_size(tmp_path: Path) -> None:
    path = torch_file(
        tmp_path / "x.pth", {"model": weights(layout("nlvr2", SMALL_LARGE, (2, 2), 5))}
    )
    model = Standin(layout("nlvr2", SMALL_BASE, (2, 2), 5))
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(model, path)
    message, report = str(caught.value), caught.value.report
    assert "3 layers, width 12" in message
    assert "2 layers, width 8" in message
    assert "model of another size" in message
    assert len(report.unexpected) == 40
    # of the head's last layer only the bias has as many numbers in both
    assert set(report.mismatched) == set(model.state_dict()) - {"head.dense2.bias"}


def test_another_number_of_classes_is_an_explicit_choice(tmp_path: Path) -> None:
    state = weights(layout("vqav2", SMALL_BASE, (2, 2), 7))
    path = torch_file(tmp_path / "x.pth", {"model": state})
    model = Standin(layout("vqav2", SMALL_BASE, (2, 2), 5))
    with pytest.raises(CheckpointMismatch, match="allow_mismatched=HEADS") as caught:
        load_checkpoint(model, path)
    assert caught.value.report.mismatched == {
        "head.3.weight": ((7, 16), (5, 16)),
        "head.3.bias": ((7,), (5,)),
    }
    kept = model.state_dict()["head.3.weight"].clone()
    report = load_checkpoint(model, path, allow_mismatched="head")
    assert set(report.mismatched) == {"head.3.weight", "head.3.bias"}
    assert torch.equal(model.state_dict()["head.3.weight"], kept)
    assert torch.equal(model.state_dict()["head.0.weight"], state["head.0.weight"])


def test_a_file_of_the_official_fine_tuning_loads(tmp_path: Path) -> None:
    state = weights(SHAPES)
    namespace = argparse.Namespace(model="beit3_base_patch16_384", lr=5e-4, opt_betas=[0.9, 0.999])
    content = {
        "model": state,
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": 0.1}],
        },
        "epoch": 4,
        "scaler": {"scale": 65536.0},
        "args": namespace,
        "model_ema": {n: t + 1 for n, t in state.items()},
    }
    for legacy in (False, True):
        path = torch_file(
            tmp_path / f"{legacy}.pth", content, _use_new_zipfile_serialization=not legacy
        )
        model = Standin(SHAPES)
        report = load_checkpoint(model, path)
        assert same(model.state_dict(), state)
        assert "left in the file: optimizer, epoch, scaler, args, model_ema" in report.remarks
        load_checkpoint(model, path, key="model_ema")
        assert torch.equal(model.state_dict()["logit_scale"], state["logit_scale"] + 1)


@pytest.mark.parametrize("name", ["x.pth", "x.zip", "x.bin", "x", "beit3 größe.pt"])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_the_name_of_a_file_does_not_matter(name: str, form: str, tmp_path: Path) -> None:
    state = weights(layout("itc", SMALL_BASE, (2, 2)))
    path = torch_file(
        tmp_path / name, {"model": state}, _use_new_zipfile_serialization=form == "zip"
    )
    model = Standin(SHAPES)
    load_checkpoint(model, str(path))
    assert same(model.state_dict(), state)


TINY = Size(2, 64, 128, vocab=100)


@pytest.mark.parametrize("task", [*TASKS, None])
def test_our_models_have_the_official_names_and_shapes(task: str | None) -> None:
    import beit3_fast

    name = "beit3_tiny_patch16_32" + (f"_{task}" if task else "")
    shapes = {n: tuple(t.shape) for n, t in beit3_fast.create_model(name).state_dict().items()}
    expected = layout(task or "backbone", TINY, (2, 2), CLASSES.get(task or ""))
    if task is None:
        expected = {n.removeprefix("beit3."): shape for n, shape in expected.items()}
    assert shapes == expected


def test_our_model_takes_an_official_file_at_another_image_size(tmp_path: Path) -> None:
    import beit3_fast

    state = weights(layout("itc", TINY, (2, 2)))
    path = torch_file(tmp_path / "beit3_tiny_itc.pth", {"model": state})
    model = beit3_fast.create_model(
        "beit3_tiny_patch16_32_retrieval", checkpoint=path, img_size=(64, 48), dtype="bfloat16"
    )
    table = model.state_dict()["beit3.encoder.embed_positions.A.weight"]
    assert table.shape == (4 * 3 + 3, 64)
    assert torch.equal(table[:3], state["beit3.encoder.embed_positions.A.weight"][:3].bfloat16())
    assert torch.equal(model.logit_scale, state["logit_scale"].bfloat16())
    for branch, gone in (("vision", ".B."), ("text", ".A.")):
        alone = beit3_fast.create_model(
            "beit3_tiny_patch16_32", checkpoint=path, modalities=(branch,)
        )
        assert not any(gone in name for name in alone.state_dict())
        assert all(torch.equal(t, state[f"beit3.{n}"]) for n, t in alone.state_dict().items())
