"""Which tile a launch takes: read from ``tiles/<architecture>.json``, one entry for each op and class of shapes.

The files are data that ``Tile`` of the op's file explains. No search runs at import or at a first call; a class
that an architecture does not name is an error of the file, and ``read`` says so.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

# Columns of a part of the statistics that expert_linear leaves, whatever its tile: the shape of what an op returns must
# not depend on the number of rows, by which tiles are chosen.
STATISTICS_WIDTH = 64
FOLDER = Path(__file__).with_name("tiles")
ARCHITECTURES = ("interpreter", "sm_80", "sm_90", "sm_100")
CLASSES = {
    "expert_linear": (
        "fp32",
        "few rows",
        "many rows",
        "odd sizes",
        "fp32 weights",
        "weights",
    ),
    "shared_attention": ("fp32", "short", "long", "fp32 backward", "backward"),
    "masked_linear_cross_entropy": ("fp32", "16 bits"),
}
T = TypeVar("T", bound=NamedTuple)


@cache
def architecture(device: torch.device) -> str:
    """The file for a device: sm_80 serves every NVIDIA GPU without a file of its own, such as sm_89 and sm_120."""
    if device.type != "cuda":
        return "interpreter"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@cache
def read(name: str) -> dict[str, dict[str, dict[str, int]]]:
    """The tiles of an architecture by op and class. Raises ValueError where the file is not as it should be."""
    path = FOLDER / f"{name}.json"
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != 1:
        raise ValueError(f"{path}: schema must be 1, got {content.get('schema')!r}")
    tiles: Any = content.get("tiles")
    if not isinstance(tiles, dict) or set(tiles) != set(CLASSES):
        raise ValueError(f"{path}: tiles must have the ops {sorted(CLASSES)}")
    for op, classes in CLASSES.items():
        if set(tiles[op]) != set(classes):
            raise ValueError(
                f"{path}: {op} must have the classes {list(classes)}, got {[*tiles[op]]}"
            )
        for shape_class, tile in tiles[op].items():
            for key, value in tile.items():
                counts = key in ("group_m", "num_stages", "per_sm", "whole")
                sound = isinstance(value, int) and (counts or value & (value - 1) == 0)
                if not sound or value < 0:
                    raise ValueError(
                        f"{path}: {key} of {op}, {shape_class!r} must be a power of two, got {value!r}"
                    )
    _check_slices(path, tiles["expert_linear"])
    return tiles


def _check_slices(path: Path, classes: dict[str, dict[str, int]]) -> None:
    for name, tile in classes.items():
        if "weights" in name or "block_n" not in tile:
            continue
        columns, slices = tile["block_n"], tile.get("slices", 1)
        if columns != STATISTICS_WIDTH * slices:
            raise ValueError(
                f"{path}: slices of expert_linear, {name!r} must be {STATISTICS_WIDTH} columns wide, got "
                f"{slices} of {columns} columns"
            )


@cache
def choose(tile: type[T], op: str, shape_class: str, name: str) -> T:
    """The tile of a class on an architecture. Raises ValueError where the file's keys are not the tile's fields."""
    values = read(name)[op][shape_class]
    fields = tile._fields
    unknown, missing = (
        set(values) - set(fields),
        set(fields) - set(values) - set(tile._field_defaults),
    )
    if unknown or missing:
        raise ValueError(
            f"{FOLDER / name}.json: {op}, {shape_class!r} must have the keys {list(fields)}: "
            f"unknown {sorted(unknown)}, missing {sorted(missing)}"
        )
    return tile(**values)
