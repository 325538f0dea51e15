"""The benchmark as a user runs it, with stand-ins on the tiny model: gate, contract, options, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from built import CPU, get
from torch import nn

from beit3_fast.parity import Parity
from beit3_fast.timing import Effort
from bench import environment, measure, run
from bench.baselines import OURS, REFERENCE, RUNTIMES, Runtime
from bench.measure import Case, check_parity
from bench.workloads import TASKS, Workload, parse_workload

Change = Callable[[nn.Module], None]


def stand_in(change: Change = lambda model: None, **fields: Any) -> Runtime:
    """torchscale under another name, its weights changed by `change`."""

    def build(workload: Workload, weights: Any, dtype: torch.dtype, device: torch.device) -> Any:
        model = RUNTIMES[REFERENCE].build(workload, weights, dtype, device)
        with torch.no_grad():
            change(model)
        return model

    return Runtime("a stand-in", build, lambda model: "stand-in", **fields)


@pytest.fixture(autouse=True)
def quick_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No subprocesses, no seconds of measuring, one thread."""
    monkeypatch.setattr(measure, "measure_peak", lambda probe: 10.0 + len(probe.runtime))
    monkeypatch.setattr("bench.ceilings.MATMUL_SHAPES", ((64, 32, 48),))
    monkeypatch.setattr("bench.ceilings._COPY_BYTES", 1 << 16)
    for pace in run.EFFORTS:
        monkeypatch.setitem(run.EFFORTS, pace, Effort(0, 3, 0.0))
    monkeypatch.setattr(run, "physical_cores", torch.get_num_threads)
    monkeypatch.setitem(RUNTIMES, OURS, stand_in())


def bench(tmp_path: Path, *arguments: str) -> tuple[int, Path]:
    out = tmp_path / "out"
    return run.main(["--out", str(out), *arguments]), out


ONE = ("--workloads", "pair/tiny/32", "--dtypes", "bf16", "fp32", "--batch", "2")


def test_report_follows_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = bench(tmp_path, *ONE)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert report["schema"] == 1
    assert {"cpu", "cores", "threads", "isa", "torch", "git", "date"} <= report[
        "environment"
    ].keys()
    assert set(report["ceilings"]["matmul_tflops"]) == {"bfloat16", "float32"}
    assert report["ceilings"]["copy_gbps"] > 0
    assert [(r["runtime"], r["dtype"]) for r in report["results"]] == [
        (OURS, "bfloat16"),
        (REFERENCE, "bfloat16"),
        (OURS, "float32"),
        (REFERENCE, "float32"),
    ]
    for row in report["results"]:
        assert row["workload"] == "pair/tiny/32"
        assert row["impl"] == ("stand-in" if row["runtime"] == OURS else "eager")
        assert (row["device"], row["batch"], row["rounds"]) == ("cpu", 2, 3)
        speed = row["samples_per_s"]
        assert 0 < speed["p20"] <= speed["p50"] <= speed["p80"]
        assert row["latency_ms"] == pytest.approx(2e3 / speed["p50"], rel=0.5)
        assert row["peak_memory_mib"] == 10.0 + len(row["runtime"])
        assert row["ceiling_fraction"] > 0
        assert row["parity"]["passed"] is True
        assert row["parity"]["max_abs"] >= 0
        half = row["dtype"] == "bfloat16"
        assert (row["parity"]["rel_rms"] > 1e-4) is half
        assert (row["parity"]["baseline_rel_rms"] > 1e-4) is half
    assert [(r["workload"], r["dtype"], r["batch"], r["against"]) for r in report["ratios"]] == [
        ("pair/tiny/32", "bfloat16", 2, REFERENCE),
        ("pair/tiny/32", "float32", 2, REFERENCE),
    ]
    assert all(r["p20"] <= r["median"] <= r["p80"] for r in report["ratios"])
    named = {row["runtime"]: row["reason"] for row in report["skipped"]}
    others = {"timm", "openvino", "openvino-int8", "onnxruntime", "torchscale-compiled"}
    assert set(named) == others
    assert all(named.values())
    shown = capsys.readouterr()
    for word in ("pair/tiny/32", "x as fast", "of ceiling", "timm", "TFLOP/s"):
        assert word in shown.out
    assert "parity of pair/tiny/32, bfloat16, batch 2" in shown.err


def test_files_are_written_and_hold_the_same_table(tmp_path: Path) -> None:
    _, out = bench(tmp_path, *ONE)
    assert {p.name for p in out.iterdir()} == {"report.json", "report.md", "report.png"}
    text = (out / "report.md").read_text()
    for word in (
        "every row is in parity",
        "| pair/tiny/32 | bfloat16 | 2 |",
        "hashed to token ids",
    ):
        assert word in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "report.png").stat().st_size > 20_000
    for path in (out / "report.json", out / "report.md"):
        assert str(Path.cwd()) not in path.read_text()
        assert str(tmp_path) not in path.read_text()


def swap_experts(model: nn.Module) -> None:
    ffn = getattr(model, "beit3", model).encoder.layers[1].ffn
    ffn.A, ffn.B = ffn.B, ffn.A


def poison(model: nn.Module) -> None:
    getattr(model, "beit3", model).encoder.layers[1].ffn.A.fc2.bias[3] = float("nan")


def slightly_off(model: nn.Module) -> None:
    getattr(model, "beit3", model).encoder.layer_norm.A.weight.mul_(1.05)


@pytest.mark.parametrize("change", [swap_experts, poison, slightly_off])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_wrong_runtime_is_found_and_nothing_is_timed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    dtype: str,
) -> None:
    monkeypatch.setitem(RUNTIMES, OURS, stand_in(change))
    monkeypatch.setattr(measure, "timed_rounds", lambda *a, **k: pytest.fail("timed"))
    monkeypatch.setattr(measure, "measure_peak", lambda *a: pytest.fail("measured"))
    code, out = bench(tmp_path, *ONE[:2], "--dtypes", dtype, "--batch", "2")
    assert code == 1
    shown = capsys.readouterr()
    assert f"{OURS} is NOT in parity" in shown.err
    assert "NOT IN PARITY" in shown.out
    assert "x as fast" not in shown.out
    report = json.loads((out / "report.json").read_text())
    assert report["passed"] is False
    assert report["ratios"] == []
    assert all(row["samples_per_s"] is None for row in report["results"])
    verdicts = {row["runtime"]: row["parity"]["passed"] for row in report["results"]}
    assert verdicts == {OURS: False, REFERENCE: True}
    assert "NOT IN PARITY" in (out / "report.md").read_text()
    assert not (out / "report.png").exists()


def test_one_wrong_case_takes_the_speed_of_all(tmp_path: Path, monkeypatch: Any) -> None:
    def only_fp32(model: nn.Module) -> None:
        if next(model.parameters()).dtype == torch.float32:
            swap_experts(model)

    monkeypatch.setitem(RUNTIMES, OURS, stand_in(only_fp32))
    code, out = bench(tmp_path, *ONE)
    report = json.loads((out / "report.json").read_text())
    assert code == 1
    passed = [row["parity"]["passed"] for row in report["results"]]
    assert passed == [True, True, False, True]
    assert all(row["samples_per_s"] is None for row in report["results"])


def test_json_prints_the_report_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = bench(tmp_path, *ONE, "--json")
    shown = capsys.readouterr()
    assert code == 0
    assert shown.err == ""
    assert json.loads(shown.out) == json.loads((out / "report.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "walk/base/224"], "unknown workload 'walk/base/224'; expected"),
        (["--runtimes", "tensorrt"], "unknown runtime 'tensorrt'; there are: beit3_fast"),
        (["--dtypes", "int4"], "unknown dtype 'int4'; there are: float32"),
        (["--device", "tpu"], "unknown device 'tpu'; there are: cpu, cuda"),
        (["--batch", "0"], "--batch takes positive numbers, got 0"),
        (["--threads", "0"], "--threads takes a positive number, got 0"),
        (["--threads", "100000"], "on this machine, got 100000"),
        (["--compare", "nowhere.json"], "cannot be read as a benchmark report"),
    ],
)
def test_wrong_options_say_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out = bench(tmp_path, *arguments)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_too_large_a_batch_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path, *ONE, "--batch", "99999999999")[0] == 2
    assert "lower --batch" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_is_found_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run", None)
    (tmp_path / "file").write_text("")
    assert run.main([*ONE, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "--out must be a folder that can be written" in capsys.readouterr().err


def test_output_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert bench(tmp_path, *ONE)[0] == 2
    assert "--out must be a folder" in capsys.readouterr().err


def test_without_torchscale_nothing_can_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "torchscale_obstacle", lambda: "not installed")
    assert bench(tmp_path, *ONE)[0] == 2
    assert "torchscale, which is not installed" in capsys.readouterr().err


def test_runtime_that_cannot_run_is_a_named_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shy = stand_in(obstacle=lambda *_: "needs a bigger boat")
    monkeypatch.setitem(RUNTIMES, "shy", shy)
    code, out = bench(tmp_path, *ONE, "--runtimes", OURS, "shy")
    assert code == 0
    assert "shy: needs a bigger boat" in capsys.readouterr().out
    assert "needs a bigger boat" in (out / "report.md").read_text()


def test_comparison_with_an_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out = bench(tmp_path, *ONE)
    old = json.loads((out / "report.json").read_text())
    for row in old["results"]:
        row["samples_per_s"]["p50"] = 0.5
    old["environment"]["cpu"] = "an abacus"
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    capsys.readouterr()
    code, out = bench(tmp_path, *ONE[:3], "bf16", "--batch", "2", "--compare", str(path))
    shown = capsys.readouterr().out
    assert code == 0
    assert "other cpu: an abacus then" in shown
    assert f"{OURS} samples/s" in shown
    assert "ratio to torchscale" in shown
    assert "## Compared with an earlier run" in (out / "report.md").read_text()


def test_quick_is_base_models_and_measures_memory_in_bfloat16_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for ability in ("multiplies_bfloat16", "has_matrix_units"):
        monkeypatch.setattr(run, ability, lambda device: True)
    options = run._parser().parse_args(["--quick"])
    plan = run._plan(options)
    names = {case.workload.name for case in plan.cases}
    assert names == {"image/base/224", "pair/base/224", "vqa/base/480"}
    assert {case.batch for case in plan.cases} == {8}
    assert {c.dtype for c in plan.cases if plan.memory(c)} == {"bfloat16"}
    both = {c.dtype for c in plan.cases if c.workload.task_name == "pair"}
    assert both == {"bfloat16", "float32"}
    full = run._plan(run._parser().parse_args(["--full"]))
    assert {"train/base/224", "image/large/224"} <= {c.workload.name for c in full.cases}
    assert {case.batch for case in full.cases} == {8, 2, 1}
    assert {c.workload.task_name for c in full.cases if c.batch == 2} == {"pretrain"}
    usual = run._plan(run._parser().parse_args([]))
    assert {c.workload.name for c in usual.cases} > names
    assert {case.batch for case in usual.cases} == {8, 1}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_task_is_judged_and_swapped_experts_show(
    monkeypatch: pytest.MonkeyPatch, task: str, dtype: str
) -> None:
    case = Case(parse_workload(f"{task}/tiny/32"), dtype, 4)
    assert check_parity(case, [OURS], get, CPU)[OURS].passed
    monkeypatch.setitem(RUNTIMES, OURS, stand_in(swap_experts))
    assert not check_parity(case, [OURS], get, CPU)[OURS].passed


def test_a_missing_output_is_not_in_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze(model: nn.Module) -> None:
        getattr(model, "fc_norm").weight.requires_grad_(False)  # noqa: B009

    monkeypatch.setitem(RUNTIMES, OURS, stand_in(freeze))
    case = Case(parse_workload("train/tiny/32"), "float32", 2)
    verdict: Parity = check_parity(case, [OURS], get, CPU)[OURS]
    assert not verdict.passed
    assert "fc_norm.weight" in verdict.reason


@pytest.mark.parametrize(
    ("flags", "multiplies"),
    [
        ("avx2 fma", False),
        ("avx512f avx512bw avx512vl avx512dq avx512_vnni", False),
        ("avx512f avx512bw avx512vl avx512dq avx512_bf16", True),
        ("amx_tile amx_bf16", True),
        ("asimd bf16", True),
    ],
)
def test_bfloat16_products_are_those_of_the_cpu_not_emulated_ones(
    monkeypatch: pytest.MonkeyPatch, flags: str, multiplies: bool
) -> None:
    monkeypatch.setattr(environment, "_flags", lambda: set(flags.split()))
    assert environment.multiplies_bfloat16(CPU) == multiplies


def test_a_cpu_without_bfloat16_products_is_measured_in_float32(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dtypes(*arguments: str) -> set[str]:
        return {case.dtype for case in run._plan(run._parser().parse_args(arguments)).cases}

    monkeypatch.setattr(run, "multiplies_bfloat16", lambda device: True)
    assert dtypes("--quick") == {"bfloat16", "float32"}
    monkeypatch.setattr(run, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(run, "has_matrix_units", lambda device: False)
    assert dtypes("--quick") == {"float32"}
    plan = run._plan(run._parser().parse_args(["--quick"]))
    assert all(plan.memory(case) for case in plan.cases)
    assert {case.workload.name for case in plan.cases} == {"image/base/224", "pair/base/224"}
    assert "--dtypes bf16 measures it" in capsys.readouterr().err
    assert dtypes("--quick", "--dtypes", "bf16") == {"bfloat16"}


def test_quick_leaves_out_what_takes_long_without_matrix_units(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(*arguments: str) -> set[str]:
        return {case.workload.name for case in run._plan(run._parser().parse_args(arguments)).cases}

    monkeypatch.setattr(run, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(environment, "_flags", lambda: {"avx512f", "avx512_bf16"})
    assert names("--quick") == {"image/base/224", "pair/base/224"}
    assert "leaves out vqa/base/480; --workloads measures it" in capsys.readouterr().err
    assert names("--quick", "--workloads", "vqa/base/480") == {"vqa/base/480"}
    assert "vqa/base/480" in names()
    monkeypatch.setattr(environment, "_flags", lambda: {"amx_tile", "amx_bf16"})
    assert "vqa/base/480" in names("--quick")
