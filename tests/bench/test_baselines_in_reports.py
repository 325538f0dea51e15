"""The runtimes of others in a benchmark's report, and those that are installed in parity."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from built import CPU, Uncompiled, get
from torch import nn

from beit3_fast.timing import Effort
from bench import measure, run
from bench.baselines import OURS, REFERENCE, RUNTIMES
from bench.conversion import load_torchscale, use_sdpa
from bench.measure import Case, check_parity
from bench.runtime import Runtime
from bench.workloads import TASKS, Workload, parse_workload

INFERENCE = [name for name, task in TASKS.items() if not task.train]
OTHERS = ("torchscale-compiled", "timm", "openvino", "openvino-int8", "onnxruntime")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, no seconds of measuring, no processes for the memory."""
    monkeypatch.setattr(measure, "measure_peak", lambda probe: 1.0)
    monkeypatch.setattr("bench.ceilings.MATMUL_SHAPES", ((64, 32, 48),))
    monkeypatch.setattr("bench.ceilings._COPY_BYTES", 1 << 16)
    for pace in run.EFFORTS:
        monkeypatch.setitem(run.EFFORTS, pace, Effort(0, 3, 0.0))
    monkeypatch.setattr(run, "physical_cores", torch.get_num_threads)


def other(change: Callable[[nn.Module], None] = lambda model: None) -> Runtime:
    def build(workload: Workload, weights: Any, dtype: torch.dtype, device: torch.device) -> Any:
        model = load_torchscale(workload, weights, dtype, device)
        with torch.no_grad():
            change(model)
        return Uncompiled(workload, use_sdpa(model))

    return Runtime("somebody's", build, lambda model: "-", costly=True, gate=False)


def bench(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    case = ("--workloads", "image/tiny/32", "--dtypes", "fp32", "--batch", "2")
    code = run.main(["--out", str(tmp_path / "out"), *case, *arguments])
    text = (tmp_path / "out" / "report.md").read_text()
    return code, json.loads((tmp_path / "out" / "report.json").read_text()), text


def reasons(report: dict[str, Any]) -> dict[str, str]:
    return {row["runtime"]: row["reason"] for row in report["skipped"]}


@pytest.mark.usefixtures("quick")
def test_costly_runtimes_run_only_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIMES, "other", other())
    code, report, _ = bench(tmp_path)
    assert code == 0
    assert "--full, or if named by --runtimes" in reasons(report)["other"]
    assert "torchscale-compiled" in reasons(report)
    code, report, text = bench(tmp_path, "--runtimes", OURS, "other")
    assert code == 0
    assert reasons(report) == {}
    row = report["results"][-1]
    assert (row["runtime"], row["parity"]["passed"]) == ("other", True)
    assert row["samples_per_s"]["p50"] > 0
    assert row["peak_memory_mib"] is None
    assert report["ratios"][0]["against"] == "other"
    assert "- other: somebody's" in text


@pytest.mark.usefixtures("quick")
def test_a_baseline_out_of_parity_is_shown_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        RUNTIMES,
        "other",
        other(lambda m: getattr(m, "encoder").layer_norm.A.weight.mul_(1.05)),  # noqa: B009
    )
    code, report, text = bench(tmp_path, "--runtimes", OURS, "other")
    assert code == 0
    assert report["passed"] is True
    row = report["results"][-1]
    assert row["parity"]["passed"] is False
    assert row["parity"]["rel_rms"] == pytest.approx(0.05, rel=0.1)
    assert row["samples_per_s"]["p50"] > 0
    assert "NOT IN PARITY" in text
    assert "every row is in parity but those marked" in text
    assert "other on image/tiny/32, float32, batch 2: encoder_out: largest error" in text
    assert (tmp_path / "out" / "report.png").is_file()


@pytest.mark.usefixtures("quick")
def test_a_baseline_that_fails_is_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: nn.Module) -> None:
        raise RuntimeError("no kernel for this\nat /opt/some/where.cpp:12")

    def fail_in_a_file(model: nn.Module) -> None:
        raise OSError("cannot write /opt/some/where.onnx today")

    monkeypatch.setitem(RUNTIMES, "one", other(fail))
    monkeypatch.setitem(RUNTIMES, "two", other(fail_in_a_file))
    code, report, text = bench(tmp_path, "--runtimes", OURS, "one", "two")
    assert code == 0
    assert reasons(report) == {
        "one": "failed: RuntimeError: no kernel for this",
        "two": "failed: OSError: cannot write ... today",
    }
    assert "no kernel for this" in text
    monkeypatch.setattr(measure, "available_memory", lambda: 1)
    _, report, _ = bench(tmp_path, "--runtimes", OURS, "one")
    assert "GiB of free memory" in reasons(report)["one"]


@pytest.mark.usefixtures("quick")
def test_bare_products_are_a_ceiling_of_the_same_rounds(tmp_path: Path) -> None:
    _, report, text = bench(tmp_path)
    (ceiling,) = report["ceilings"]["onednn_products"]
    assert (ceiling["workload"], ceiling["dtype"], ceiling["batch"]) == (
        "image/tiny/32",
        "float32",
        2,
    )
    assert ceiling["samples_per_s"]["p50"] > 0
    assert ceiling["tflops"] > 0
    assert report["ceilings"]["tile_loop_tflops"]["float32"] > 0
    assert "our tile loop alone float32" in text
    assert {row["runtime"] for row in report["results"]} == {OURS, REFERENCE}
    assert all(row["onednn_fraction"] > 0 for row in report["results"])
    assert "of oneDNN" in text
    assert "oneDNN's products alone: image/tiny/32 float32 batch 2" in text


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["openvino", "openvino-int8", "onnxruntime"])
@pytest.mark.parametrize("task", INFERENCE)
def test_the_real_library_is_in_parity(name: str, task: str) -> None:
    packages = {"openvino-int8": "nncf"}
    if find_spec(packages.get(name, name)) is None:
        pytest.skip(f"{name} is not installed")
    case = Case(parse_workload(f"{task}/tiny/32"), "float32", 4)
    verdict = check_parity(case, [name], get, CPU)[name]
    if name == "openvino-int8":
        # Two narrow layers of random weights leave 8 bits a larger error than a real model does.
        assert verdict.rel_rms < 0.3
    else:
        assert verdict.passed, verdict.reason


def test_the_compiled_training_baseline_is_for_training_alone() -> None:
    runtime = RUNTIMES["torchscale-compiled-training"]
    for name, reason in (("image/tiny/32", "runs training only"), ("train/tiny/32", None)):
        found = runtime.obstacle(parse_workload(name), torch.float32, CPU)
        assert found == reason
    assert not runtime.gate


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_compiled_training_baseline_is_in_parity() -> None:
    case = Case(parse_workload("train/tiny/32"), "float32", 2)
    name = "torchscale-compiled-training"
    verdict = check_parity(case, [name], get, CPU)[name]
    assert verdict.passed, verdict.reason
