"""All that an hour on a GPU should give, one step after the other, in one folder to commit.

    python -m bench.gpu                          # make gpu
    python -m bench.gpu --only races             # steps whose name holds a word
    python -m bench.gpu --budget 590             # begins no step that could last longer than what is left
    python -m bench.gpu --device cpu --dry-run   # the same steps in small, in the interpreter
    python -m bench.gpu --summary DIR            # the report of such a folder again, without a GPU

First that every kernel is right, by its check and the short tests; then what is measured, each step once those passed
that it names, in this run or in an earlier one by its record; then the long matrices, races and the sanitizer. A step
leaves its output in DIR/STEP.log and its outcome in DIR/steps.json, and is not repeated once it passed with the sources,
the GPU and the torch of now: a run that was stopped goes on where it stopped. DIR is bench/results/DATE-GPU; --out names
that of an earlier day. report.md, report.png and report.json at its top sum up what there is.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch

from bench import gpu_record
from bench.gpu_record import Record
from bench.gpu_steps import Step, steps
from bench.gpu_summary import summarize

ROOT = Path(__file__).resolve().parent.parent
# Of a budget, for the report.
_SUMMARY_S = 20
# Of all logs together; reports and pictures have the rest of 16 MiB.
LOGS_BYTES = 12 << 20


def run_step(step: Step, out: Path, log_bytes: int) -> dict[str, Any]:
    """Runs one step; its outcome is "passed", "failed", "out of time" or "not there: PROGRAM"."""
    if shutil.which(step.command[0]) is None:
        return {"outcome": f"not there: {step.command[0]}", "seconds": 0.0}
    log, start = out / f"{step.name}.log", time.monotonic()
    with log.open("wb") as file:
        outcome = _outcome_of(step, file)
    _shorten(log, log_bytes)
    return {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def _outcome_of(step: Step, log: IO[bytes]) -> str:
    # A group of its own, so that children can be ended, too, which would stay on the GPU; not a session of its own, which
    # would outlive the one of whoever ends this process.
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=dict(os.environ, **step.environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,
    )
    try:
        return "failed" if process.wait(step.limit_s) else "passed"
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        # One that is stuck in the driver cannot be ended.
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if isinstance(error, subprocess.TimeoutExpired):
            return "out of time"
        raise


def _shorten(log: Path, most: int) -> None:
    """Leaves beginning and end of a long log, and no path of this machine in any."""
    text = log.read_bytes().replace(str(ROOT).encode(), b".")
    gap = b"\n...\n"
    if len(text) > most:
        half = (most - len(gap)) // 2
        text = text[:half] + gap + text[-half:]
    log.write_bytes(text)


def run_all(
    plan: list[Step],
    out: Path,
    only: str = "",
    device: str = "cpu",
    budget_s: float = math.inf,
) -> int:
    """Runs the steps whose name holds `only` and that have not passed yet; 1 where one of them did not pass.

    ``budget_s``: a step begins only if its limit ends within so many seconds from now.
    """
    end = time.monotonic() + budget_s - _SUMMARY_S
    out.mkdir(parents=True, exist_ok=True)
    path = out / "steps.json"
    record, trouble = gpu_record.read(path)
    if trouble:
        print(f"== {trouble}", flush=True)
    now = {step.name: _digest(step, device) for step in plan}
    for name in [name for name in record if record[name].get("sources") != now.get(name)]:
        if name in now and record[name]["outcome"] == "passed":
            print(f"== {name}: passed with other sources, does not count", flush=True)
        del record[name]
    chosen = [step for step in plan if only in step.name]
    for step in chosen:
        if _outcome(record, step.name) == "passed":
            print(f"== {step.name}: passed before", flush=True)
            continue
        missing = [
            f"{name} ({why})" for name in step.needs if (why := _outcome(record, name)) != "passed"
        ]
        if missing:
            result = {"outcome": f"waits for {', '.join(missing)}", "seconds": 0.0}
        elif step.limit_s > end - time.monotonic():
            print(f"== {step.name}: no time left for {step.limit_s:.0f} s", flush=True)
            continue
        else:
            print(f"== {step.name}: {shlex.join(step.command)}", flush=True)
            result = run_step(step, out, LOGS_BYTES // len(plan))
        record[step.name] = {**result, "sources": now[step.name]}
        print(f"== {step.name}: {result['outcome']} ({result['seconds']:.0f} s)", flush=True)
        gpu_record.write(path, record)
    print("\n".join(f"== {note}" for note in summarize(out, record, device)), flush=True)
    return 0 if all(_outcome(record, step.name) == "passed" for step in chosen) else 1


def _outcome(record: Record, name: str) -> str:
    outcome: str = record.get(name, {}).get("outcome", "not run")
    return outcome


def _digest(step: Step, device: str) -> str:
    gpu = torch.cuda.get_device_name() if device == "cuda" else device
    # The folder of results may be moved; what is run does not change by that.
    command = [word for word in step.command if not Path(word).is_absolute()]
    facts = [gpu, str(torch.__version__), *command, *map(str, step.environment.items())]
    return gpu_record.digest(ROOT, step.sources, facts)


def default_folder(device: str) -> Path:
    """Where the results go: a folder to commit for a GPU, one that git ignores for a dry run."""
    if device != "cuda":
        return ROOT / "bench" / "out" / "gpu"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "bench" / "results" / f"{datetime.now(timezone.utc):%Y-%m-%d}-{name}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a step did not pass."""
    parser = argparse.ArgumentParser(description="Parity, races and benchmark on a GPU.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dry-run", action="store_true", help="every step in small")
    parser.add_argument("--only", default="", help="steps whose name holds this")
    parser.add_argument("--out", type=Path, help="default: bench/results/DATE-GPU")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="in all")
    parser.add_argument("--summary", type=Path, metavar="DIR", help="only write DIR's report again")
    options = parser.parse_args(arguments)
    if options.summary is not None:
        return _summarize_again(options.summary, parser)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --dry-run goes through the steps")
    out = (options.out or default_folder(options.device)).resolve()
    plan = steps(options.device, options.dry_run, out)
    if not any(options.only in step.name for step in plan):
        names = ", ".join(step.name for step in plan)
        parser.error(f"no step's name holds {options.only!r}; there are: {names}")
    # Ended from outside, it ends its step, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run_all(plan, out, options.only, options.device, options.budget)


def _summarize_again(out: Path, parser: argparse.ArgumentParser) -> int:
    if not (out / "steps.json").is_file():
        parser.error(f"{out} has no steps.json")
    record, trouble = gpu_record.read(out / "steps.json")
    if trouble:
        parser.error(trouble)
    print("\n".join(f"== {note}" for note in summarize(out, record, "cpu")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
