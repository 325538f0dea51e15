"""report.json, report.md and report.png at the top of the folder of ``make gpu``, from what its steps left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from beit3_fast.errors import InputError
from bench import report as reports
from bench.environment import environment
from bench.gpu_record import Record

Rows = list[dict[str, Any]]


def summarize(out: Path, record: Record, device: str) -> list[str]:
    """Writes the three files; returns lines about what was written. Speeds of steps that did not pass are left out."""
    passed = {name for name, own in record.items() if own["outcome"] == "passed"}
    merged = _merged(out, passed, device)
    merged["steps"] = record
    merged["figures"] = _figures(out, passed)
    merged["decode_steps"] = _decode_steps(out, passed)
    notes = reports.write(merged, out)
    with (out / "report.md").open("a", encoding="utf-8") as file:
        file.write(_appendix(merged))
    return notes


def _merged(out: Path, passed: set[str], device: str) -> dict[str, Any]:
    """One report of all benchmark steps. Of the ceilings, which each of them measured, the highest counts."""
    found = []
    for path in sorted(out.glob("bench*/report.json")):
        if path.parent.name in passed:
            try:
                found.append(reports.load(path))
            except InputError:
                continue
    parts: dict[str, Rows] = {
        key: [row for own in found for row in own.get(key, [])]
        for key in ("results", "ratios", "peer_ratios", "skipped")
    }
    rates: dict[str, float] = {}
    for own in found:
        for dtype, rate in own["ceilings"]["matmul_tflops"].items():
            rates[dtype] = max(rate, rates.get(dtype, 0.0))
    copies = [own["ceilings"]["copy_gbps"] for own in found if own["ceilings"]["copy_gbps"]]
    described = environment(torch.get_num_threads(), torch.device(device))
    return {
        "schema": 1,
        "passed": bool(found) and all(own["passed"] for own in found),
        "environment": found[0]["environment"] if found else described,
        "ceilings": {"matmul_tflops": rates, "copy_gbps": max(copies, default=None)},
        **parts,
    }


def _figures(out: Path, passed: set[str]) -> Rows:
    rows: Rows = []
    for path in sorted(out.glob("figures-*.json")):
        if path.stem in passed:
            own = json.loads(path.read_text(encoding="utf-8"))
            rows += [{"figure": own["figure"], **row} for row in own["rows"]]
    return rows


def _decode_steps(out: Path, passed: set[str]) -> Rows:
    """The line of JSON that bench.decode_step prints."""
    rows: Rows = []
    for path in sorted(out.glob("bench-decode-step*.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = [line for line in lines if line.startswith("{")]
        if path.stem in passed and shown:
            rows.append({"step": path.stem, **json.loads(shown[-1])})
    return rows


def _appendix(merged: dict[str, Any]) -> str:
    lines = ["", "## Single ops, and one image captured", ""]
    table = [["figure", "what", "runtime", "ms", "TFLOP/s", "why not"]]
    for row in merged["figures"]:
        numbers = [str(row[key] if row[key] is not None else "-") for key in ("ms", "tflops")]
        table.append([row["figure"], row["what"], row["runtime"], *numbers, row.get("reason", "")])
    lines += _table(table)
    lines += ["", "## Captioning steps", ""]
    table = [["step", "ms", "memory floor ms", "times the floor"]]
    for row in merged["decode_steps"]:
        table.append([row["step"], *(str(row[key]) for key in ("step_ms", "floor_ms", "of_floor"))])
    lines += _table(table)
    lines += ["", "## Steps", ""]
    table = [["step", "outcome", "seconds"]]
    table += [[name, own["outcome"], str(own["seconds"])] for name, own in merged["steps"].items()]
    return "\n".join([*lines, *_table(table)]) + "\n"


def _table(rows: list[list[str]]) -> list[str]:
    if len(rows) == 1:
        return ["Nothing measured."]
    body = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in body]
