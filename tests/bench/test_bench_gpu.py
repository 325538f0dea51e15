"""`make gpu` without a GPU: its steps, what stops the benchmark, and how it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu


def step(name: str, code: str, needs_all: bool = False) -> gpu.Step:
    return gpu.Step(name, (sys.executable, "-c", code), needs_all)


def outcomes(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "steps.json").read_text())
    return {name: own["outcome"] for name, own in record.items()}


def test_nothing_is_measured_where_parity_failed_and_a_passed_step_is_not_repeated(
    tmp_path: Path,
) -> None:
    once = f"open({str(tmp_path / 'once')!r}, 'x')"
    mended = tmp_path / "mended"
    plan = [
        step("parity", once),
        step(
            "races", f"import os, sys; print('seen'); sys.exit(not os.path.exists({str(mended)!r}))"
        ),
        gpu.Step("memcheck", ("no-such-program",)),
        step("bench", "print('measured')", needs_all=True),
    ]
    assert gpu.run_all(plan, tmp_path) == 1
    found = outcomes(tmp_path)
    assert found["parity"] == "passed"
    assert found["races"] == "failed"
    assert found["memcheck"] == "not there: no-such-program"
    assert found["bench"] == "waits for races"
    assert "seen" in (tmp_path / "races.log").read_text()
    mended.touch()
    gpu.run_all(plan, tmp_path)
    assert outcomes(tmp_path) | {"memcheck": ""} == {
        "parity": "passed",
        "races": "passed",
        "memcheck": "",
        "bench": "passed",
    }


def test_a_step_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LIMIT_S", 1)
    assert gpu.run_step(step("slow", "import time; time.sleep(60)"), tmp_path)["outcome"] == (
        "out of time"
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_file_of_the_plan_is_there(device: str, tmp_path: Path) -> None:
    plan = gpu.steps(device, device == "cpu", tmp_path)
    for own in plan:
        for word in own.command:
            if word.startswith(("tests/", "bench/")):
                assert (gpu.ROOT / word).is_file(), word
    assert [own.needs_all for own in plan] == sorted(own.needs_all for own in plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_dry_run_passes(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert gpu.main(["--device", "cpu", "--dry-run", "--out", str(tmp_path)]) == 0
