"""report.png: how fast each runtime is beside torchscale, and how much memory it needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.baselines import OURS, REFERENCE
from bench.peers import is_rounded

_OTHERS = ("#d9a441", "#8a6fae", "#6a9a5b", "#b5651d", "#5b7fa6")
_OURS_COLOUR, _REFERENCE_COLOUR = "#11698e", "#b4b8bd"
_INK, _FAINT = "#22282d", "#6b7379"
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def draw(report: dict[str, Any], path: Path) -> bool:
    """Writes the picture; False, and no file, if the report holds no speeds."""
    timed = [row for row in report["results"] if row["samples_per_s"]]
    if not timed:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runtimes = list(dict.fromkeys(row["runtime"] for row in timed))
    cases = list(dict.fromkeys(_case(row) for row in timed))
    found = {(_case(row), row["runtime"]): row for row in timed}
    colours = _colours(runtimes)
    base = REFERENCE if REFERENCE in runtimes else runtimes[0]
    relative = _relative(report, found, base)
    memory = any(row["peak_memory_mib"] is not None for row in timed)

    thickness = 0.8 / len(runtimes)
    # Beside the title there is room for three names.
    columns = len(runtimes) if len(runtimes) < 4 else 6 if memory else 4
    legend = 0.0 if len(runtimes) < 4 else 0.28 * -(-len(runtimes) // columns)
    height = 2.0 + legend + 0.3 * len(cases) * max(len(runtimes), 1.6)
    figure, axes = pyplot.subplots(
        1,
        2 if memory else 1,
        figsize=(12.5 if memory else 8.5, height),
        sharey=True,
        squeeze=False,
        gridspec_kw={"width_ratios": [3, 2] if memory else [1]},
    )
    speed_axis = axes[0][0]
    for index, name in enumerate(runtimes):
        offset = (index - (len(runtimes) - 1) / 2) * thickness
        for place, case in enumerate(cases):
            row = found.get((case, name))
            if row is None:
                continue
            x = relative[case, name]
            label = f"{_number(row['samples_per_s']['p50'])}/s"
            if not row["parity"]["passed"] or is_rounded(row):
                label += f"   error {row['parity']['rel_rms'] or math.nan:.0e}"
            if name != base:
                label = f"{x:.2f}x   {label}"
            _bar(speed_axis, place + offset, x, thickness, colours[name], label, name == OURS)
            if memory and row["peak_memory_mib"] is not None:
                mib = row["peak_memory_mib"]
                label = f"{_number(mib)} MiB"
                _bar(axes[0][1], place + offset, mib, thickness, colours[name], label, name == OURS)

    speed_axis.axvline(1.0, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    speed_axis.set_xlim(0, max(relative.values()) * 1.32)
    speed_axis.set_yticks(range(len(cases)), [_title(case) for case in cases])
    speed_axis.set_ylim(len(cases) - 0.4, -0.6)
    _finish(speed_axis, f"Speed, {base} = 1")
    if memory:
        axes[0][1].set_xlim(0, max(row["peak_memory_mib"] or 0 for row in timed) * 1.32)
        _finish(axes[0][1], "Peak memory beyond the parameters")

    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in runtimes]
    figure.legend(
        handles,
        runtimes,
        loc="upper left" if legend else "upper right",
        ncols=columns,
        frameon=False,
        bbox_to_anchor=(0.0, 1.0 - 0.46 / height) if legend else (0.99, 1.0 - 0.12 / height),
    )
    figure.text(
        0.012, 1 - 0.38 / height, "BEiT-3 inference", fontsize=15, weight="bold", color=_INK
    )
    lines = _footer(report, 1 if memory else 2)
    figure.text(0.012, 0.16 / height, lines, fontsize=8.5, color=_FAINT)
    below, above = (0.38 if memory else 0.55) / height, (0.55 + legend) / height
    figure.tight_layout(rect=(0, below, 1, 1 - above), w_pad=2.5)
    figure.savefig(path, dpi=144, facecolor="white")
    pyplot.close(figure)
    return True


def _case(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["workload"], row["dtype"], row["batch"]


def _title(case: tuple[str, str, int]) -> str:
    workload, dtype, batch = case
    return f"{workload}\n{_SHORT.get(dtype, dtype)}, batch {batch}"


def _colours(runtimes: list[str]) -> dict[str, str]:
    rest = iter(_OTHERS * len(runtimes))
    fixed = {OURS: _OURS_COLOUR, REFERENCE: _REFERENCE_COLOUR}
    return {name: fixed.get(name) or next(rest) for name in runtimes}


def _relative(
    report: dict[str, Any], found: dict[tuple[Any, str], dict[str, Any]], base: str
) -> dict[tuple[Any, str], float]:
    """Speed of each row beside `base`: from the ratios of the same rounds where both are known."""
    ratio = {(_case(r), r["against"]): r["median"] for r in report["ratios"]}
    speeds = {}
    for (case, name), row in found.items():
        ours_to_base = 1.0 if base == OURS else ratio.get((case, base))
        ours_to_name = 1.0 if name == OURS else ratio.get((case, name))
        if ours_to_base and ours_to_name:
            speeds[case, name] = ours_to_base / ours_to_name
        else:
            other = found.get((case, base), row)
            speeds[case, name] = row["samples_per_s"]["p50"] / other["samples_per_s"]["p50"]
    return speeds


def _bar(
    axis: Any, y: float, value: float, thickness: float, colour: str, label: str, strong: bool
) -> None:
    axis.barh(y, value, height=thickness * 0.92, color=colour, zorder=2)
    axis.annotate(
        label,
        (value, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=_INK if strong else _FAINT,
        weight="bold" if strong else "normal",
    )


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, color=_INK)
    axis.tick_params(axis="y", length=0, labelsize=9.5, labelcolor=_INK)
    axis.tick_params(axis="x", labelsize=8.5, labelcolor=_FAINT, color="#d5d9dc")
    axis.grid(axis="x", color="#eceff1", zorder=0)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#d5d9dc")


def _footer(report: dict[str, Any], lines: int) -> str:
    environment = report["environment"]
    whole = all(row["parity"]["passed"] for row in report["results"])
    rounded = any(map(is_rounded, report["results"]))
    parity = "every bar in parity" if whole else "bars with an error are not in parity"
    if rounded:
        parity = "every bar without an error in parity"
    return (
        f"{environment.get('gpu') or environment.get('cpu')}, {environment.get('threads')} threads, "
        f"torch {environment.get('torch')}, torchscale {environment.get('torchscale')} eager;"
        + (" " if lines == 1 else "\n")
        + f"medians of interleaved rounds, {parity}; {str(environment.get('date'))[:10]}, "
        f"commit {environment.get('git')}"
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
