"""bench/tune.py without a GPU: what it tries, what it refuses, and the file that it writes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip(
        "counts the steps of Triton's interpreter, which a GPU does not use",
        allow_module_level=True,
    )

from beit3_fast.kernels import _tiles, expert_linear
from beit3_fast.ops import triton_kernels
from bench import tune


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return ["--out", str(tmp_path / "tiles.json"), "--record", str(tmp_path / "tried.json")]


def read(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The written file as the kernels would read it."""
    path.rename(path.with_name("sm_77.json"))
    with monkeypatch.context() as patch:
        patch.setattr(_tiles, "FOLDER", path.parent)
        _tiles.read.cache_clear()
        content = _tiles.read("sm_77")
    _tiles.read.cache_clear()
    return content


@pytest.mark.parametrize("faster", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_faster_tile_is_written_and_a_slower_one_is_not(
    faster: bool, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton_cases")
    median = 1.5 if faster else 1.01
    monkeypatch.setattr(tune, "speed_ups", lambda *_: tune_quantiles(median))
    shipped = json.loads((_tiles.FOLDER / "interpreter.json").read_text())["tiles"]
    dry = ["--device", "cpu", "--dry-run", "--classes", "few rows", "fp32 backward"]
    assert tune.main([*dry, *files]) == 0
    content = read(tmp_path / "tiles.json", monkeypatch)
    for op, name in (("expert_linear", "few rows"), ("shared_attention", "fp32 backward")):
        assert (content[op][name] != shipped[op][name]) is faster
        shipped[op][name] = content[op][name]
    assert content == shipped, "other classes changed"
    tried = json.loads((tmp_path / "tried.json").read_text())
    assert set(tried) == {"expert_linear, few rows", "shared_attention, fp32 backward"}
    for trials in tried.values():
        assert trials
        assert all(trial["speed_up"] == pytest.approx(median) for trial in trials)


def tune_quantiles(median: float) -> Any:
    from beit3_fast.timing import Quantiles

    return Quantiles(median, median, median)


def test_a_tile_that_is_wrong_or_does_not_run_is_not_timed() -> None:
    shipped = expert_linear.Tile(16, 16, 16, 1, 4, 1)
    wrong, broken = shipped._replace(block_m=32), shipped._replace(block_m=64)

    def call(tile: expert_linear.Tile) -> list[torch.Tensor]:
        if tile == broken:
            raise RuntimeError("planted: out of shared memory")
        y = torch.ones(8, 8)
        y[3] += 1e-3 * (tile == wrong)
        return [y]

    for tile, words in ((wrong, "differs by"), (broken, "shared memory")):
        trial = tune.attempt([call], shipped, tile, "cpu", tune.DRY_EFFORT)
        assert trial.speed_up is None
        assert words in trial.reason
    right = tune.attempt([call], shipped, shipped._replace(group_m=2), "cpu", tune.DRY_EFFORT)
    assert right.speed_up is not None


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", tune.SPACE)
def test_the_space_holds_tiles_that_an_architecture_can_run(op: str, name: str) -> None:
    module = import_module(f"beit3_fast.kernels.{op}")
    for shape_class in _tiles.CLASSES[op]:
        shipped = _tiles.choose(module.Tile, op, shape_class, name)
        found = list(tune.candidates(op, shape_class, shipped, False, name))
        assert 20 <= len(found) <= 500
        assert len(set(found)) == len(found)
        assert shipped not in found
        assert not any(_tiles.misfit(tile._asdict(), name, shape_class) for tile in found)
        if op == "expert_linear":
            assert any(tile.tma for tile in found) is (name == "sm_90")


def test_every_class_has_shapes() -> None:
    assert set(tune.LINEAR) == set(_tiles.CLASSES["expert_linear"])
    assert set(tune.ATTENTION) == set(_tiles.CLASSES["shared_attention"])


@pytest.mark.parametrize("name", _tiles.ARCHITECTURES)
def test_the_shipped_files_are_written_as_they_are(name: str) -> None:
    text = (_tiles.FOLDER / f"{name}.json").read_text()
    assert tune.written(json.loads(text)) == text


@pytest.mark.parametrize(
    "arguments", [[], ["--device", "cpu"], ["--device", "cpu", "--dry-run"], ["--classes", "huge"]]
)
def test_wrong_usage_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert "error:" in capsys.readouterr().err


def test_a_dry_run_needs_the_interpreter(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_kernels.reset()
    with pytest.raises(SystemExit):
        tune.main(["--device", "cpu", "--dry-run", *files])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
