"""Tensors with a page behind (or before) them that kills the process which touches it. A program, too:

    python guarded_memory.py SIDE,... KERNEL_FILE...

runs the Triton kernels of ops (the names of the files) in the interpreter over odd sizes, every operand and result
in guarded memory, whose forbidden page lies on each SIDE in turn: behind, before.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from beit3_fast.kernels._folded_weights import fold
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_maps: list[mmap.mmap] = []  # never unmapped: a tensor may still be read


def guarded(source: Tensor, side: str = "behind") -> Tensor:
    """A contiguous copy of ``source`` that ends where a forbidden page begins, or begins where one ends."""
    size = source.numel() * source.element_size()
    if not size:
        return source.clone()
    page = mmap.PAGESIZE
    pages = max(1, -(-size // page))
    area = mmap.mmap(-1, (pages + 2) * page)
    _maps.append(area)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for forbidden in (base, base + (pages + 1) * page):
        if _libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if side == "before" else (pages + 1) * page - size
    flat = torch.frombuffer(area, dtype=source.dtype, count=source.numel(), offset=offset)
    return flat.view(source.shape).copy_(source)


@contextmanager
def guarded_results(side: str) -> Iterator[None]:
    """Every torch.empty and torch.zeros, and those of a tensor, give guarded memory, filled with NaN or zeros."""
    patched: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str) -> None:
        make = getattr(owner, name)
        patched.append((owner, name, make))

        def poisoned(*args: Any, **named: Any) -> Tensor:
            made = guarded(make(*args, **named), side)
            return made.fill_(torch.nan) if "empty" in name and made.is_floating_point() else made

        setattr(owner, name, poisoned)

    for owner, names in (
        (torch, ("empty", "empty_like", "zeros")),
        (Tensor, ("new_empty", "new_zeros")),
    ):
        for name in names:
            patch(owner, name)
    try:
        yield
    finally:
        for owner, name, make in patched:
            setattr(owner, name, make)


def check_expert_linear(kernels: Any, side: str) -> None:
    shapes = (((0, 1), 1, 1), ((0, 5, 12), 35, 33), ((0, 0, 17, 18), 16, 31), ((0, 3, 3), 70, 64))
    dtypes = cycle((torch.float32, torch.float16, torch.float16))
    rows_met = cycle((side == "before", side == "behind"))
    for bounds, features, out in shapes:
        dtype, rows = next(dtypes), next(rows_met)
        experts, count = len(bounds) - 1, bounds[-1]
        total = count + 2 * rows
        draw = {
            "x": torch.randn(total, features).to(dtype),
            "residual": torch.randn(total, out).to(dtype),
            "weights": torch.randn(experts, out, features).to(dtype),
            "sums": torch.randn(experts, out),
            "biases": torch.randn(experts, out),
        }
        own = {name: guarded(t, side) for name, t in draw.items()}
        index = guarded(torch.randperm(total)[:count], side) if rows else None
        folded = kernels.FoldedWeights(own["weights"], own["sums"], own["biases"])
        tile = kernels.Tile(16, 16, 32, 2, 4, 1)
        parts = guarded(torch.rand(total, -(-features // 3), 2), side)
        with guarded_results(side):
            y, _ = kernels.expert_linear(
                own["x"],
                folded,
                own["residual"],
                index,
                bounds,
                1e-5,
                "gelu",
                statistics=None if rows else kernels.RowStatistics(parts, 3),
                with_statistics=True,
                tile=tile,
            )
        assert bool(y.isfinite().all())


def check_expert_linear_backward(kernels: Any, side: str) -> None:
    linear = importlib.import_module("beit3_fast.kernels.expert_linear")
    shapes = (((0, 1), 1, 1), ((0, 5, 12), 35, 33), ((0, 0, 17, 18), 16, 31), ((0, 3, 3), 70, 64))
    rows_met, norm_met = cycle((side == "before", side == "behind")), cycle((True, True, False))
    for bounds, features, out in shapes:
        rows, norm = next(rows_met), next(norm_met)
        experts, count = len(bounds) - 1, bounds[-1]
        total = count + 2 * rows
        sizes = {"weights": (out, features), "biases": (out,), "gammas": (features,)}
        own = {
            name: [guarded(torch.randn(size).half(), side) for _ in range(experts)]
            for name, size in sizes.items()
        }
        x, grad, z = (
            guarded(torch.randn(total, width).half(), side) for width in (features, out, out)
        )
        index = guarded(torch.randperm(total)[:count], side) if rows else None
        vectors = (own["biases"], *[own["gammas"] if norm else []] * 2)
        folded = fold(own["weights"], *vectors)
        tile = linear.Tile(16, 16, 16, 2, 4, 1)
        call = (grad, x, folded, own["weights"], *vectors, z, index, bounds, 1e-5)
        with guarded_results(side):
            found = kernels.expert_linear_backward(*call, tile=tile)
        assert all(bool(t.isfinite().all()) for t in (found[0], *found[1], *found[2], *found[3]))


def check_weight_gradient(kernels: Any, side: str) -> None:
    """The file's own functions in the place of those that the backward pass has imported."""
    backward = importlib.import_module("beit3_fast.kernels._expert_linear_backward")
    for name in ("weight_gradient", "finish"):
        setattr(backward, name, getattr(kernels, name))
    check_expert_linear_backward(backward, side)


def check_masked_linear_cross_entropy(kernels: Any, side: str) -> None:
    for total, count, features, vocabulary in ((1, 1, 1, 1), (9, 5, 35, 33), (40, 17, 16, 31)):
        x, weight, bias, grad = (
            guarded(torch.randn(shape), side)
            for shape in ((total, features), (vocabulary, features), (vocabulary,), (count,))
        )
        rows = guarded(torch.randperm(total)[:count], side)
        targets = guarded(torch.randint(vocabulary, (count,)), side)
        own, tile = (x, weight, bias, rows, targets), kernels.Tile(16, 16, 16, 4, 1)
        with guarded_results(side):
            losses, peaks = kernels.losses(*own, 0.1, tile=tile)
            part = slice(vocabulary // 2, vocabulary)
            saved = guarded(peaks, side)
            slope, sums = kernels.slopes(grad, *own, saved, 0.1, part, tile=tile)
        assert all(bool(t.isfinite().all()) for t in (losses, slope, sums))


def check_shared_attention(kernels: Any, side: str) -> None:
    from beit3_fast.layout import TokenLayout

    backward = importlib.import_module("beit3_fast.kernels._shared_attention_backward")
    layouts = [((1,), (0,)), ((0, 5, 17), (3, 7, 0)), ((16, 1), (1, 32))]
    masks = kernels.MASKS if side == "behind" else reversed(kernels.MASKS)
    heads_met, selected_met = cycle(((3, 7), (1, 88), (1, 1))), cycle((True, False))
    for lengths, mask in zip(layouts, masks, strict=True):
        (heads, width), selected = next(heads_met), next(selected_met)
        layout = TokenLayout.from_lengths(*lengths)
        draw = [torch.randn(layout.num_rows, heads * width) for _ in range(3)]
        queries = layout
        if selected:
            rows, queries = layout.select("first", "all")
            draw[0] = draw[0][rows]
        q, k, v = (guarded(t, side) for t in draw)
        segments = [
            kernels.Segments(
                guarded(own.cu_vision, side),
                guarded(own.cu_text, side),
                own.longest,
                None if own.positions is None else guarded(own.positions, side),
            )
            for own in (layout, queries)
        ]
        if mask != "causal":
            valid = torch.randint(2, (layout.num_text_rows,), dtype=torch.uint8)
            segments[0] = segments[0]._replace(valid=guarded(valid, side))
        call = (q, k, v, *segments, heads, 0.5, mask)
        for whole in (64, 0):
            tile = kernels.Tile(16, 16, 4, 1, whole)
            with guarded_results(side):
                done = kernels.shared_attention(
                    *call, with_lse=True, with_statistics=True, tile=tile
                )
            assert bool(done.o.isfinite().all())
        grad, o, lse = (guarded(t, side) for t in (torch.ones_like(q), done.o, done.lse))
        with guarded_results(side):
            found = backward.shared_attention_backward(
                grad, q, k, v, o, lse, *segments, heads, 0.5, mask, tile=tile
            )
        assert all(bool(t.isfinite().all()) for t in found)


def check_attention_rows(rows: Any, side: str) -> None:
    """The file in the place of the one that the attention kernels have imported."""
    sys.modules["beit3_fast.kernels._attention_rows"] = rows
    for name in ("shared_attention", "_shared_attention_backward"):
        importlib.reload(importlib.import_module(f"beit3_fast.kernels.{name}"))
    check_shared_attention(sys.modules["beit3_fast.kernels.shared_attention"], side)


CHECKS = {
    "_attention_rows": check_attention_rows,
    "expert_linear": check_expert_linear,
    "_expert_linear_backward": check_expert_linear_backward,
    "_weight_gradient": check_weight_gradient,
    "masked_linear_cross_entropy": check_masked_linear_cross_entropy,
    "shared_attention": check_shared_attention,
}


def check(side: str, path: Path) -> None:
    op = path.stem
    spec = importlib.util.spec_from_file_location(f"guarded_{op}", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    kernels = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = kernels
    spec.loader.exec_module(kernels)
    CHECKS[op](kernels, side)


def main(sides: str, *paths: str) -> None:
    for side in sides.split(","):
        for path in paths:
            check(side, Path(path))
    print("nothing strange was touched")


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_cases

    assert triton_cases.DEVICE == "cpu"
    main(*sys.argv[1:])
