"""The figures of single ops and of one image on a GPU, ours beside libraries', each group timed in turn.

    python -m bench.micro.figures products  --device cuda --out DIR/products.json
    python -m bench.micro.figures attention --device cuda
    python -m bench.micro.figures latency   --device cuda
    python -m bench.micro.figures products  --device cpu --small      the same calls in small

Products: expert_linear with LayerNorm, bias and GELU or residual at 50,432 rows of two experts, beside one bare product
of as many rows by the library. Attention: 197, 577 and 909 tokens beside PyTorch's backends, flash-attn and xformers where
they are installed. Latency: a captured forward of one image. A call that cannot run stays as a row with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import beit3_fast
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import cuda_kernels, expert_linear, shared_attention
from beit3_fast.ops.folding import folded_weights
from beit3_fast.ops.operands import Norm
from beit3_fast.timing import Effort, quantiles
from bench.events import timed_rounds

Call = Callable[[], Any]
Row = dict[str, Any]
IMPLS = ("cuda", "triton", "composite")
EFFORT, SMALL_EFFORT = Effort(5, 30, 1.0, 500), Effort(0, 1, 0.0, 1)
# Rows of images and of text: 256 images of 197 tokens, a few of them exchanged for words; and one image.
MANY, ONE, SMALL = (0, 49_152, 50_432), (0, 197), (0, 24, 37)
# Rows, features in and out of base and large, activation; without one a residual is added.
PRODUCTS = (
    (MANY, 768, 3072, "gelu"),
    (MANY, 1024, 4096, "gelu"),
    (MANY, 3072, 768, None),
    (MANY, 768, 768, None),
    (ONE, 768, 3072, "gelu"),
    (ONE, 3072, 768, None),
    (ONE, 768, 768, None),
)
SMALL_PRODUCTS = ((SMALL, 32, 64, "gelu"), (SMALL, 64, 32, None))
# Blocks that a cluster may have, each beside the others.
MOST_BLOCKS = (1, 2, 4)
# Vision and text tokens of a sample, samples, heads.
ATTENTION = ((197, 0, 256, 12), (577, 0, 64, 12), (901, 8, 64, 12))
SMALL_ATTENTION = ((9, 0, 2, 2), (13, 4, 2, 2))
HEAD_WIDTH = 64
# Triton's interpreter multiplies bf16 wrongly.
DTYPE, SMALL_DTYPE = torch.bfloat16, torch.float16
BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Group(NamedTuple):
    """Calls that give the same answer, and the floating-point operations of one (0: not counted)."""

    title: str
    flops: float
    calls: dict[str, Call]


def product_groups(device: torch.device, small: bool) -> list[Group]:
    """One group for each product."""
    dtype = SMALL_DTYPE if small else DTYPE
    return [_product(device, dtype, *own) for own in (SMALL_PRODUCTS if small else PRODUCTS)]


def _product(
    device: torch.device,
    dtype: torch.dtype,
    bounds: tuple[int, ...],
    width: int,
    out: int,
    activation: str | None,
) -> Group:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype)

    rows = bounds[-1]
    x, experts = random(rows, width), range(len(bounds) - 1)
    weights = [random(out, width, scale=width**-0.5) for _ in experts]
    options: dict[str, Any] = {
        "bounds": bounds,
        "norm": Norm(
            [1 + random(width, scale=0.1) for _ in experts], [random(width) for _ in experts]
        ),
        "activation": activation,
        "residual": None if activation else random(rows, out),
    }
    biases = [random(out) for _ in experts]
    calls: dict[str, Call] = {
        impl: partial(expert_linear, x, weights, biases, **options, impl=impl) for impl in IMPLS
    }
    for most in MOST_BLOCKS:
        own = _Launched(x, weights, biases, options, most)
        calls[f"cuda, {most} block{'s' * (most > 1)} a cluster"] = own
    calls["bare product"] = partial(F.linear, x, weights[0])
    return Group(f"{rows} rows, {width} -> {out}", 2.0 * rows * width * out, calls)


class _Launched:
    """The product alone, LayerNorm's moments given, by clusters of at most so many blocks; prepared on the first call."""

    def __init__(
        self, x: Tensor, weights: list[Tensor], biases: list[Tensor], options: Any, most: int
    ) -> None:
        self._operands = (x, weights, biases, options)
        self._most = most
        self._arguments: tuple[Any, ...] | None = None
        self.y: Tensor | None = None

    def __call__(self) -> Tensor | None:
        if self._arguments is None:
            self._arguments = self._prepared()
        cuda_kernels.launch("expert_linear", *self._arguments, most_blocks=self._most)
        return self.y

    def _prepared(self) -> tuple[Any, ...]:
        x, weights, biases, options = self._operands
        norm = options["norm"]
        folded = folded_weights(weights, [], biases, [*norm.weights], [*norm.biases])
        moments = x.new_empty(len(x), 2, dtype=torch.float32)
        cuda_kernels.launch("row_statistics", x, None, moments)
        self.y = x.new_empty(len(x), folded.weights.shape[1])
        gelu, bounds = options["activation"] == "gelu", [*options["bounds"]]
        tail = (moments, x.shape[1], norm.eps, options["residual"], None, bounds, gelu)
        return (x, *folded, *tail, self.y, None)


def attention_groups(device: torch.device, small: bool) -> list[Group]:
    """One group for each number of tokens."""
    dtype = SMALL_DTYPE if small else DTYPE
    sizes = SMALL_ATTENTION if small else ATTENTION
    return [_attention(device, dtype, *own) for own in sizes]


def _attention(
    device: torch.device, dtype: torch.dtype, vision: int, text: int, samples: int, heads: int
) -> Group:
    tokens, width = vision + text, heads * HEAD_WIDTH
    layout = TokenLayout.from_lengths([vision] * samples, [text] * samples, device)
    packed = torch.randn(samples * tokens, 3 * width, device=device).to(dtype)
    q, k, v = packed.split(width, dim=1)
    calls: dict[str, Call] = {
        impl: partial(shared_attention, q, k, v, layout, num_heads=heads, impl=impl)
        for impl in IMPLS
    }
    # [B, N, 3, H, D]: what a library reads from one fused product.
    fused = packed.view(samples, tokens, 3, heads, HEAD_WIDTH)
    own = [part.transpose(1, 2) for part in fused.unbind(2)]
    for name, backend in BACKENDS.items():
        calls[name] = partial(_sdpa, backend, own)
    calls["flash-attn"] = partial(_library, "flash_attn", "flash_attn_func", fused.unbind(2))
    xformers = ("xformers.ops", "memory_efficient_attention")
    calls["xformers"] = partial(_library, *xformers, fused.unbind(2))
    return Group(
        f"{samples} x {tokens} tokens, {heads} heads", 4.0 * samples * tokens**2 * width, calls
    )


def _sdpa(backend: SDPBackend, operands: list[Tensor]) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = operands
        return F.scaled_dot_product_attention(q, k, v)


def _library(module: str, function: str, operands: tuple[Tensor, ...]) -> Any:
    if find_spec(module.split(".")[0]) is None:
        raise ModuleNotFoundError(f"{module.split('.')[0]} is not installed")
    return getattr(import_module(module), function)(*operands)


def latency_groups(device: torch.device, small: bool) -> list[Group]:
    """One image through the backbone, captured; without a GPU the same buffers without a graph."""
    name = "beit3_tiny_patch16_32" if small else "beit3_base_patch16_224"
    dtype = SMALL_DTYPE if small else DTYPE
    calls: dict[str, Call] = {
        impl: _Captured(name, impl, dtype, device) for impl in ("auto", *IMPLS)
    }
    return [Group(f"{name}, one image", 0.0, calls)]


class _Captured:
    """Captures on the first call, so that an implementation that cannot is a row with its reason."""

    def __init__(self, name: str, impl: str, dtype: torch.dtype, device: torch.device) -> None:
        self._make = partial(_capture, name, impl, dtype, device)
        self._run: Call | None = None

    def __call__(self) -> Any:
        if self._run is None:
            self._run = self._make()
        return self._run()


def _capture(name: str, impl: str, dtype: torch.dtype, device: torch.device) -> Call:
    model: Any = beit3_fast.create_model(name, device=device, dtype=dtype, impl=impl)
    image = torch.randn(1, 3, *model.config.image_shape, device=device).to(dtype)
    captured = model.eval().capture(visual_tokens=image, graphs=device.type == "cuda")
    return partial(captured, visual_tokens=image)


GROUPS: dict[str, Callable[[torch.device, bool], list[Group]]] = {
    "products": product_groups,
    "attention": attention_groups,
    "latency": latency_groups,
}


@torch.inference_mode()
def measure(group: Group, device: torch.device, effort: Effort) -> list[Row]:
    """A row for each call: median milliseconds and TFLOP/s of useful operations, or why it did not run."""
    able: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for name, call in group.calls.items():
        try:
            call()
            able[name] = call
        except Exception as error:
            reasons[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    samples = timed_rounds(able, effort, device)
    rows: list[Row] = []
    for name in group.calls:
        row: Row = {"what": group.title, "runtime": name, "ms": None, "tflops": None}
        if name in able:
            seconds = quantiles(samples[name]).p50
            row["ms"] = float(f"{1e3 * seconds:.4g}")
            if group.flops:
                row["tflops"] = float(f"{group.flops / seconds / 1e12:.4g}")
        else:
            row["reason"] = reasons[name]
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints the rows, one line of JSON each; 1 where none of ours ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=tuple(GROUPS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="sizes for a CPU and the interpreter")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    options = parser.parse_args(arguments)
    device, effort = torch.device(options.device), SMALL_EFFORT if options.small else EFFORT
    rows: list[Row] = []
    for group in GROUPS[options.figure](device, options.small):
        own = measure(group, device, effort)
        for row in own:
            print(json.dumps(row), flush=True)
        rows += own
        # After every group, so that one that hangs loses no other.
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            content = {"figure": options.figure, "rows": rows}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
    ours = [row for row in rows if row["runtime"] in IMPLS and row["ms"]]
    return 0 if ours else 1


if __name__ == "__main__":
    sys.exit(main())
