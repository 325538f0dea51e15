"""Benchmark of beit3_fast: ``python bench/run.py`` needs no arguments.

Parity comes first: a run with a result of this package or of torchscale out of parity shows no speed and exits with 1. A
runtime that somebody else converts or compiles is shown all the same, its error marked. Then every runtime
is timed on the same inputs, in turn, and the peak memory of each is measured in a process of its own. The table goes
to the screen; report.json, report.md and report.png go to the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    # Run as a script, Python looks for modules in bench/ and not in the folder above it.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from beit3_fast.errors import Beit3FastError, ConfigError  # noqa: E402
from beit3_fast.timing import Effort  # noqa: E402
from bench import report as reports  # noqa: E402
from bench import workloads  # noqa: E402
from bench.baselines import parse_runtimes, torchscale_obstacle  # noqa: E402
from bench.environment import (  # noqa: E402
    available_memory,
    has_matrix_units,
    multiplies_bfloat16,
    physical_cores,
)
from bench.measure import Case, Plan, Progress, run, steps_of  # noqa: E402

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
EFFORTS = {
    # Parity has just run the same models on the same inputs; a second warm-up would cost a minute.
    "quick": Effort(warmup=0, rounds=3, seconds=5.0),
    "default": Effort(warmup=2, rounds=7, seconds=10.0),
    "full": Effort(warmup=2, rounds=11, seconds=30.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a result that must be in parity is not; 2 for a wrong option or a missing package."""
    options = _parser().parse_args(arguments)
    try:
        plan = _plan(options)
        old = reports.load(options.compare) if options.compare else None
        missing = torchscale_obstacle()
        if missing:
            raise ConfigError(f"parity is judged against torchscale, which is {missing}")
        _check_out(options.out)
        progress = Progress(steps_of(plan), quiet=options.json)
        report = run(plan, progress)
        notes = reports.write(report, options.out, old)
    except MemoryError:
        print("bench: there is not enough memory for these inputs; lower --batch", file=sys.stderr)
        return 2
    except Beit3FastError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report, indent=1, allow_nan=False))
        return 0 if report["passed"] else 1
    print(reports.text(report))
    if old is not None:
        print("\ncompared with an earlier run:\n" + "\n".join(reports.comparison(report, old)))
    print("\n".join(f"{note} (in {_shown(options.out)})" for note in notes))
    if not report["passed"]:
        print("bench: not in parity, so no speed is shown; the reasons are above", file=sys.stderr)
        return 1
    return 0


def _shown(path: Path) -> Path:
    """Relative to the working folder where that is shorter, so that reports can be quoted as they are."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"tasks:\n{reports.about_workloads()}\n\nruntimes:\n{reports.about_runtimes()}",
    )
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--quick", action="store_true", help="base models only, under 3 minutes")
    pace.add_argument(
        "--full",
        action="store_true",
        help="also training, large models, and runtimes that take minutes to convert",
    )
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda if there is one")
    parser.add_argument(
        "--workloads", nargs="+", metavar="T/S/R", help="task/size/resolution, e.g. vqa/base/480"
    )
    parser.add_argument("--dtypes", nargs="+", metavar="D", help=f"of {', '.join(DTYPES)}")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        metavar="R",
        help="see below; without this option those that take minutes to convert run with --full only",
    )
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="batch sizes")
    parser.add_argument("--threads", type=int, help="CPU threads; default: the physical cores")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "out", help="output folder (bench/out)"
    )
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier report.json")
    parser.add_argument("--json", action="store_true", help="only the report, as JSON, on stdout")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    """Raises ConfigError, saying what there is, for anything unknown."""
    pace = "quick" if options.quick else "full" if options.full else "default"
    chosen = {"quick": workloads.QUICK, "default": workloads.DEFAULT, "full": workloads.FULL}[pace]
    names = dict.fromkeys(options.workloads or chosen)
    dtypes = [_dtype(name) for name in options.dtypes or ()]
    batches = list(dict.fromkeys(options.batch or ()))
    if batches and min(batches) < 1:
        raise ConfigError(f"--batch takes positive numbers, got {min(batches)}")
    threads = options.threads if options.threads is not None else physical_cores()
    if threads < 1:
        raise ConfigError(f"--threads takes a positive number, got {threads}")
    if threads > (os.cpu_count() or threads):
        raise ConfigError(
            f"--threads takes at most {os.cpu_count()} on this machine, got {threads}"
        )
    device = _device(options.device)
    if not dtypes and not multiplies_bfloat16(device):
        print(
            "bench: this CPU has no bfloat16 products, so float32 is measured; --dtypes bf16 measures it "
            "all the same, in several times the time",
            file=sys.stderr,
        )
        dtypes = ["float32"]
    if options.quick and not options.workloads and not has_matrix_units(device):
        # What is meant for bfloat16 alone takes more than half of three minutes there, and float32 longer.
        long = [name for name in names if "float32" not in chosen[name].dtypes]
        print(
            f"bench: this CPU has no AMX, so --quick leaves out {', '.join(long)}; --workloads measures it",
            file=sys.stderr,
        )
        names = {name: None for name in names if name not in long}
    cases = tuple(
        Case(workloads.parse_workload(name), dtype, batch)
        for name in names
        for dtype in dict.fromkeys(dtypes or chosen.get(name, workloads.Variants()).dtypes)
        for batch in batches or chosen.get(name, workloads.Variants()).batches
    )
    # Each measurement of memory is a process of its own; the dtype that people run is enough for the quick one.
    lowest = "float32" if all(case.dtype == "float32" for case in cases) else "bfloat16"
    costly = options.full or bool(options.runtimes)
    return Plan(
        cases=cases,
        runtimes=tuple(parse_runtimes(options.runtimes)),
        device=device,
        threads=threads,
        effort=EFFORTS[pace],
        memory=lambda case: not options.quick or case.dtype == lowest,
        costly=costly,
        ceiling_seconds=0.1 if options.quick else 0.25,
        # A model's packed weights and its activations need about as much again. What converted runtimes
        # hold is counted, and to convert again takes minutes.
        cache_bytes=available_memory() // (2 if costly else 5),
    )


def _check_out(folder: Path) -> None:
    """Minutes of measuring must not end in a folder that cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out must be a folder, but {folder} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out must be a folder that can be written, but {folder} cannot: {error.strerror}"
        ) from error


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; there are: {', '.join(DTYPES)}")
    return DTYPES[name]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}; there are: cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for, but PyTorch finds no CUDA device here")
    return torch.device(name)


if __name__ == "__main__":
    raise SystemExit(main())
