"""Floors on a named GPU: what ops and workloads take at least, and how much of attention's tiles is of use.

    python -m bench.roofline --gpu h200                                  ops, tiles, the workloads of `make gpu`
    python -m bench.roofline --gpu h200 --workload vqa/base/480 --batch 64
    python -m bench.roofline --gpu h200 --report DIR/report.json         at the ceilings that a run measured
    python -m bench.roofline --gpu h200 --json                           the same as JSON
    python -m bench.roofline --write                                     docs/roofline.md again

The model of a floor is bench/cost_model.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from beit3_fast.config import SIZES
from beit3_fast.errors import Beit3FastError
from beit3_fast.model.work import Product, attention_scores
from bench import cost_model as model
from bench import report as reports
from bench.cost_model import Rates
from bench.workloads import parse_workload

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "roofline.md"
WORKLOADS = {
    "image/base/224": 256,
    "image/large/224": 256,
    "vqa/base/480": 64,
    "retrieval-text/base/384": 256,
    "train/base/224": 128,
    "train-vqa/base/480": 32,
    "caption/base/480": 64,
    "image/giant/224": 256,
    "pair/giant/224": 256,
}
HEAD_WIDTHS = (64, 88)
TOKENS = (197, 577, 901)
IMAGES = 256
ROWS = IMAGES * 197
SAMPLES = 64
# Vision and text tokens of a sample, and the mask: images of three sizes, a caption that is written, text alone.
ATTENTION = (
    *((tokens, 0, "bidirectional") for tokens in TOKENS),
    (901, 20, "seq2seq"),
    (0, 64, "causal"),
)
# Those of visual codes and of words; rows: 40 % of the patches of 64 images of 196, about.
CLASSES = (8192, 64010)
MASKED_ROWS = 5120
# Bytes of a number of a product's result in float8: bf16 for attention and the residual stream, 1 more where the
# next product reads it, and 1 alone behind GELU.
_FLOAT8_WRITTEN = {"qkv": 2.0, "out": 3.0, "fc1": 1.0, "fc2": 3.0}


def products(size: str, rows: int) -> dict[str, Product]:
    """The four products of a layer."""
    config = SIZES[size]
    width, ffn = config.embed_dim, config.ffn_dim
    return {
        "qkv": Product(rows, width, 3 * width),
        "out": Product(rows, width, width, residual=True),
        "fc1": Product(rows, width, ffn),
        "fc2": Product(rows, ffn, width, residual=True),
    }


def op_rows(
    rates: Rates, sizes: Sequence[str] = ("base", "large", "giant")
) -> list[dict[str, Any]]:
    """The floors of the ops, forward and backward."""
    found = []
    for size in sizes:
        costs = _ops(size, "bfloat16")
        found += [_op_row(op, size, "bfloat16", cost, rates) for op, cost in costs.items()]
        if "float8" in rates.tflops:
            for name, product in products(size, ROWS).items():
                cost = model.linear_cost(product, model.BYTES["float8"], _FLOAT8_WRITTEN[name])
                found.append(_op_row(_product_name(name, product), size, "float8", cost, rates))
    return found


def _product_name(name: str, product: Product) -> str:
    return f"{name} {product.width} -> {product.out}"


def _ops(size: str, dtype: str) -> dict[str, model.Cost]:
    """The ops of a size with what they cost, in the order of a forward."""
    config = SIZES[size]
    width = config.embed_dim
    found = {f"patch embedding, {IMAGES} images": model.patch_embedding_cost(config, IMAGES, dtype)}
    for name, product in products(size, ROWS).items():
        own = _product_name(name, product)
        found[own] = model.linear_cost(product, model.BYTES[dtype])
        of_rows, of_weights = model.linear_backward_costs(
            product, model.BYTES[dtype], gelu=name == "fc1"
        )
        found |= {f"{own}, gradient of rows": of_rows, f"{own}, gradient of weights": of_weights}
    for vision, text, mask in ATTENTION:
        one = attention_scores(vision, text, mask)
        size_of_all = SAMPLES * one, SAMPLES * (vision + text), width, dtype
        words = [f"{SAMPLES} x {vision + text} tokens"]
        words += [f"{text} of text"] * bool(vision and text) + [mask] * (mask != "bidirectional")
        found["attention, " + ", ".join(words)] = model.attention_cost(*size_of_all)
        found["attention backward, " + ", ".join(words)] = model.attention_backward_cost(
            *size_of_all
        )
    for classes in CLASSES:
        head = MASKED_ROWS, width, classes, dtype
        name = f"cross entropy, {MASKED_ROWS:,} rows of {classes:,} classes"
        found[name] = model.cross_entropy_cost(*head)
        found[f"{name}, backward"] = model.cross_entropy_backward_cost(*head)
    return found


def _op_row(op: str, size: str, dtype: str, cost: model.Cost, rates: Rates) -> dict[str, Any]:
    floor = model.floor(cost, rates, dtype)
    return {
        "op": op,
        "size": size,
        "dtype": dtype,
        "gflop": cost.flops / 1e9,
        "mb": cost.bytes / 1e6,
        "memory_us": 1e6 * floor.memory,
        "products_us": 1e6 * floor.products,
        "floor_us": 1e6 * floor.seconds,
        "bound": floor.bound,
    }


def workload_row(name: str, batch: int, rates: Rates, dtype: str = "bfloat16") -> dict[str, Any]:
    """The floor of a workload with the benchmark's own inputs. Raises ConfigError for an unknown one."""
    workload = parse_workload(name, SIZES)
    work = workload.work(workload.inputs(batch))
    cost = sum(model.launches(work, dtype), model.Cost(0, 0))
    seconds = model.workload_floor(work, rates, dtype)
    return {
        "workload": name,
        "batch": batch,
        "dtype": dtype,
        "gflop": cost.flops / 1e9 / batch,
        "mb": cost.bytes / 1e6 / batch,
        "products_ms": 1e3 * model.floor(cost, rates, dtype).products,
        "floor_ms": 1e3 * seconds,
        "samples_per_s": batch / seconds,
    }


def tile_rows() -> list[dict[str, Any]]:
    """The useful share of attention's scores for each shipped file of tiles, head width and direction."""
    found = []
    for name in model._tiles.ARCHITECTURES:
        if name == "interpreter":
            continue
        for width in HEAD_WIDTHS:
            for direction in ("forward", "backward"):
                share = partial(model.tile_share, tiles=name, head_width=width)
                row: dict[str, Any] = {"tiles": name, "head width": width, "direction": direction}
                row |= {
                    str(tokens): share(tokens, backward=direction == "backward")
                    for tokens in TOKENS
                }
                found.append(row)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The tables of ``roofline`` for a screen or a document."""
    rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in found["tflops"].items())
    lines = [
        f"{found['gpu']}: {rates} TFLOP/s, {found['gbps']:g} GB/s ({found['source']}).",
        "",
        f"Ops; products of {ROWS:,} rows ({IMAGES} images of 197 tokens):",
        "",
        *_table(found["ops"]),
        "",
        "Workloads; GFLOP and MB a sample, the floors of the launches added up:",
        "",
        *_table(found["workloads"]),
        "",
        "Useful part of the scores that the Triton attention kernel multiplies, by tokens:",
        "",
        *_table(found["tiles"]),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["(none)"]
    marks = ["---:" if isinstance(value, (int, float)) else "---" for value in rows[0].values()]
    lines = [[key.replace("_", " ") for key in rows[0]], marks]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def roofline(name: str, workloads: dict[str, int], ceilings: dict[str, Any]) -> dict[str, Any]:
    """All tables of a GPU as data. ``ceilings``: those of a report, empty for the data sheet's."""
    gpu = model.gpu(name)
    rates = model.measured(ceilings, gpu.rates) or gpu.rates
    return {
        "gpu": gpu.name,
        "source": rates.source,
        "tflops": dict(rates.tflops),
        "gbps": rates.gbps,
        "ops": op_rows(rates),
        "workloads": [workload_row(own, batch, rates) for own, batch in workloads.items()],
        "tiles": tile_rows(),
    }


def document() -> str:
    """docs/roofline.md."""
    start = (
        "# What ops and workloads take at least\n\n"
        "Written by `python -m bench.roofline --write`; a run's own ceilings: `--report DIR/report.json`. How a floor is\n"
        "reckoned is in `bench/cost_model.py`. Nothing here was measured.\n\n"
    )
    return start + markdown(roofline("h200", WORKLOADS, {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; 2 for an unknown GPU, workload or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(model.GPUS)}")
    parser.add_argument("--workload", nargs="+", metavar="T/S/R", help="task/size/resolution")
    parser.add_argument("--batch", type=int, help="its samples; default: as in make gpu, or 64")
    parser.add_argument("--report", type=Path, help="a report.json, whose ceilings are taken")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    options = parser.parse_args(arguments)
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch takes a positive number, got {options.batch}")
    if options.write:
        DOCUMENT.write_text(document(), encoding="utf-8")
        return 0
    try:
        ceilings = reports.load(options.report)["ceilings"] if options.report else {}
        names = options.workload or list(WORKLOADS)
        chosen = {name: options.batch or WORKLOADS.get(name, 64) for name in names}
        found = roofline(options.gpu, chosen, ceilings)
    except Beit3FastError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else markdown(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
