"""What is left to look at after a run: report.json and, where matplotlib is installed, curves, examples and a page of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.errors import InputError
from beit3_fast.finite import for_json
from beit3_fast.train.examples import Example
from beit3_fast.train.log import read_log
from beit3_fast.train.loop import TrainReport

REPORT, CURVES, EXAMPLES, PAGE = "report.json", "curves.png", "examples.png", "report.html"

# What a line of the log has beside the terms of the loss.
_BESIDE = ("step", "loss", "lr", "grad_norm", "skipped", "samples_per_s", "mfu")
# Steps that a point of a curve is the mean of, as a share of all.
_SMOOTH = 1 / 60
# Letters of a line of text above pictures.
_LINE = 110


def run_facts(folder: Path, done: TrainReport) -> dict[str, Any]:
    """How far a run is, for its report; the loss of a run that was finished before is in its log."""
    loss = done.loss
    if loss is None and done.step and (lines := read_log(folder)):
        loss = lines[-1]["loss"]
    return {"folder": str(folder), "steps": done.step, "skipped": done.skipped, "loss": loss}


def write_report(folder: Path, report: Mapping[str, Any], examples: Sequence[Example] = ()) -> None:
    """Write ``report``, the curves of the run's log, ``examples`` as pictures, and a page of all into ``folder``.

    Numbers that are not finite become null.
    """
    with replacing(folder / REPORT) as file:
        file.write((json.dumps(for_json(report), indent=1) + "\n").encode())
    if not _can_draw():
        return
    _draw_curves(folder / CURVES, {term: {"": own} for term, own in curves(folder).items()})
    if examples:
        _draw_examples(folder / EXAMPLES, examples)
    write_page(folder / PAGE, [folder])


def write_page(path: Path, folders: Sequence[Path]) -> Path:
    """A page of HTML about finished runs: their figures in one table, curves of runs with the same terms in one picture,
    examples of each. Raises InputError for a folder that is none of a finished run."""
    reports = {folder: _read_report(folder) for folder in folders}
    names = _names(reports)
    pictures = [folder / CURVES for folder in reports]
    if len(reports) > 1 and _can_draw():
        together: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for folder in reports:
            for term, own in curves(folder).items():
                together.setdefault(term, {})[names[folder]] = own
        pictures = [path.with_suffix(".png")]
        _draw_curves(pictures[0], together)
    rows = [
        f"<tr><td>{escape(names[folder])}</td><td>{escape(figure)}</td><td>{value}</td></tr>"
        for folder, report in reports.items()
        for figure, value in _figures(report)
    ]
    shown = [f"<h2>Learning curves</h2>{_image(path, own)}" for own in pictures if own.exists()]
    shown += [
        f"<h2>{escape(names[folder])}: predictions on held-out data</h2>{_image(path, folder / EXAMPLES)}"
        for folder in reports
        if (folder / EXAMPLES).exists()
    ]
    page = [
        "<!doctype html><meta charset=utf-8><title>Training report</title>",
        "<style>body{font-family:sans-serif;max-width:70em;margin:auto}td,th{padding:.2em 1em;text-align:left}"
        "img{max-width:100%}</style><h1>Training report</h1>",
        "<table><tr><th>run</th><th>figure</th><th>value</th></tr>",
        *rows,
        "</table>",
        *shown,
    ]
    with replacing(path) as file:
        file.write(("\n".join(page) + "\n").encode())
    return path


def _names(folders: Iterable[Path]) -> dict[Path, str]:
    """What a page calls each run: its folder's name, or the whole path where others have that name, too."""
    own = {folder: folder.resolve().name for folder in folders}
    times = Counter(own.values())
    return {folder: str(folder) if times[name] > 1 else name for folder, name in own.items()}


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / REPORT).read_text())
        if not isinstance(report, dict):
            raise ValueError(f"expected figures by name, got {report!r:.40}")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} has no {REPORT} that can be read ({error}); it is written when a run of pretrain or finetune ends"
        ) from error
    return report


def _figures(report: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of all numbers, those of nested tables under both names."""
    for key, value in report.items():
        name = f"{before} {key}".strip()
        if isinstance(value, Mapping):
            yield from _figures(value, name)
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif isinstance(value, int):
            yield name, f"{value:,}"


def _image(page: Path, picture: Path) -> str:
    return f'<img src="{escape(os.path.relpath(picture, page.parent))}" alt="">'


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each term of the loss, smoothed."""
    lines = read_log(folder)
    terms = dict.fromkeys(key for line in lines for key in line if key not in _BESIDE)
    found = {}
    for term in terms:
        own = [(line["step"], line[term]) for line in lines if line.get(term) is not None]
        width = max(1, int(len(own) * _SMOOTH))
        # A short last part would end the curve in noise, so the last is the longest.
        starts = range(0, len(own) - width + 1, width)
        parts = [own[a:b] for a, b in zip(starts, [*starts[1:], len(own)], strict=True)]
        found[term] = [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]
    return found


def _can_draw() -> bool:
    """Whether matplotlib imports; one built for another numpy fails in ways of its own."""
    try:
        import matplotlib.figure  # noqa: F401
    except Exception:
        return False
    return True


def _draw_curves(
    path: Path, terms: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * max(1, len(terms)), 3), layout="constrained")
    for place, (term, runs) in enumerate(terms.items(), 1):
        axes = figure.add_subplot(1, len(terms), place)
        for name, own in runs.items():
            axes.plot(*zip(*own, strict=True), label=name, linewidth=1)
        axes.set(title=term, xlabel="step", ylabel="loss")
        if len(runs) > 1:
            axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_examples(path: Path, examples: Sequence[Example]) -> None:
    """A row for each example: its text, below it its pictures with their words."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4 * len(examples)), layout="constrained")
    parts = figure.subfigures(len(examples), 1, squeeze=False)[:, 0]
    columns = max(len(example.pictures) for example in examples)
    for part, example in zip(parts, examples, strict=True):
        part.suptitle(fill(example.text, _LINE), fontsize=8)
        for place, (picture, words) in enumerate(example.pictures, 1):
            axes = part.add_subplot(1, columns, place)
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(words, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
