"""Every Triton kernel with every shipped tile, as launches that are noted down instead of run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from beit3_fast.kernels._folded_weights import fold


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


def specimens(name: str) -> Iterator[Specimen]:
    """Every kernel with every shipped tile of an architecture, in bf16 (class "fp32" in fp32), all options on."""
    for shape_class in _kernels("_tiles").CLASSES["expert_linear"]:
        make = _linear_backward if "weights" in shape_class else _linear
        yield from make(shape_class, name)
    yield _head("few rows", name)
    moments = _kernels("_row_statistics")
    with recorded(moments.row_statistics_kernel) as launches:
        moments.row_statistics(torch.empty(_ROWS, 3072, dtype=torch.bfloat16))
    yield Specimen("row_statistics", "3072 features", launches[0], False, False, 1)
    with recorded(moments.join_kernel) as launches:
        moments.joined(moments.RowStatistics(torch.empty(_ROWS, 96, 2), 64), 6144)
    yield Specimen("join", "96 parts", launches[0], False, False, 1)
    for shape_class in _kernels("_tiles").CLASSES["shared_attention"]:
        yield from _attention(shape_class, name)
    for shape_class in _kernels("_tiles").CLASSES["masked_linear_cross_entropy"]:
        yield from _cross_entropy(shape_class, name)


_ROWS = 1024


def _kernels(op: str) -> Any:
    return import_module(f"beit3_fast.kernels.{op}")


def _linear(shape_class: str, name: str) -> Iterator[Specimen]:
    linear, moments = _kernels("expert_linear"), _kernels("_row_statistics")
    tile = _kernels("_tiles").choose(linear.Tile, "expert_linear", shape_class, name)
    dtype = torch.float32 if shape_class == "fp32" else torch.bfloat16
    features, out = (1001, 1003) if shape_class == "odd sizes" else (768, 3072)
    x, residual, z = (torch.empty(_ROWS, width, dtype=dtype) for width in (features, out, out))
    vectors = torch.empty(2, out)
    folded = linear.FoldedWeights(torch.empty(2, out, features, dtype=dtype), vectors, vectors)
    # As many parts as the kernel takes.
    statistics = moments.RowStatistics(torch.empty(_ROWS, 16, 2), -(-features // 16))
    options = {"statistics": statistics, "tile": tile}
    for gathered in (None, torch.empty(_ROWS, dtype=torch.int64)):
        for keeps, kept in (("", None), (", z kept", z)):
            arguments = (x, folded, residual, gathered, (0, 900, _ROWS), 1e-5, "gelu")
            with recorded(linear.expert_linear_kernel) as launches:
                # The op that keeps z asks for no statistics.
                linear.expert_linear(*arguments, z=kept, with_statistics=kept is None, **options)
            yield Specimen(
                "expert_linear",
                shape_class + (", gathered" if gathered is not None else "") + keeps,
                launches[0],
                wants_mma=shape_class != "fp32",
                wants_tma=tile.tma and gathered is None,
                per_sm=tile.per_sm,
            )


def _head(shape_class: str, name: str) -> Specimen:
    """The head over 64,010 tokens, as captioning calls it: 16 does not divide its columns."""
    linear = _kernels("expert_linear")
    tile = _kernels("_tiles").choose(linear.Tile, "expert_linear", shape_class, name)
    x, weights = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((512, 768), (64_010, 768)))
    folded = linear.FoldedWeights(weights[None], None, torch.empty(1, 64_010))
    with recorded(linear.expert_linear_kernel) as launches:
        linear.expert_linear(x, folded, None, None, (0, 512), 1e-5, "none", tile=tile)
    return Specimen(
        "expert_linear", f"{shape_class}, head", launches[0], True, tile.tma, tile.per_sm
    )


def _linear_backward(shape_class: str, name: str) -> Iterator[Specimen]:
    """The launches that only the backward pass has, at the shape of fc2, whose rows are long."""
    linear, backward = _kernels("expert_linear"), _kernels("_expert_linear_backward")
    gradient = _kernels("_weight_gradient")
    tile = _kernels("_tiles").choose(linear.Tile, "expert_linear", shape_class, name)
    dtype = torch.float32 if "fp32" in shape_class else torch.bfloat16
    x, grad, z = (torch.empty(_ROWS, width, dtype=dtype) for width in (3072, 768, 768))
    weights = [torch.empty(768, 3072, dtype=dtype)] * 2
    vectors = [[torch.empty(width, dtype=dtype)] * 2 for width in (768, 3072, 3072)]
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
        yield Specimen(
            kernel.__name__.removesuffix("_kernel"),
            shape_class,
            next(own for own in launches if own.kernel is kernel),
            wants_mma=product and dtype != torch.float32,
            wants_tma=product and tile.tma,
            per_sm=tile.per_sm if product else 1,
        )


def _attention(shape_class: str, name: str) -> Iterator[Specimen]:
    attention, backward = _kernels("shared_attention"), _kernels("_shared_attention_backward")
    ends = torch.empty(9, dtype=torch.int32)
    tile = _kernels("_tiles").choose(attention.Tile, "shared_attention", shape_class, name)
    dtype = torch.float32 if "fp32" in shape_class else torch.bfloat16
    # The longest whole rows of scores that the tile takes.
    segments = attention.Segments(ends, ends, max(197, tile.whole))
    for head_dim, mask in ((64, "bidirectional"), (64, "seq2seq"), (88, "causal")):
        q, k, v = torch.empty(_ROWS, 3 * 16 * head_dim, dtype=dtype).chunk(3, dim=1)
        call = (segments, segments, 16, 0.125, mask)
        kernels = (backward.query_gradient_kernel, backward.key_gradient_kernel)
        with recorded(attention.shared_attention_kernel, *kernels) as launches:
            if "backward" in shape_class:
                o, lse = torch.empty(q.shape, dtype=dtype), torch.empty(_ROWS, 16)
                backward.shared_attention_backward(o, q, k, v, o, lse, *call, tile=tile)
            else:
                options = {"with_lse": True, "with_statistics": True, "tile": tile}
                attention.shared_attention(q, k, v, *call, **options)
        for launch in launches:
            yield Specimen(
                launch.kernel.__name__.removesuffix("_kernel"),
                f"{shape_class}, {head_dim} wide, {mask}",
                launch,
                wants_mma=dtype != torch.float32,
                wants_tma=False,
                per_sm=1,
            )


def _cross_entropy(shape_class: str, name: str) -> Iterator[Specimen]:
    head = _kernels("masked_linear_cross_entropy")
    tile = _kernels("_tiles").choose(head.Tile, "masked_linear_cross_entropy", shape_class, name)
    dtype = torch.float32 if shape_class == "fp32" else torch.bfloat16
    x, weight, bias = (
        torch.empty(shape, dtype=dtype) for shape in ((_ROWS, 768), (8192, 768), (8192,))
    )
    rows, grad, peaks = torch.arange(160), torch.empty(160), torch.empty(160, 2)
    operands = (x, weight, bias, rows, rows)
    with recorded(head.loss_kernel, head.slope_kernel) as launches:
        head.losses(*operands, 0.1, tile=tile)
        head.slopes(grad, *operands, peaks, 0.1, slice(4096, 8192), tile=tile)
    for launch, part in zip(launches, ("loss", "slope"), strict=True):
        wants = dtype != torch.float32
        yield Specimen(f"masked_linear_cross_entropy {part}", shape_class, launch, wants, False, 1)
