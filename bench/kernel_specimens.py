"""Every Triton kernel with every shipped tile, as launches that are noted down instead of run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from beit3_fast.kernels._folded_weights import fold

from bench.kernel_residency import wanted


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments by name, with compile-time constants and options apart."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


@contextmanager
def recorded(*kernels: Any) -> Iterator[list[Launch]]:
    """Within it, launches of these kernels are noted down instead of run."""
    launches: list[Launch] = []

    def note(kernel: Any) -> Callable[..., None]:
        def run(*args: Any, grid: Any, warmup: bool, **named: Any) -> None:
            parameters = {p.name: p for p in kernel.params}
            options = {key: named.pop(key) for key in [*named] if key not in parameters}
            given = dict(zip(parameters, args, strict=False)) | named
            constants = {
                name: value
                for name, value in given.items()
                if parameters[name].is_constexpr or value is None
            }
            arguments = {name: value for name, value in given.items() if name not in constants}
            launches.append(Launch(kernel, arguments, constants, options))

        return run

    before = [kernel.run for kernel in kernels]
    for kernel in kernels:
        kernel.run = note(kernel)
    try:
        yield launches
    finally:
        for kernel, run in zip(kernels, before, strict=True):
            kernel.run = run


@dataclass(frozen=True)
class Specimen:
    """One kernel as it ships: its launch, and what its code must hold."""

    name: str
    shape_class: str
    launch: Launch
    wants_mma: bool
    wants_tma: bool
    per_sm: int


class Heads(NamedTuple):
    """One form of an attention launch: the width of a head, the mask, whether the queries are a selection of the rows,
    whether some rows are padding."""

    width: int
    mask: str
    selected: bool = False
    padded: bool = False

    def __str__(self) -> str:
        own = f"{self.width} wide, {self.mask}"
        return own + ", selected" * self.selected + ", padded" * self.padded


# Narrow heads have registers to spare, whatever the mask.
HEADS = (
    Heads(64, "bidirectional"),
    Heads(64, "seq2seq", selected=True),
    Heads(64, "causal"),
    *(Heads(88, mask) for mask in ("bidirectional", "seq2seq", "causal")),
    *(Heads(88, mask, selected=True) for mask in ("bidirectional", "seq2seq", "causal")),
    Heads(64, "bidirectional", padded=True),
    Heads(64, "seq2seq", selected=True, padded=True),
    *(Heads(88, mask, padded=True) for mask in ("bidirectional", "seq2seq", "causal")),
    Heads(88, "seq2seq", selected=True, padded=True),
)
# Features and columns of products that have a tile of their own; the others have those of base.
_PRODUCTS = {"odd sizes": ((1001, 1003), (588, 1408))}
# Classes of a head: visual tokens, and words, which 16 does not divide.
_VOCABULARIES = (8192, 64_010)
# Keys of a sample: whole rows of scores, steps over them, and (None) the gradients.
_LONGEST = (197, 577, None)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {torch.float16: ", fp16"}
_ROWS = 1024


def specimens(name: str) -> Iterator[Specimen]:
    """Every kernel with every shipped tile of an architecture, in each dtype of the tile's class, all options on."""
    classes = _kernels("_tiles").CLASSES
    for shape_class in classes["expert_linear"]:
        if shape_class == "odd columns":
            continue
        make = _linear_backward if "weights" in shape_class else _linear
        for dtype in _dtypes(shape_class):
            yield from make(shape_class, name, dtype)
    for shape_class in ("few rows", "odd columns"):
        for dtype in _dtypes(shape_class):
            yield _head(shape_class, name, dtype)
    yield from _statistics(name)
    for heads in HEADS:
        for longest in _LONGEST:
            for dtype in _DTYPES:
                # In fp32, and where rows are padding, all lengths have one tile.
                if longest != 577 or not (dtype == torch.float32 or heads.padded):
                    yield from _attention(name, dtype, heads, longest)
    for shape_class in classes["masked_linear_cross_entropy"]:
        for dtype in _dtypes(shape_class):
            for vocabulary in _VOCABULARIES:
                yield from _cross_entropy(shape_class, name, dtype, vocabulary)


def _kernels(op: str) -> Any:
    return import_module(f"beit3_fast.kernels.{op}")


def _dtypes(shape_class: str) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if "fp32" in shape_class else (torch.bfloat16, torch.float16)


def _statistics(name: str) -> Iterator[Specimen]:
    moments = _kernels("_row_statistics")
    with recorded(moments.row_statistics_kernel) as launches:
        moments.row_statistics(torch.empty(_ROWS, 3072, dtype=torch.bfloat16))
    per_sm = wanted("row_statistics", "3072 features", name)
    yield Specimen("row_statistics", "3072 features", launches[0], False, False, per_sm)
    with recorded(moments.join_kernel) as launches:
        moments.joined(moments.RowStatistics(torch.empty(_ROWS, 96, 2), 64), 6144)
    per_sm = wanted("join", "96 parts", name)
    yield Specimen("join", "96 parts", launches[0], False, False, per_sm)


def _linear(shape_class: str, name: str, dtype: torch.dtype) -> Iterator[Specimen]:
    for features, out in _PRODUCTS.get(shape_class, ((768, 3072),)):
        sizes = f", {features} to {out}" if shape_class in _PRODUCTS else ""
        for gathered in (False, True):
            # What is kept is of the same dtype as the result: fp16 differs in nothing else.
            for keeps in (False, True)[: 1 + (dtype != torch.float16)]:
                own = shape_class + sizes + ", gathered" * gathered + ", z kept" * keeps
                launch, tile = _product(shape_class, name, dtype, features, out, gathered, keeps)
                yield Specimen(
                    "expert_linear",
                    own + _NAMES.get(dtype, ""),
                    launch,
                    wants_mma=dtype != torch.float32,
                    wants_tma=tile.tma and not gathered,
                    per_sm=tile.per_sm,
                )


def _product(
    shape_class: str,
    name: str,
    dtype: torch.dtype,
    features: int,
    out: int,
    gathered: bool,
    keeps: bool,
) -> tuple[Launch, Any]:
    linear, moments = _kernels("expert_linear"), _kernels("_row_statistics")
    tile = _kernels("_tiles").choose(linear.Tile, "expert_linear", shape_class, name)
    x, residual, z = (torch.empty(_ROWS, width, dtype=dtype) for width in (features, out, out))
    vectors = torch.empty(2, out)
    folded = linear.FoldedWeights(torch.empty(2, out, features, dtype=dtype), vectors, vectors)
    rows = torch.empty(_ROWS, dtype=torch.int64) if gathered else None
    # As many parts as the kernel takes.
    statistics = moments.RowStatistics(torch.empty(_ROWS, 16, 2), -(-features // 16))
    with recorded(linear.expert_linear_kernel) as launches:
        linear.expert_linear(
            *(x, folded, residual, rows, (0, 900, _ROWS), 1e-5, "gelu"),
            statistics=statistics,
            # The op that keeps z asks for no statistics.
            with_statistics=not keeps,
            z=z if keeps else None,
            tile=tile,
        )
    return launches[0], tile


def _head(shape_class: str, name: str, dtype: torch.dtype) -> Specimen:
    """The head over 64,010 tokens, as captioning calls it: 16 does not divide its columns."""
    linear = _kernels("expert_linear")
    tile = _kernels("_tiles").choose(linear.Tile, "expert_linear", shape_class, name)
    x, weights = (torch.empty(shape, dtype=dtype) for shape in ((512, 768), (64_010, 768)))
    folded = linear.FoldedWeights(weights[None], None, torch.empty(1, 64_010))
    with recorded(linear.expert_linear_kernel) as launches:
        linear.expert_linear(x, folded, None, None, (0, 512), 1e-5, "none", tile=tile)
    own = f"{shape_class}, head" + _NAMES.get(dtype, "")
    return Specimen("expert_linear", own, launches[0], True, tile.tma, tile.per_sm)


def _linear_backward(shape_class: str, name: str, dtype: torch.dtype) -> Iterator[Specimen]:
    """The launches that only the backward pass has, at the shape of fc2, whose rows are long, and at odd sizes."""
    linear, backward = _kernels("expert_linear"), _kernels("_expert_linear_backward")
    gradient = _kernels("_weight_gradient")
    tile = _kernels("_tiles").choose(linear.Tile, "expert_linear", shape_class, name)
    features, out = (1001, 1003) if "odd" in shape_class else (3072, 768)
    x, grad, z = (torch.empty(_ROWS, width, dtype=dtype) for width in (features, out, out))
    weights = [torch.empty(out, features, dtype=dtype)] * 2
    vectors = [[torch.empty(width, dtype=dtype)] * 2 for width in (out, features, features)]
    folded = fold(weights, *vectors)
    rows = torch.arange(_ROWS)
    kernels = (
        backward.slope_kernel,
        backward.norm_backward_kernel,
        gradient.weight_gradient_kernel,
        gradient.finish_kernel,
    )
    with recorded(linear.expert_linear_kernel, *kernels) as launches:
        arguments = (grad, x, folded, weights, *vectors, z, rows, (0, 900, _ROWS), 1e-5)
        backward.expert_linear_backward(*arguments, tile=tile)
    for kernel in kernels:
        product = kernel is gradient.weight_gradient_kernel
        own = kernel.__name__.removesuffix("_kernel")
        yield Specimen(
            own,
            shape_class + _NAMES.get(dtype, ""),
            next(launch for launch in launches if launch.kernel is kernel),
            wants_mma=product and dtype != torch.float32,
            wants_tma=product and tile.tma,
            per_sm=tile.per_sm if product else wanted(own, shape_class, name),
        )


def _attention(
    name: str, dtype: torch.dtype, heads: Heads, longest: int | None
) -> Iterator[Specimen]:
    attention, backward = _kernels("shared_attention"), _kernels("_shared_attention_backward")
    ends = torch.empty(9, dtype=torch.int32)
    looked_up = heads.padded or (heads.selected and longest is None)
    shape_class = attention.shape_class(dtype, heads.width, longest, looked_up=looked_up)
    tile = _kernels("_tiles").choose(attention.Tile, "shared_attention", shape_class, name)
    # The longest whole rows of scores that the tile takes.
    keys = attention.Segments(ends, ends, max(longest or 197, tile.whole))
    if heads.padded:
        keys = keys._replace(valid=torch.empty(_ROWS, dtype=torch.uint8))
    queries = keys
    if heads.selected:
        queries = keys._replace(positions=torch.empty(_ROWS, dtype=torch.int32))
    q, k, v = torch.empty(_ROWS, 3 * 16 * heads.width, dtype=dtype).chunk(3, dim=1)
    call = (keys, queries, 16, 0.125, heads.mask)
    kernels = (backward.query_gradient_kernel, backward.key_gradient_kernel)
    with recorded(attention.shared_attention_kernel, *kernels) as launches:
        if longest is None:
            o, lse = torch.empty(q.shape, dtype=dtype), torch.empty(_ROWS, 16)
            backward.shared_attention_backward(o, q, k, v, o, lse, *call, tile=tile)
        else:
            options = {"with_lse": True, "with_statistics": True, "tile": tile}
            attention.shared_attention(q, k, v, *call, **options)
    for launch in launches:
        own = launch.kernel.__name__.removesuffix("_kernel")
        yield Specimen(
            own,
            f"{shape_class}, {heads}" + _NAMES.get(dtype, ""),
            launch,
            wants_mma=dtype != torch.float32,
            wants_tma=False,
            per_sm=wanted(own, shape_class, name),
        )


def _cross_entropy(
    shape_class: str, name: str, dtype: torch.dtype, vocabulary: int
) -> Iterator[Specimen]:
    head = _kernels("masked_linear_cross_entropy")
    tile = _kernels("_tiles").choose(head.Tile, "masked_linear_cross_entropy", shape_class, name)
    x, weight, bias = (
        torch.empty(shape, dtype=dtype)
        for shape in ((_ROWS, 768), (vocabulary, 768), (vocabulary,))
    )
    rows, grad, peaks = torch.arange(160), torch.empty(160), torch.empty(160, 2)
    operands = (x, weight, bias, rows, rows)
    with recorded(head.loss_kernel, head.slope_kernel) as launches:
        head.losses(*operands, 0.1, tile=tile)
        head.slopes(grad, *operands, peaks, 0.1, slice(4096, vocabulary), tile=tile)
    for launch, part in zip(launches, ("loss", "slope"), strict=True):
        own = f"masked_linear_cross_entropy {part}"
        yield Specimen(
            own,
            f"{shape_class}, {vocabulary} classes" + _NAMES.get(dtype, ""),
            launch,
            wants_mma=dtype != torch.float32,
            wants_tma=False,
            per_sm=wanted(own, shape_class, name),
        )
