"""What is left to look at after a run: report.json, and curves.png where matplotlib is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.data.masked_batch import TERMS
from beit3_fast.train.log import read_log


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``report`` and the curves of the run's log into ``folder``."""
    with replacing(folder / "report.json") as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    try:
        from matplotlib.figure import Figure
    except Exception:
        return
    lines = read_log(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for term in TERMS:
        own = [(line["step"], line[term]) for line in lines if line.get(term) is not None]
        if own:
            axes.plot(*zip(*own, strict=True), label=term, linewidth=1)
    axes.set(xlabel="step", ylabel="cross-entropy")
    axes.legend()
    with replacing(folder / "curves.png") as file:
        figure.savefig(file, format="png", dpi=120)
