"""What the seconds of one case say: speeds, fractions of this machine's ceilings, ratios within the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from beit3_fast.model.work import Work
from beit3_fast.timing import Samples, quantiles, rates, speed_ups
from bench.baselines import OURS, RUNTIMES
from bench.cost_model import measured, split, workload_floor

Row = dict[str, Any]
UNMEASURED: Row = {
    "samples_per_s": None,
    "latency_ms": None,
    "rounds": 0,
    "peak_memory_mib": None,
    "ceiling_fraction": None,
    "tile_loop_fraction": None,
    "floor_ms": None,
    "onednn_fraction": None,
}


def speed(
    case: Row,
    work: Work,
    products: str,
    seconds: list[float],
    ceilings: Mapping[str, Any],
    bare: list[float] | None,
) -> Row:
    """The figures of one runtime under the keys of UNMEASURED; those without a measured rate stay None.

    case: the workload's name, the dtype and the batch. products: the dtype of the products with weights; attention is
    counted in that of the case. bare: the seconds of nothing but these products, in the same rounds.
    """
    middle, dtype = quantiles(seconds).p50, case["dtype"]
    own_rates = measured(ceilings)
    known = own_rates is not None and {products, dtype} <= own_rates.tflops.keys()
    floor = workload_floor(work, own_rates, dtype, products) if own_rates and known else None
    return UNMEASURED | {
        "samples_per_s": _quantiles(seconds, case["batch"]),
        "latency_ms": round_figure(middle * 1e3),
        "rounds": len(seconds),
        "ceiling_fraction": _fraction(work, products, dtype, ceilings["matmul_tflops"], middle),
        "tile_loop_fraction": _fraction(
            work, products, dtype, ceilings["tile_loop_tflops"], middle
        ),
        "floor_ms": None if floor is None else round_figure(1e3 * floor),
        "onednn_fraction": round_figure(speed_ups(seconds, bare).p50) if bare else None,
    }


def _fraction(
    work: Work, products: str, dtype: str, tflops: Mapping[str, float | None], seconds: float
) -> float | None:
    """The time of the operations alone, at the measured rates, as a fraction of `seconds`."""
    weights, attention = split(work)
    least = 0.0
    for part, part_dtype in ((weights, products), (attention, dtype)):
        rate = tflops.get(part_dtype)
        if not rate:
            return None
        least += part.flops / rate / 1e12
    return round_figure(least / seconds)


def bare_speed(case: Row, work: Work, products: str, seconds: list[float]) -> Row:
    """A row of the ceilings' "onednn_products"."""
    flops = sum(product.flops for product in work.products)
    return {
        **case,
        "products": products,
        "samples_per_s": _quantiles(seconds, case["batch"]),
        "tflops": round_figure(flops / quantiles(seconds).p50 / 1e12),
    }


def ratios(case: Row, samples: Samples) -> list[Row]:
    """How many times as fast ours is as each of the others, in its own dtype or in 8 bits."""
    if OURS not in samples:
        return []
    return [
        {**case, "against": name, **_ratio(samples[OURS], seconds)}
        for name, seconds in samples.items()
        if name != OURS
    ]


def peer_ratios(case: Row, samples: Samples) -> list[Row]:
    """The same of our runtime in 8 bits against those of others in the same 8 bits."""
    return [
        {**case, "runtime": ours, "against": other, **_ratio(samples[ours], samples[other])}
        for ours in samples
        for other in samples
        if are_peers(ours, other)
    ]


def are_peers(ours: str, other: str) -> bool:
    """Whether two runtimes, ours and somebody else's, round their products alike."""
    rounded = {RUNTIMES[name].products if name in RUNTIMES else None for name in (ours, other)}
    return (
        len(rounded) == 1
        and None not in rounded
        and ours.startswith(OURS)
        and not other.startswith(OURS)
    )


def _ratio(ours: list[float], other: list[float]) -> dict[str, float]:
    found = speed_ups(ours, other)
    return {
        "median": round_figure(found.p50),
        "p20": round_figure(found.p20),
        "p80": round_figure(found.p80),
    }


def _quantiles(seconds: list[float], batch: int) -> dict[str, float]:
    return {k: round_figure(v) for k, v in asdict(rates(seconds, batch)).items()}


def round_figure(value: float) -> float:
    """Four digits; NaN and infinity, which JSON does not know, are for the caller to keep out."""
    return float(f"{value:.4g}")
