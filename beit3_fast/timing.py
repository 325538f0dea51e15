"""Times several runtimes in turn, A B A B, so that whatever the machine does meanwhile befalls them all.

A speed-up is the median of the ratios of neighbouring samples, never the ratio of two medians: clocks,
other users and temperature change from second to second, and neighbours share them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Effort:
    """How long one set of runtimes is timed.

    warmup: calls of each runtime that are not counted.
    rounds: rounds that are taken at least; a round is one call of each runtime.
    seconds: rounds go on for this long, up to `most` of them.
    """

    warmup: int = 2
    rounds: int = 7
    seconds: float = 15.0
    most: int = 50


@dataclass(frozen=True)
class Quantiles:
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def interleave(
    calls: Mapping[str, Callable[[], object]],
    effort: Effort,
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Seconds of every call, one list per runtime, all of the same length.

    Sample i of all runtimes was taken in the same round, in the order of `calls`.
    """
    for _ in range(effort.warmup):
        for call in calls.values():
            call()
    synchronize()
    samples: Samples = {name: [] for name in calls}
    start = clock()
    for done in range(effort.most):
        if done >= effort.rounds and clock() - start >= effort.seconds:
            break
        for name, call in calls.items():
            before = clock()
            call()
            synchronize()
            samples[name].append(clock() - before)
    return samples


def quantiles(values: list[float]) -> Quantiles:
    """Quantiles by linear interpolation. Raises ValueError for no values."""
    if not values:
        raise ValueError("quantiles need at least one sample")
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, mid, high = torch.quantile(torch.tensor(values, dtype=torch.float64), points).tolist()
    return Quantiles(low, mid, high)


def speed_ups(ours: list[float], other: list[float]) -> Quantiles:
    """How many times faster `ours` is than `other`, from the seconds of the same rounds.

    Raises:
        ValueError: the two lists do not come from the same rounds.
    """
    if len(ours) != len(other):
        raise ValueError(f"samples of the same rounds are needed, got {len(ours)} and {len(other)}")
    return quantiles([b / a for a, b in zip(ours, other, strict=True)])


def rates(seconds: list[float], batch: int) -> Quantiles:
    """Samples per second at the 20th, 50th and 80th percentile."""
    return quantiles([batch / s for s in seconds])


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until the device has finished; nothing to do on a CPU."""
    if device.type == "cuda":
        return torch.cuda.synchronize
    return lambda: None
