"""What the report says of runtimes whose products are rounded to 8 bits: how near, and how fast beside others in 8 bits."""

from __future__ import annotations

from typing import Any

from bench.runtime import BOUNDS
from bench.speeds import are_peers

Row = dict[str, Any]
HEADER = ("workload", "dtype", "batch", "runtime", "against", "is", "p20-p80", "error", "its error")


def is_rounded(row: Row) -> bool:
    """Whether a result's products are in fewer bits than the rest of it; rows of earlier versions do not say so."""
    return bool(row.get("products", row["dtype"]) != row["dtype"])


def more_exact_peers(row: Row, report: Row) -> list[str]:
    """The runtimes of others in the same 8 bits whose error in the same case is lower than that of this row of ours."""
    error = row["parity"]["rel_rms"]
    return [
        other["runtime"]
        for other in _of_the_case(row, report)
        if are_peers(row["runtime"], other["runtime"])
        and None not in (error, other["parity"]["rel_rms"])
        and error > other["parity"]["rel_rms"]
    ]


def verdict(report: Row) -> str:
    """One sentence about the parity of every row that has speeds."""
    rounded = [row for row in report["results"] if is_rounded(row)]
    plain = [row for row in report["results"] if not is_rounded(row)]
    marked = "" if all(row["parity"]["passed"] for row in plain) else " but those marked"
    if not rounded:
        return f"every row is in parity{marked}"
    parts = []
    if plain:
        parts.append(f"every row without rounded products is in parity{marked}")
    for dtype in dict.fromkeys(row["products"] for row in rounded):
        parts.append(
            _rounded_verdict(dtype, [r for r in rounded if r["products"] == dtype], report)
        )
    return "; ".join(parts)


def _rounded_verdict(dtype: str, rows: list[Row], report: Row) -> str:
    errors = [row["parity"]["rel_rms"] for row in rows if row["parity"]["rel_rms"] is not None]
    span = f"{min(errors):.1e} to {max(errors):.1e}" if errors else "not finite"
    said = f"relative errors in {dtype} are {span}, where the rule is at most {BOUNDS[dtype]}"
    if not all(row["parity"]["passed"] for row in rows):
        said += " (those beyond it are marked)"
    worse = sum(bool(more_exact_peers(row, report)) for row in rows)
    return said + (f", and {worse} of ours above that of a peer (marked)" if worse else "")


def table(report: Row) -> list[list[str]]:
    """Ours in 8 bits beside others in the same 8 bits, first row the header; that alone where none were timed."""
    errors = {_key(row, "runtime"): row["parity"]["rel_rms"] for row in report["results"]}
    lines = [list(HEADER)]
    for row in report.get("peer_ratios", []):
        ours, its = (errors[_key(row, key)] for key in ("runtime", "against"))
        lines.append(
            [
                row["workload"],
                row["dtype"],
                str(row["batch"]),
                row["runtime"],
                row["against"],
                f"{row['median']:.2f}x as fast",
                f"{row['p20']:.2f}-{row['p80']:.2f}",
            ]
            + ["-" if error is None else f"{error:.1e}" for error in (ours, its)]
        )
    return lines


def _case(row: Row) -> tuple[Any, ...]:
    return row["workload"], row["dtype"], row["batch"]


def _key(row: Row, name: str) -> tuple[Any, ...]:
    return (*_case(row), row[name])


def _of_the_case(row: Row, report: Row) -> list[Row]:
    return [other for other in report["results"] if _case(other) == _case(row)]
