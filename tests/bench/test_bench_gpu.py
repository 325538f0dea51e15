"""`make gpu` without a GPU: its steps, what stops the benchmark, and how it goes on."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_record
from bench import report as reports
from bench.gpu_steps import (
    Step,
)
from bench.gpu_summary import summarize

ROOT = gpu.ROOT


@pytest.fixture(autouse=True)
def few_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of one source file; steps run where it lies."""
    root = tmp_path / "tree"
    (root / "beit3_fast").mkdir(parents=True)
    (root / "beit3_fast" / "kernel.py").write_text("1")
    monkeypatch.setattr(gpu, "ROOT", root)
    return root


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def step(name: str, code: str, *needs: str, limit_s: float = 60) -> Step:
    return Step(name, (sys.executable, "-c", code), needs, limit_s)


def outcomes(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "steps.json").read_text())
    return {name: own["outcome"] for name, own in record["steps"].items()}


def test_nothing_is_measured_where_parity_failed_and_a_passed_step_is_not_repeated(
    tmp_path: Path, out: Path
) -> None:
    once = f"open({str(tmp_path / 'once')!r}, 'x')"
    mended = tmp_path / "mended"
    races = f"import os, sys; print('seen'); sys.exit(not os.path.exists({str(mended)!r}))"
    plan = [
        step("parity", once),
        step("races", races),
        Step("memcheck", ("no-such-program",)),
        step("bench", "print('measured')", "parity", "races"),
    ]
    assert gpu.run_all(plan, out) == 1
    found = outcomes(out)
    assert found["parity"] == "passed"
    assert found["races"] == "failed"
    assert found["memcheck"] == "not there: no-such-program"
    assert found["bench"] == "waits for races (failed)"
    assert "seen" in (out / "races.log").read_text()
    mended.touch()
    gpu.run_all(plan, out)
    assert outcomes(out) | {"memcheck": ""} == {
        "parity": "passed",
        "races": "passed",
        "memcheck": "",
        "bench": "passed",
    }


@pytest.mark.parametrize("parity", [None, "failed", "out of time"])
def test_only_judges_earlier_steps_by_the_record(parity: str | None, out: Path) -> None:
    code = "import sys; sys.exit(1)" if parity == "failed" else "pass"
    plan = [step("parity", code), step("bench", "print('measured')", "parity")]
    if parity:
        gpu.run_all(plan, out, "parity")
    if parity == "out of time":
        content = json.loads((out / "steps.json").read_text())
        content["steps"]["parity"]["outcome"] = parity
        (out / "steps.json").write_text(json.dumps(content))
    assert gpu.run_all(plan, out, "bench") == 1
    assert outcomes(out)["bench"] == f"waits for parity ({parity or 'not run'})"
    assert not (out / "bench.log").exists()


def test_a_step_waits_for_those_alone_that_it_names(out: Path) -> None:
    plan = [step("parity", "pass"), step("a", "1 / 0", "parity"), step("b", "pass", "parity")]
    assert gpu.run_all(plan, out) == 1
    assert outcomes(out) == {"parity": "passed", "a": "failed", "b": "passed"}
    assert gpu.run_all(plan, out, "b") == 0


def test_no_step_begins_that_could_outlast_the_budget(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [step("long", "pass", limit_s=500), step("short", "pass", limit_s=5)]
    assert gpu.run_all(plan, out, budget_s=100) == 1
    assert outcomes(out) == {"short": "passed"}
    assert "long: no time left for 500 s" in capsys.readouterr().out
    assert gpu.run_all(plan, out) == 0


def test_a_changed_source_runs_a_step_again(
    out: Path, few_sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [step("parity", "pass"), step("bench", "pass", "parity")]
    assert gpu.run_all(plan, out) == 0
    capsys.readouterr()
    assert gpu.run_all(plan, out) == 0
    assert capsys.readouterr().out.count("passed before") == 2
    (few_sources / "beit3_fast" / "kernel.py").write_text("2")
    assert gpu.run_all(plan, out, "bench") == 1
    assert outcomes(out)["bench"] == "waits for parity (not run)"
    assert gpu.run_all(plan, out) == 0
    assert "other sources" in capsys.readouterr().out


def test_sources_are_code_and_not_results(few_sources: Path) -> None:
    folders = ("beit3_fast", "bench")
    first = gpu_record.digest(few_sources, folders, ())
    (few_sources / "bench" / "results").mkdir(parents=True)
    (few_sources / "bench" / "results" / "report.json").write_text("{}")
    (few_sources / "beit3_fast" / "_build.json").write_text("{}")
    assert gpu_record.digest(few_sources, folders, ()) == first
    assert gpu_record.digest(few_sources, folders, ("another GPU",)) != first
    (few_sources / "bench" / "run.py").write_text("")
    assert gpu_record.digest(few_sources, folders, ()) != first


@pytest.mark.parametrize("text", ['{"schema": 1, "ste', "[]", '{"schema": 1, "steps": {"a": {}}}'])
def test_a_damaged_record_is_said_and_put_aside(
    text: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    (out / "steps.json").write_text(text)
    assert gpu.run_all([step("parity", "pass")], out) == 0
    assert "steps.json cannot be read" in capsys.readouterr().out
    assert (out / "steps.json.damaged").read_text() == text
    assert outcomes(out) == {"parity": "passed"}


def test_a_record_that_is_cut_off_while_written_leaves_the_old_one(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir()
    old = {"a": {"outcome": "passed"}}
    gpu_record.write(out / "steps.json", old)

    def cut_off(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_record.os, "fsync", cut_off)
    with pytest.raises(KeyboardInterrupt):
        gpu_record.write(out / "steps.json", {})
    assert gpu_record.read(out / "steps.json") == (old, "")


def test_all_logs_together_stay_below_their_limit_and_name_no_folder(
    out: Path, few_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LOGS_BYTES", 30_000)
    code = "import os; print('first', os.getcwd()); print('x' * 90_000); print('last')"
    plan = [step(str(number), code) for number in range(3)]
    assert gpu.run_all(plan, out) == 0
    logs = [path.read_text() for path in out.glob("*.log")]
    assert sum(map(len, logs)) <= 30_000
    for text in logs:
        assert text.startswith("first .\n")
        assert text.endswith("last\n")
        assert str(few_sources) not in text


def test_a_step_that_takes_too_long_is_stopped_with_its_children(
    out: Path,
) -> None:
    out.mkdir()
    # The child keeps the lock as long as it lives.
    held = (
        f"import fcntl, subprocess; file = open({str(out / 'held')!r}, 'w'); "
        "fcntl.flock(file, fcntl.LOCK_EX); "
        "subprocess.run(['sleep', '30'], pass_fds=[file.fileno()])"
    )
    found = gpu.run_step(step("slow", held, limit_s=2), out, 1000)
    assert found["outcome"] == "out of time"
    before = time.monotonic()
    with (out / "held").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - before < 10


def test_ended_from_outside_it_ends_its_step(out: Path) -> None:
    """And the step has no session of its own, which whoever ends a session would not reach."""
    code = (
        "import os, time; print(os.getsid(0) == os.getsid(os.getppid()), os.getpid(), flush=True); "
        "time.sleep(60)"
    )
    program = (
        "import signal, sys; from pathlib import Path; from bench import gpu; "
        "from bench.gpu_steps import Step; out = Path(sys.argv[1]); "
        f"gpu.steps = lambda *_: [Step('slow', (sys.executable, '-c', {code!r}))]; "
        "gpu.main(['--device', 'cpu', '--out', str(out)])"
    )
    log = out / "slow.log"
    with subprocess.Popen([sys.executable, "-c", program, str(out)], cwd=ROOT) as process:
        before = time.monotonic()
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() - before < 60
            time.sleep(0.1)
        process.terminate()
    same, number = log.read_text().split()
    assert same == "True"
    with pytest.raises(ProcessLookupError):
        os.kill(int(number), 0)


def test_results_of_a_gpu_go_where_they_are_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (SXM)")
    found = gpu.default_folder("cuda").relative_to(gpu.ROOT).as_posix()
    assert re.fullmatch(r"bench/results/\d{4}-\d\d-\d\d-nvidia-h200-sxm", found)
    assert gpu.default_folder("cpu").relative_to(gpu.ROOT).as_posix() == "bench/out/gpu"


@pytest.fixture
def finished(out: Path) -> Path:
    """What the steps of a small run leave."""
    row = {
        "workload": "image/tiny/32",
        "runtime": "beit3_fast",
        "impl": "cuda",
        "dtype": "bfloat16",
    }
    row |= {"device": "cuda", "batch": 1, "latency_ms": 2.0, "floor_ms": 1.5}
    row |= {"samples_per_s": {"p20": 1.0, "p50": 1.0, "p80": 1.0}, "peak_memory_mib": None}
    row |= {"ceiling_fraction": 0.75}
    row["parity"] = {"max_abs": 0.0, "rel_rms": 0.0, "baseline_rel_rms": 0.0, "passed": True}
    for place, rate in enumerate((600.0, 700.0, 900.0)):
        report = {"schema": 1, "passed": True, "environment": {"gpu": "a GPU"}, "results": [row]}
        ceilings = {"matmul_tflops": {"bfloat16": rate}, "copy_gbps": 4000.0}
        folder = out / f"bench-{place}"
        folder.mkdir(parents=True)
        report |= {"ceilings": ceilings, "ratios": [], "skipped": []}
        (folder / "report.json").write_text(json.dumps(report))
    figures = [
        {"what": "9 tokens", "runtime": "cuda", "ms": 0.5, "tflops": 250.0},
        {"what": "9 tokens", "runtime": "xformers", "ms": None, "tflops": None, "reason": "absent"},
    ]
    content = {"figure": "attention", "rows": figures}
    (out / "figures-attention.json").write_text(json.dumps(content))
    found = {"step_ms": 1.25, "floor_ms": 0.5, "of_floor": 2.5}
    (out / "bench-decode-step-auto-1.log").write_text(f"a warning\n{json.dumps(found)}\n")
    return out


def test_the_summary_holds_what_passed(finished: Path) -> None:
    names = ("bench-0", "bench-1", "figures-attention", "bench-decode-step-auto-1")
    record = {name: {"outcome": "passed", "seconds": 1.0} for name in names}
    record["bench-2"] = {"outcome": "failed", "seconds": 1.0}
    summarize(finished, record, "cpu")
    report = reports.load(finished / "report.json")
    assert len(report["results"]) == 2
    assert report["ceilings"]["matmul_tflops"] == {"bfloat16": 700.0}
    text = (finished / "report.md").read_text()
    for line in (
        "| attention | 9 tokens | cuda | 0.5 | 250.0 |  |",
        "| attention | 9 tokens | xformers | - | - | absent |",
        "| bench-decode-step-auto-1 | 1.25 | 0.5 | 2.5 |",
        "| bench-2 | failed | 1.0 |",
    ):
        assert line in text
    pytest.importorskip("matplotlib")
    assert (finished / "report.png").stat().st_size > 1000


def test_a_report_is_written_again_without_a_gpu(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--summary", str(finished)])
    assert "has no steps.json" in capsys.readouterr().err
    gpu_record.write(finished / "steps.json", {"bench-0": {"outcome": "passed", "seconds": 1.0}})
    assert gpu.main(["--summary", str(finished)]) == 0
    assert len(reports.load(finished / "report.json")["results"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_dry_run_passes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(gpu, "ROOT", ROOT)
    assert gpu.main(["--device", "cpu", "--dry-run", "--out", str(out)]) == 0
    assert reports.load(out / "report.json")["figures"]
    assert (out / "report.png").is_file()


def test_a_word_that_no_step_holds_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--dry-run", "--only", "speeed"])
    assert "no step's name holds 'speeed'" in capsys.readouterr().err
