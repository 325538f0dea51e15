"""Searches the tiles of the Triton kernels on a GPU, and writes those that were faster into kernels/tiles/.

    python -m bench.tune                                  # every class of this GPU's file
    python -m bench.tune --classes "many rows" long       # some of them
    python -m bench.tune --device cpu --dry-run --out X   # the same steps in small, in the interpreter

A tile must give the numbers of the shipped one to rounding before it is timed; it replaces that one where its median
speed-up, over the shapes of the class and in turn with it, is 2 % or more. The file is written after each class, so a
run that was stopped has lost one class. What was tried is in bench/out/tune.json. Run `python -m bench.kernel_resources` and
the tests afterwards: they hold the compiled code of the new tiles to their rules.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from beit3_fast.kernels._folded_weights import fold
from torch import Tensor

from beit3_fast.ops import triton_kernels
from beit3_fast.timing import Effort, interleave, speed_ups, synchronizer

ROOT = Path(__file__).resolve().parent.parent
GAIN = 1.02
# Relative rms between the results of two tiles that compute the same.
SAME = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EFFORT, DRY_EFFORT = Effort(2, 20, 0.2, 200), Effort(0, 1, 0.0, 1)
# Values that are tried for the fields of a tile; the others stay as they are shipped.
SPACE: dict[str, dict[str, tuple[Any, ...]]] = {
    "expert_linear": {
        "block_m": (64, 128),
        "block_n": (64, 128, 256),
        "block_k": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "tma": (False, True),
        "slices": (1, 2, 4),
        "per_sm": (1, 2),
    },
    "shared_attention": {
        "block_q": (16, 32, 64, 128),
        "block_k": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
        "whole": (0, 224),
    },
    "masked_linear_cross_entropy": {
        "block_m": (32, 64, 128),
        "block_n": (32, 64, 128, 256),
        "block_k": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
}
DRY_SPACE = {op: {"block_k": (16, 32)} for op in SPACE}
# Rows of two experts, features in and out: the products of base and large. Few rows: text, and one image.
LINEAR = {
    "many rows": ((50_432, 0, 768, 3072), (50_432, 512, 3072, 768), (25_216, 512, 1024, 3072)),
    "few rows": ((197, 0, 768, 2304), (197, 16, 3072, 768), (0, 128, 1024, 4096)),
    "odd sizes": ((50_432, 0, 588, 1408), (1_576, 128, 1001, 1003)),
    "odd columns": ((9_600, 0, 768, 64_010), (9_600, 0, 1024, 64_010)),
    "fp32": ((1_576, 0, 768, 3072), (1_576, 128, 3072, 768)),
    "weights": ((50_432, 0, 768, 3072), (50_432, 512, 3072, 768), (25_216, 512, 1024, 3072)),
    "fp32 weights": ((1_576, 0, 768, 3072), (1_576, 128, 3072, 768)),
    "odd weights": ((50_432, 0, 588, 1408), (1_576, 128, 1001, 1003)),
    "fp32 odd weights": ((1_576, 0, 588, 1408),),
}
# Vision and text tokens of each of so many samples, heads, head width.
ATTENTION = {
    "short": ((197, 0, 256, 12, 64), (197, 16, 128, 16, 64)),
    "long": ((577, 0, 64, 12, 64), (901, 12, 64, 12, 64)),
    "fp32": ((197, 16, 32, 12, 64),),
    "backward": ((197, 0, 128, 12, 64), (901, 12, 32, 12, 64)),
    "fp32 backward": ((197, 16, 16, 12, 64),),
}
# The same of giant's heads.
ATTENTION |= {
    f"wide {name}": tuple((*shape[:-2], 16, 88) for shape in shapes)
    for name, shapes in ATTENTION.items()
}
ATTENTION["wide selected backward"] = ATTENTION["wide backward"]
# Masked rows, features, classes: the heads of text and of image tokens.
HEAD = ((9_600, 768, 64_010), (20_000, 768, 8_192), (9_600, 1024, 64_010))
Call = Callable[[Any], list[Tensor]]


class Trial(NamedTuple):
    """What came of a tile: its speed-up over the shipped one, or why it was not timed."""

    tile: dict[str, Any]
    speed_up: float | None
    reason: str = ""


def candidates(
    op: str, shape_class: str, shipped: Any, dry_run: bool, architecture: str
) -> Iterator[Any]:
    """Every tile of the space but the shipped one, and none that an architecture cannot run."""
    tiles = import_module("beit3_fast.kernels._tiles")
    space = (DRY_SPACE if dry_run else SPACE)[op]
    for values in product(*space.values()):
        tile = shipped._replace(**dict(zip(space, values, strict=True)))
        if tiles.misfit(tile._asdict(), architecture, shape_class):
            continue
        if tile != shipped and _fits(op, tile, shipped, architecture):
            yield tile


def _fits(op: str, tile: Any, shipped: Any, architecture: str) -> bool:
    if op == "shared_attention":
        # Whole rows of scores are for short samples only.
        return bool(shipped.whole) or not tile.whole
    # A thread has no room for a larger part of a tile of sums.
    per_thread = tile.block_m * tile.block_n // (32 * tile.num_warps)
    if not 16 <= per_thread <= 128:
        return False
    if op != "expert_linear":
        return True
    if tile.tma and architecture not in ("sm_90", "sm_100"):
        return False
    # Slices are as wide as the parts of the statistics.
    sliced = tile.block_n // tile.slices == triton_kernels.STATISTICS_WIDTH
    return sliced and (tile.per_sm == 1 or per_thread <= 64)


def linear_calls(shape_class: str, device: str, dry_run: bool) -> list[Call]:
    """expert_linear with LayerNorm, bias, GELU and residual, or its weights' gradients, at each shape of a class."""
    shapes = ((19, 4, 40, 24),) if dry_run else LINEAR[shape_class]
    if "weights" in shape_class:
        return [_weights_call(_draw(shape_class, device), *shape) for shape in shapes]
    kernels = import_module("beit3_fast.kernels.expert_linear")
    return [_linear_call(kernels, _draw(shape_class, device), *shape) for shape in shapes]


def _linear_call(kernels: Any, draw: Callable[..., Tensor], *shape: int) -> Call:
    first, second, inner, out = shape
    x, residual = draw(first + second, inner), draw(first + second, out)
    weights = [draw(out, inner) / inner**0.5 for _ in range(2)]
    vectors = [[draw(size) for _ in range(2)] for size in (out, inner, inner)]
    folded = fold(weights, *vectors)
    arguments = (x, folded, residual, None, (0, first, first + second), 1e-5, "gelu")
    # As within a layer: the op before has left the statistics, and the op behind wants some.
    options = {"statistics": kernels.row_statistics(x), "with_statistics": True}
    return lambda tile: [kernels.expert_linear(*arguments, **options, tile=tile)[0]]


def _weights_call(draw: Callable[..., Tensor], *shape: int) -> Call:
    kernels = import_module("beit3_fast.kernels._weight_gradient")
    first, second, inner, out = shape
    dz, operand, weight = draw(first + second, out), draw(first + second, inner), draw(out, inner)
    bounds = sorted({0, first, first + second})

    def call(tile: Any) -> list[Tensor]:
        parts, places = kernels.weight_gradient(dz, operand, bounds, tile)
        return [kernels.finish(parts, *own, weight, None)[0] for own in pairwise(places)]

    return call


def attention_calls(shape_class: str, device: str, dry_run: bool) -> list[Call]:
    """shared_attention, or its backward pass, at each shape of a class."""
    kernels = import_module("beit3_fast.kernels.shared_attention")
    shapes = ((9, 4, 2, 2, 16),) if dry_run else ATTENTION[shape_class]
    return [_attention_call(kernels, shape_class, device, *shape) for shape in shapes]


def _attention_call(
    kernels: Any, shape_class: str, device: str, vision: int, text: int, batch: int, *head: int
) -> Call:
    heads, width = head
    draw, rows = _draw(shape_class, device), batch * (vision + text)
    q, k, v = draw(rows, 3 * heads * width).chunk(3, dim=1)
    ends = torch.arange(batch + 1, dtype=torch.int32, device=device)
    own = kernels.Segments(ends * vision, ends * text, vision + text)
    rest = (own, own, heads, width**-0.5, "seq2seq")
    if "backward" not in shape_class:
        return lambda tile: [kernels.shared_attention(q, k, v, *rest, tile=tile).o]
    backward = import_module("beit3_fast.kernels._shared_attention_backward")
    done, grad = kernels.shared_attention(q, k, v, *rest, with_lse=True), draw(rows, heads * width)
    saved = (grad, q, k, v, done.o, done.lse)
    return lambda tile: list(backward.shared_attention_backward(*saved, *rest, tile=tile))


def head_calls(shape_class: str, device: str, dry_run: bool) -> list[Call]:
    """masked_linear_cross_entropy: the losses, and the slopes of a slice of the classes, at each shape."""
    shapes = ((19, 24, 70),) if dry_run else HEAD
    return [_head_call(_draw(shape_class, device), device, *shape) for shape in shapes]


def _head_call(
    draw: Callable[..., Tensor], device: str, count: int, features: int, classes: int
) -> Call:
    kernels = import_module("beit3_fast.kernels.masked_linear_cross_entropy")
    x, weight, bias = draw(count, features), draw(classes, features) / 8, draw(classes)
    rows = torch.arange(count, device=device)
    operands, grad = (x, weight, bias, rows, rows % classes), torch.ones(count, device=device)
    _, peaks = kernels.losses(*operands, 0.1)
    part = slice(0, min(classes, 8_192))

    def call(tile: Any) -> list[Tensor]:
        slope, _ = kernels.slopes(grad, *operands, peaks, 0.1, part, tile=tile)
        return [kernels.losses(*operands, 0.1, tile=tile)[0], slope]

    return call


MAKE: dict[str, Callable[[str, str, bool], list[Call]]] = {
    "expert_linear": linear_calls,
    "shared_attention": attention_calls,
    "masked_linear_cross_entropy": head_calls,
}


def _draw(shape_class: str, device: str) -> Callable[..., Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    dtype = torch.float32 if "fp32" in shape_class else dtype
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)


def attempt(calls: list[Call], shipped: Any, tile: Any, device: str, effort: Effort) -> Trial:
    """Checks a tile against the shipped one, then times it in turn with it."""
    gains = []
    for call in calls:
        try:
            expected, found = call(shipped), call(tile)
        except Exception as error:
            return Trial(tile._asdict(), None, f"{type(error).__name__}: {error}"[:200])
        for mine, theirs in zip(found, expected, strict=True):
            # The sum's order differs; whether the numbers are right is for the tests, on what is written.
            apart = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
            if not apart <= SAME[theirs.dtype]:
                return Trial(tile._asdict(), None, f"differs by {apart:.1e} of the result")
        turns = {"shipped": lambda: call(shipped), "tile": lambda: call(tile)}  # noqa: B023
        samples = interleave(turns, effort, synchronize=synchronizer(torch.device(device)))
        gains.append(speed_ups(samples["tile"], samples["shipped"]).p50)
    return Trial(tile._asdict(), math.prod(gains) ** (1 / len(gains)))


def written(content: dict[str, Any]) -> str:
    """The file's text: one line for each class."""
    ops = []
    for op, classes in content["tiles"].items():
        lines = [f"      {json.dumps(name)}: {json.dumps(own)}" for name, own in classes.items()]
        ops.append(f"    {json.dumps(op)}: {{\n" + ",\n".join(lines) + "\n    }")
    return '{\n  "schema": 1,\n  "tiles": {\n' + ",\n".join(ops) + "\n  }\n}\n"


def tune(classes: list[str], device: str, dry_run: bool, out: Path, record: Path) -> None:
    """Searches the classes (all where none is named), and writes the file after each."""
    tiles = import_module("beit3_fast.kernels._tiles")
    architecture = tiles.architecture(torch.device(device))
    content = json.loads((tiles.FOLDER / f"{architecture}.json").read_text(encoding="utf-8"))
    tried: dict[str, list[dict[str, Any]]] = {}
    for op, names in tiles.CLASSES.items():
        tile_type = import_module(f"beit3_fast.kernels.{op}").Tile
        for name in names:
            if classes and name not in classes:
                continue
            shipped = tile_type(**content["tiles"][op][name])
            calls = MAKE[op](name, device, dry_run)
            effort = DRY_EFFORT if dry_run else EFFORT
            trials = [
                attempt(calls, shipped, tile, device, effort)
                for tile in candidates(op, name, shipped, dry_run, architecture)
            ]
            best = max(trials, key=lambda trial: trial.speed_up or 0.0, default=None)
            said = "the shipped tile stays"
            if best is not None and (best.speed_up or 0.0) >= GAIN:
                content["tiles"][op][name] = best.tile
                said = f"{best.speed_up:.2f}x: {best.tile}"
            timed = sum(trial.speed_up is not None for trial in trials)
            print(f"{op}, {name}: {timed} of {len(trials)} tiles timed; {said}", flush=True)
            tried[f"{op}, {name}"] = [trial._asdict() for trial in trials]
            out.write_text(written(content), encoding="utf-8")
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(tried, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    tiles = import_module("beit3_fast.kernels._tiles")
    parser = argparse.ArgumentParser(description="Searches tiles of the Triton kernels on a GPU.")
    known = sorted({name for op in SPACE for name in tiles.CLASSES[op]})
    parser.add_argument("--classes", nargs="+", default=[], choices=known, metavar="CLASS")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes and few tiles")
    parser.add_argument("--out", type=Path, help="default: the file of this GPU in kernels/tiles/")
    record = ROOT / "bench" / "out" / "tune.json"
    parser.add_argument("--record", type=Path, default=record, help="every tile that was tried")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device; --device cpu --dry-run --out X goes through the steps"
        )
    if options.device == "cpu":
        if not options.dry_run or options.out is None:
            parser.error("--device cpu times nothing: it needs --dry-run and --out")
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--device cpu needs Triton's interpreter: TRITON_INTERPRET=1")
    architecture = tiles.architecture(torch.device(options.device))
    out = options.out or tiles.FOLDER / f"{architecture}.json"
    tune(options.classes, options.device, options.dry_run, out, options.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
