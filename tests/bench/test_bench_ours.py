"""The benchmark with the real runtime: parity of every task, and the script as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from built import CPU, get

from bench.baselines import OURS, REFERENCE, RUNTIMES
from bench.measure import Case, check_parity
from bench.workloads import TASKS, parse_workload

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_is_in_parity_on_every_task(task: str, dtype: str) -> None:
    case = Case(parse_workload(f"{task}/tiny/32"), dtype, 4)
    ours = check_parity(case, [OURS], get, CPU)[OURS]
    assert ours.passed, ours.reason


def test_reported_implementation_is_that_of_the_two_ops() -> None:
    workload = parse_workload("image/tiny/32")
    model = get(OURS, workload, "float32")
    impls = set(RUNTIMES[OURS].impl(model).split("/"))
    assert impls <= {"cpu", "composite"}
    assert RUNTIMES[f"{OURS}-reference"].impl(get(f"{OURS}-reference", workload, "float32")) == (
        "reference"
    )


def test_the_script_runs_as_a_user_starts_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "bench" / "run.py"),
        "--quick",
        "--threads",
        "1",
        "--json",
    ]
    command += ["--workloads", "image/tiny/32", "--dtypes", "bf16", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    by_name = {row["runtime"]: row for row in report["results"]}
    assert set(by_name) == {OURS, REFERENCE}
    for row in by_name.values():
        assert row["parity"]["passed"]
        assert row["samples_per_s"]["p50"] > 0
        assert row["peak_memory_mib"] is not None
    assert report["ratios"][0]["against"] == REFERENCE
    assert (tmp_path / "out" / "report.png").is_file()
