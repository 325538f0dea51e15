"""What loading did, or could not do, with every name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from beit3_fast.checkpoint import keys, positions
from beit3_fast.checkpoint.positions import Grid
from beit3_fast.errors import CheckpointError

V = TypeVar("V")
Shape = tuple[int, ...]

HOLDS_NAN = "holds NaN; download the file again, or train again from one that is finite"
HOLDS_INFINITY = "holds infinity; download the file again, or train again from one that is finite"
# far above what any model has: only a hostile file would print more
_MOST_NAMES = 2000


@dataclass
class LoadReport:
    """What was done with every name of the file and of the model.

    After a load, names in ``missing`` and ``mismatched`` were allowed to be there and kept the model's values; in the
    report of a CheckpointMismatch they are what stood in the way. ``dropped`` maps a name of the file to the reason,
    ``mismatched`` a name to the file's and the model's shape, ``rejected`` a name to what is wrong with its numbers,
    ``interpolated`` a position table to its old and new grid, ``assumed`` one that was taken as it is to the model's grid
    and the square one that its rows would also make; ``casts`` counts tensors by (from, to). ``preset`` is what the file
    says about preprocessing, None where it says nothing.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    interpolated: dict[str, tuple[Grid, Grid]] = field(default_factory=dict)
    assumed: dict[str, tuple[Grid, Grid]] = field(default_factory=dict)
    casts: dict[tuple[str, str], int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    preset: Any = None

    def __str__(self) -> str:
        return "\n  ".join(
            [
                f"{self.source}: {len(self.loaded)} tensors loaded",
                *self.problems(),
                *(f"dropped, {why}: {_list(names)}" for why, names in _by_value(self.dropped)),
                *(
                    f"interpolated: {name} from {old[0]}x{old[1]} to {new[0]}x{new[1]} patches"
                    for name, (old, new) in self.interpolated.items()
                ),
                *(
                    f"taken as it is: {name}, for {own[0]}x{own[1]} patches; the file does not state its grid, so if it "
                    f"was made for {square[0]}x{square[1]}, put the table through interpolate_positions first"
                    for name, (own, square) in self.assumed.items()
                ),
                *(f"cast from {a} to {b}: {count} tensors" for (a, b), count in self.casts.items()),
                *self.remarks,
            ]
        )

    def problems(self) -> list[str]:
        """A line for each kind of misfit. Every name is there; layers that share a fate share a name."""
        lines = [
            f"{word}: {_list(names)}"
            for word, names in (("missing", self.missing), ("unexpected", self.unexpected))
            if names
        ]
        lines += [
            f"wrong shape: {_list(names)}: {list(theirs)} in the file, {list(ours)} in the model"
            for (theirs, ours), names in _by_value(self.mismatched)
        ]
        return lines + [f"{_list(names)}: {why}" for why, names in _by_value(self.rejected)]


class CheckpointMismatch(CheckpointError):
    """The file is sound and does not fit the model; ``report`` names every key that stands in the way.

    The message is ``what`` stands in the way and then what a caller of ``load_checkpoint`` may pass.
    """

    def __init__(self, what: str, options: Sequence[str], report: LoadReport) -> None:
        super().__init__("\n  ".join([what, *options]))
        self.what = what
        self.report = report

    @property
    def is_of_heads(self) -> bool:
        """Whether nothing is in the way but heads of another size."""
        own = self.report
        others = own.missing or own.unexpected or own.rejected
        return not others and keys.all_heads(own.mismatched)


def mismatch(
    blocking: LoadReport, state: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> CheckpointMismatch:
    """The error for a file with the names ``state`` and a model with the names ``targets`` that do not fit."""

    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    lines = [
        f"{blocking.source}: does not fit the model, which was left as it was",
        f"the file has {keys.describe(shapes(state))}; the model has {keys.describe(shapes(targets))}",
        *_size_hint(shapes(state), shapes(targets)),
        *(blocking.problems() or ["no name of the file is a name of the model"]),
    ]
    wrapper = keys.wrapper_of(targets)
    if wrapper is not None:
        lines.append(f"the model is wrapped: load into its attribute {wrapper}")
    if _tables_swapped(state, targets):
        lines.append(
            "the position tables of A (vision) and B (text) look swapped: are the branches?"
        )
    options = []
    if blocking.missing and keys.all_heads(blocking.missing):
        options.append("to start from a file without this head, pass allow_missing=HEADS")
    if blocking.mismatched and keys.all_heads(blocking.mismatched):
        options.append("to start with a new head of another size, pass allow_mismatched=HEADS")
    if {HOLDS_NAN, HOLDS_INFINITY} & set(blocking.rejected.values()):
        options.append("to load what is not finite nevertheless, pass allow_nonfinite=True")
    return CheckpointMismatch("\n  ".join(lines), options, blocking)


def _size_hint(
    theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]
) -> list[str]:
    pairs = zip(keys.size_of(theirs), keys.size_of(ours), strict=True)
    if all(a == b or a is None or b is None for a, b in pairs):
        return []
    return ["the file belongs to a model of another size: create that one for it"]


def _tables_swapped(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> bool:
    for vision in filter(positions.is_table, targets):
        text = vision.replace(".A.", ".B.")
        if vision in state and text in state and text in targets:
            theirs = state[vision].shape, state[text].shape
            ours = targets[text].shape, targets[vision].shape
            return theirs != ours[::-1] and theirs[0] == ours[0]
    return False


def _list(names: Sequence[str]) -> str:
    short = keys.shorten(names)
    more = f" and {len(short) - _MOST_NAMES} more" if len(short) > _MOST_NAMES else ""
    return ", ".join(short[:_MOST_NAMES]) + more


def _by_value(table: Mapping[str, V]) -> list[tuple[V, list[str]]]:
    groups: dict[V, list[str]] = {}
    for name, value in table.items():
        groups.setdefault(value, []).append(name)
    return list(groups.items())
