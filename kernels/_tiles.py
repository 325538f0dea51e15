"""Which tile a launch takes: read from ``tiles/<architecture>.json``, one entry for each op and class of shapes.

The files are data that ``Tile`` of the op's file explains. No search runs at import or at a first call; a class
that an architecture does not name is an error of the file, and ``read`` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
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
        "odd columns",
        "fp32 weights",
        "weights",
        "fp32 odd weights",
        "odd weights",
    ),
    "shared_attention": (
        "fp32",
        "short",
        "long",
        "fp32 backward",
        "backward",
        "wide fp32",
        "wide short",
        "wide long",
        "wide fp32 backward",
        "wide backward",
        "wide selected backward",
    ),
    "masked_linear_cross_entropy": ("fp32", "16 bits"),
}
# What each field of an op's ``Tile`` may be. A block is at least as wide as a product of tensor cores.
_BLOCK: Sequence[Any] = (16, 32, 64, 128, 256)
_WARPS: Sequence[Any] = (1, 2, 4, 8, 16)
_STAGES = range(1, 9)
FIELDS: dict[str, dict[str, Sequence[Any]]] = {
    "expert_linear": {
        "block_m": _BLOCK,
        "block_n": _BLOCK,
        "block_k": _BLOCK,
        "group_m": range(1, 65),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
        "slices": (1, 2, 4),
        "tma": (False, True),
        "per_sm": range(1, 17),
    },
    "shared_attention": {
        "block_q": _BLOCK,
        "block_k": _BLOCK,
        "num_warps": _WARPS,
        "num_stages": _STAGES,
        "whole": range(0, 257, 32),
    },
    "masked_linear_cross_entropy": {
        "block_m": _BLOCK,
        "block_n": _BLOCK,
        "block_k": _BLOCK,
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    },
}
OPTIONAL = {"slices", "tma", "per_sm", "whole"}
# Bytes of shared memory of a multiprocessor. The file of sm_80 serves sm_86, sm_89 and sm_120 as well, which have less
# than its own 167,936.
SHARED_MEMORY = {"sm_80": 102_400, "sm_90": 233_472, "sm_100": 233_472}
# Rows and columns of a warp's part of a product of tensor cores.
_FRAGMENT = 16 * 8
_THREADS = 32
_FIRST_WITH_TMA = 90
T = TypeVar("T", bound=NamedTuple)


@cache
def architecture(device: torch.device) -> str:
    """The file for a device: sm_80 serves every NVIDIA GPU without a file of its own, such as sm_89 and sm_120."""
    if device.type != "cuda":
        return "interpreter"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@cache
def read(name: str) -> dict[str, dict[str, dict[str, int]]]:
    """The tiles of an architecture by op and class.

    Raises ValueError where any part of the file is not as it should be: the file, the place, what it should hold and
    what it holds.
    """
    path = FOLDER / f"{name}.json"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: it must be JSON in UTF-8, got {error}") from error
    _check_keys(f"{path}: the document", content, ("schema", "tiles"))
    if type(content["schema"]) is not int or content["schema"] != 1:
        raise ValueError(f"{path}: schema must be 1, got {content['schema']!r}")
    tiles = content["tiles"]
    _check_keys(f"{path}: tiles", tiles, CLASSES)
    for op, classes in CLASSES.items():
        _check_keys(f"{path}: {op}", tiles[op], classes)
        for shape_class, tile in tiles[op].items():
            place = f"{path}: {op}, {shape_class!r}"
            _check_tile(place, tile, FIELDS[op])
            if fault := misfit(tile, name, shape_class):
                raise ValueError(f"{place}: {fault}")
            if op == "expert_linear":
                _check_product(place, tile, name, measures="weights" not in shape_class)
    return tiles  # type: ignore[no-any-return]


def _check_keys(
    place: str, found: Any, keys: Iterable[str], optional: Set[str] = frozenset()
) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{place} must be an object, got {type(found).__name__}")
    unknown, missing = set(found) - set(keys), set(keys) - set(found) - optional
    if unknown or missing:
        raise ValueError(
            f"{place} must have the keys {list(keys)}: unknown {sorted(unknown)}, "
            f"missing {sorted(missing)}"
        )


def _check_tile(place: str, tile: Any, fields: dict[str, Sequence[Any]]) -> None:
    _check_keys(place, tile, fields, OPTIONAL)
    for key, value in tile.items():
        allowed = fields[key]
        # A bool is an int as well, and equal to one.
        if type(value) is not type(allowed[0]) or value not in allowed:
            wanted = f"one of {list(allowed)}"
            if isinstance(allowed, range) and allowed.step == 1:
                wanted = f"an integer from {allowed[0]} to {allowed[-1]}"
            raise ValueError(f"{place}: {key} must be {wanted}, got {value!r}")


def misfit(tile: Mapping[str, int], name: str, shape_class: str) -> str | None:
    """What keeps a tile of allowed values from running on an architecture; None where nothing does.

    Every warp needs a part of the product, and the operands that wait for it must fit into shared memory.
    """
    queries = "block_q" in tile
    rows, columns = ("block_q", "block_k") if queries else ("block_m", "block_n")
    half = "fp32" not in shape_class
    most = tile[rows] * tile[columns] // (_FRAGMENT if half else _THREADS)
    if tile["num_warps"] > most:
        return (
            f"num_warps must be at most {most} for {tile[rows]} x {tile[columns]}, "
            f"got {tile['num_warps']}"
        )
    # Keys and values wait, of heads that are padded to 64 or 128 columns, or both operands of a product.
    columns_of_head = 128 if "wide" in shape_class else 64
    numbers = (
        2 * tile["block_k"] * columns_of_head
        if queries
        else (tile["block_m"] + tile["block_n"]) * tile["block_k"]
    )
    programs = tile.get("per_sm", 1)
    waiting = max(tile["num_stages"] - 1, 1) * numbers * (2 if half else 4) * programs
    limit = SHARED_MEMORY.get(name, waiting)
    if waiting > limit:
        return (
            f"the operands of num_stages {tile['num_stages']} in per_sm {programs} programs take {waiting} "
            f"bytes of the {limit} of shared memory that {name} has; take fewer, or smaller blocks"
        )
    return None


def _check_product(place: str, tile: dict[str, int], name: str, measures: bool) -> None:
    """``measures``: whether statistics of the result are left, in parts of STATISTICS_WIDTH columns."""
    columns, slices = tile["block_n"], tile.get("slices", 1)
    if measures and columns != STATISTICS_WIDTH * slices:
        raise ValueError(
            f"{place}: slices must be {STATISTICS_WIDTH} columns wide, got {slices} of {columns} columns"
        )
    number = name.removeprefix("sm_")
    if tile.get("tma") and number.isdigit() and int(number) < _FIRST_WITH_TMA:
        raise ValueError(
            f"{place}: tma must be false before sm_{_FIRST_WITH_TMA}, which has the first such unit, got true"
        )


@cache
def choose(tile: type[T], op: str, shape_class: str, name: str) -> T:
    """The tile of a class on an architecture. Raises ValueError as ``read`` does."""
    return tile(**read(name)[op][shape_class])
