"""The report: a table for the screen, report.json by the contract, report.md and report.png."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from beit3_fast.errors import InputError
from bench.baselines import OURS, RUNTIMES
from bench.peers import is_rounded, more_exact_peers, verdict
from bench.peers import table as peer_table
from bench.tasks import TASKS

Report = dict[str, Any]
_RESULT_KEYS = {
    "workload",
    "runtime",
    "impl",
    "dtype",
    "device",
    "batch",
    "samples_per_s",
    "latency_ms",
    "peak_memory_mib",
    "ceiling_fraction",
    "parity",
}
_PARITY_KEYS = {"max_abs", "rel_rms", "baseline_rel_rms", "passed"}
_RATIO_KEYS = {"workload", "dtype", "batch", "against", "median"}
_HEADER = (
    "workload",
    "dtype",
    "batch",
    "runtime",
    "samples/s",
    "p20-p80",
    "ms",
    "floor ms",
    f"{OURS} is",
    "memory MiB",
    "of ceiling",
    "of oneDNN",
    "of tile loop",
    "error",
    "torchscale's",
)
_RIGHT = {
    "batch",
    "samples/s",
    "p20-p80",
    "ms",
    "floor ms",
    "memory MiB",
    "of ceiling",
    "of oneDNN",
    "of tile loop",
    "error",
    "its error",
    "torchscale's",
}


def check(report: Any, where: str = "the report") -> Report:
    """The report itself, if it follows the contract. Raises InputError, naming what is missing."""
    if not isinstance(report, dict) or report.get("schema") != 1:
        raise InputError(f'{where} is not a benchmark report: expected an object with "schema": 1')
    for key, kind in (
        ("environment", dict),
        ("ceilings", dict),
        ("results", list),
        ("ratios", list),
    ):
        if not isinstance(report.get(key), kind):
            raise InputError(f"{where} has no {key!r} of the type {kind.__name__}")
    for row in report["results"]:
        _require(row, _RESULT_KEYS, f"a result of {where}")
        _require(row["parity"], _PARITY_KEYS, f"a parity of {where}")
        if row["samples_per_s"] is not None:
            _require(row["samples_per_s"], {"p20", "p50", "p80"}, f"a speed of {where}")
    for row in report["ratios"]:
        _require(row, _RATIO_KEYS, f"a ratio of {where}")
    for row in report.get("peer_ratios", []):
        _require(row, _RATIO_KEYS | {"runtime"}, f"a ratio of 8 bits of {where}")
    return report


def _require(row: Any, keys: set[str], where: str) -> None:
    missing = keys - row.keys() if isinstance(row, dict) else keys
    if missing:
        raise InputError(f"{where} lacks {', '.join(sorted(missing))}")


def load(path: Path) -> Report:
    """A report.json of an earlier run. Raises InputError for a file that is none."""
    try:
        return check(json.loads(path.read_text()), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as a benchmark report: {error}") from None


def write(report: Report, out: Path, old: Report | None = None) -> list[str]:
    """Writes report.json, report.md and report.png into `out`; returns lines about what was written."""
    check(report)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (out / "report.md").write_text(markdown(report, old))
    written = ["report.json", "report.md"]
    picture = out / "report.png"
    picture.unlink(missing_ok=True)
    try:
        from bench.chart import draw

        if draw(report, picture):
            written.append("report.png")
    except Exception as error:
        return [f"wrote {', '.join(written)}; no report.png: {error}"]
    return [f"wrote {', '.join(written)}"]


def rows(report: Report) -> list[list[str]]:
    """The table, first row the header. Rows without parity and runtimes that did not run say so."""
    ratio = {
        (r["workload"], r["dtype"], r["batch"], r["against"]): r["median"] for r in report["ratios"]
    }
    table = [list(_HEADER)]
    for row in report["results"]:
        case = (row["workload"], row["dtype"], row["batch"])
        speed, parity = row["samples_per_s"], row["parity"]
        faster = ratio.get((*case, row["runtime"]))
        impl = "" if row["impl"] in ("-", "") else f" ({row['impl']})"
        line = [row["workload"], row["dtype"], str(row["batch"]), row["runtime"] + impl]
        if speed is None:
            why = "not timed" if parity["passed"] else "NOT IN PARITY"
            line += [why, "", "", "", "", ""]
        else:
            line += [
                _number(speed["p50"]),
                f"{_number(speed['p20'])}-{_number(speed['p80'])}",
                _number(row["latency_ms"]),
                # Reports of earlier versions have no such figure, nor those of oneDNN and the tile loop below.
                _number(row.get("floor_ms")),
                "" if faster is None else f"{faster:.2f}x as fast",
                _number(row["peak_memory_mib"]),
            ]
        for key in ("ceiling_fraction", "onednn_fraction", "tile_loop_fraction"):
            fraction = row.get(key)
            line.append("-" if fraction is None else f"{fraction:.0%}")
        error = _error(parity["rel_rms"])
        if speed is not None and not parity["passed"]:
            error += " NOT IN PARITY"
        if better := more_exact_peers(row, report):
            error += f" OVER {', '.join(better)}"
        line += [error, _error(parity["baseline_rel_rms"])]
        table.append(line)
    for reason, names in _skipped(report).items():
        table.append(["-", "-", "-", ", ".join(names), reason] + [""] * (len(_HEADER) - 5))
    return table


def text(report: Report) -> str:
    """The table for the screen and the ceilings below it."""
    lines = rows(report)
    plain = [line for line in lines if line[0] != "-"]
    shown = [*_aligned(plain), ""]
    peers = peer_table(report)
    if len(peers) > 1:
        shown += ["8 bits against 8 bits, in the same rounds:", *_aligned(peers), ""]
    shown += [f"{line[3]}: {line[4]}" for line in lines if line[0] == "-"]
    shown.append(_ceilings(report))
    shown.append(
        "error: relative rms against torchscale in fp32; beside it, what torchscale's own dtype costs."
    )
    if any(map(is_rounded, report["results"])):
        shown.append(f"parity: {verdict(report)}.")
    return "\n".join(shown)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width, first row the header, an empty line between two workloads, dtypes or batches."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    shown: list[str] = []
    previous: Sequence[str] = ()
    for line in table:
        if previous and line[:3] != previous[:3]:
            shown.append("")
        cells = [
            cell.rjust(w) if name in _RIGHT else cell.ljust(w)
            for name, cell, w in zip(table[0], line, widths, strict=True)
        ]
        shown.append("  ".join(cells).rstrip())
        previous = line
    return shown


def markdown(report: Report, old: Report | None = None) -> str:
    """report.md: the verdict, the environment, the table, what the workloads are, a comparison."""
    environment = report["environment"]
    parity = verdict(report) if report.get("passed") else "**NOT IN PARITY: no speeds**"
    lines = [
        "# beit3_fast benchmark",
        "",
        f"{environment.get('date', '')}, commit {environment.get('git', 'unknown')}, {parity}.",
        "",
        f"{environment.get('gpu') or environment.get('cpu')}, {environment.get('cores')} cores, "
        f"{environment.get('threads')} threads, {' '.join(environment.get('isa', []))}; "
        f"Python {environment.get('python')}, torch {environment.get('torch')}, "
        f"torchscale {environment.get('torchscale')}.",
        "",
        _ceilings(report),
        "",
    ]
    lines += _markdown_table(rows(report))
    peers = peer_table(report)
    if len(peers) > 1:
        lines += ["", "8 bits against 8 bits, in the same rounds:", "", *_markdown_table(peers)]
    lines += [
        "",
        f"*{OURS} is*: median over the rounds of (time of that runtime) / (time of {OURS}), both taken in "
        "the same round. *floor ms*: the time of the same step if every launch ran at this machine's measured "
        "product or copy rate, whichever limits it (bench/cost_model.py). *memory*: peak beyond the parameters, in a process of its own. *of ceiling*: the "
        "operations that the answer needs, without padding, at this machine's measured matrix-product "
        "rate (the faster of PyTorch and our op). *of oneDNN*: the speed as a fraction of a loop of nothing but the "
        "products with weights, timed in the same rounds. *of tile loop*: as *of ceiling*, at the rate of our "
        "innermost loop alone on random data. Where products are in 8 bits, so are all three; attention then counts in "
        "the row's dtype. *error*: relative rms against torchscale in fp32 with the same weights; *torchscale's*: "
        "the same of torchscale in the row's dtype. *OVER*: above the error of that runtime in the same 8 bits.",
        "",
        "Workloads (task/size/resolution), random weights in the official layout, photographs from "
        "scikit-image and scikit-learn, English sentences whose words are hashed to token ids:",
        "",
    ]
    names = dict.fromkeys(row["workload"].split("/")[0] for row in report["results"])
    lines += [f"- {name}: {TASKS[name].about}" for name in names if name in TASKS]
    named = dict.fromkeys(row["runtime"] for row in report["results"])
    lines += ["", "Runtimes:", ""]
    lines += [f"- {name}: {RUNTIMES[name].about}" for name in named if name in RUNTIMES]
    failures = [r for r in report["results"] if not r["parity"]["passed"]]
    if failures:
        lines += ["", "## Not in parity", ""]
        lines += [
            f"- {r['runtime']} on {r['workload']}, {r['dtype']}, batch {r['batch']}: "
            f"{r['parity'].get('reason', '')}"
            for r in failures
        ]
    if old is not None:
        lines += ["", "## Compared with an earlier run", "", *comparison(report, old, marked=True)]
    return "\n".join(lines) + "\n"


def comparison(report: Report, old: Report, marked: bool = False) -> list[str]:
    """Lines that set the speeds and the ratios of two reports side by side."""
    lines = []
    for key in ("cpu", "gpu", "cores", "threads", "torch", "device"):
        now, before = report["environment"].get(key), old["environment"].get(key)
        if now != before:
            lines.append(
                f"other {key}: {before} then, {now} now; speeds do not compare, ratios may"
            )
    if lines and marked:
        lines = [f"- {line}" for line in lines] + [""]
    identity = ("workload", "dtype", "batch", "runtime", "device")
    then = {tuple(r[k] for k in identity): r for r in old["results"]}
    then_ratio = {_case(r): r["median"] for r in _all_ratios(old)}
    table = [["workload", "dtype", "batch", "what", "then", "now", "change"]]
    for row in report["results"]:
        before = then.get(tuple(row[k] for k in identity))
        if before is None or not before["samples_per_s"] or not row["samples_per_s"]:
            continue
        a, b = before["samples_per_s"]["p50"], row["samples_per_s"]["p50"]
        table.append([*_who(row), f"{row['runtime']} samples/s", *_change(a, b)])
    for row in _all_ratios(report):
        a = then_ratio.get(_case(row))
        if a is not None:
            what = f"{row['runtime']}'s ratio" if "runtime" in row else "ratio"
            table.append([*_who(row), f"{what} to {row['against']}", *_change(a, row["median"])])
    if len(table) == 1:
        return [*lines, "nothing in the two reports is the same workload, dtype, batch and runtime"]
    if marked:
        return lines + _markdown_table(table)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return lines + [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table
    ]


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["workload"], row["dtype"], row["batch"], row.get("runtime", OURS), row["against"]


def _all_ratios(report: Report) -> list[dict[str, Any]]:
    """With those within 8 bits, which reports of earlier versions lack."""
    return [*report["ratios"], *report.get("peer_ratios", [])]


def _who(row: dict[str, Any]) -> list[str]:
    return [row["workload"], row["dtype"], str(row["batch"])]


def _change(before: float, now: float) -> list[str]:
    return [_number(before), _number(now), f"{now / before - 1:+.1%}"]


def _markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---:" if name in _RIGHT else "---" for name in table[0]]
    body: Iterable[Sequence[str]] = (table[0], marks, *table[1:])
    return ["| " + " | ".join(line) + " |" for line in body]


def _skipped(report: Report) -> dict[str, list[str]]:
    """Reason -> runtimes, with the dtype or the workload where a runtime runs in some and not in others."""
    skipped: list[dict[str, Any]] = report.get("skipped", [])
    reasons: dict[str, dict[str, None]] = {}
    for row in skipped:
        name = row["runtime"]
        all_of_it: list[dict[str, Any]] = [
            other for other in (*skipped, *report["results"]) if other["runtime"] == name
        ]
        for key in ("runtime", "dtype", "workload", "batch"):
            alike = [other for other in all_of_it if other[key] == row[key]]
            if all(other.get("reason") == row["reason"] for other in alike):
                where = "" if key == "runtime" else f" on {row[key]}"
                break
        else:
            where = f" on {row['workload']} in {row['dtype']}"
        reasons.setdefault(row["reason"], {})[name + where] = None
    return {reason: list(names) for reason, names in reasons.items()}


def _ceilings(report: Report) -> str:
    ceilings = report["ceilings"]
    rates = [f"{dtype} {rate:.3g}" for dtype, rate in ceilings["matmul_tflops"].items()]
    if not rates:
        return "Ceilings: not measured."
    loops = ceilings.get("tile_loop_tflops") or {}
    tiles = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in loops.items() if rate)
    fc1 = ", ".join(
        f"{dtype} {own['tflops']:.3g} ({own['tile_loop_fraction']:.0%} of the tile loop)"
        for dtype, own in ceilings.get("expert_linear_fc1", {}).items()
    )
    bare = [
        f"{row['workload']} {_products(row)} batch {row['batch']} {row['samples_per_s']['p50']:.3g}/s "
        f"({row['tflops']:.3g} TFLOP/s)"
        for row in ceilings.get("onednn_products", [])
    ]
    return (
        f"Ceilings measured in this run: matrix products {', '.join(rates)} TFLOP/s, "
        f"our tile loop alone {f'{tiles} TFLOP/s' if tiles else 'not measured'}, "
        f"copy {ceilings['copy_gbps']:.3g} GB/s"
        + (f"; expert_linear as fc1 with LayerNorm, bias, GELU {fc1} TFLOP/s" if fc1 else "")
        + (f"; oneDNN's products alone: {', '.join(bare)}." if bare else ".")
    )


def _products(row: dict[str, Any]) -> str:
    """The dtype of bare products, which earlier versions did not tell from that of the rows."""
    return f"{row['products']} beside {row['dtype']}" if is_rounded(row) else str(row["dtype"])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _error(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def about_runtimes() -> str:
    """For --help: the runtimes and what they are."""
    return "\n".join(f"  {name}: {runtime.about}" for name, runtime in RUNTIMES.items())


def about_workloads() -> str:
    """For --help: the tasks and what they are."""
    return "\n".join(f"  {name}: {task.about}" for name, task in TASKS.items())
