"""How fast a run is: samples a second, and which share of what the device can do at most the model makes use of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from beit3_fast.ops import expert_linear
from beit3_fast.train.options import TrainOptions

# Side of a square product that comes near the most a device can do, and how often it is timed.
_SIDE = {"cpu": 1024, "cuda": 8192}
_TIMES = 4


class Throughput:
    """Measures steps. The MFU (model FLOPs utilisation) is the work that the model's ``work`` counts, without what is computed
    again for checkpointing, by the time of a step and by ``options.peak_tflops`` or ``measured_peak`` on each of the
    ``devices``. What drop path leaves out is counted as if it were done."""

    def __init__(self, model: nn.Module, options: TrainOptions, devices: int = 1) -> None:
        self._work = getattr(model, "work", None)
        self._peak: float | None = None
        if self._work is not None:
            place = next(model.parameters()).device
            dtype = getattr(torch, options.precision)
            given = options.peak_tflops
            own = measured_peak(place, dtype) if given is None else given * 1e12
            self._peak = own * devices

    def done(self, micro: Sequence[Any]) -> dict[str, float]:
        """``samples`` of these micro-batches, and their ``flops`` where the model counts its work."""
        found = {"samples": sum(batch.num_samples for batch in micro)}
        if self._work is not None:
            found["flops"] = sum(self._work(batch).flops for batch in micro)
        return found

    def of(self, done: Mapping[str, float], seconds: float) -> dict[str, float]:
        """``samples_per_s`` of a step in which all devices did this, and ``mfu`` where it counts work: in [0, 1], but for
        noise and drop path."""
        found = {"samples_per_s": done["samples"] / seconds}
        if self._peak is not None:
            found["mfu"] = done["flops"] / seconds / self._peak
        return found

    @staticmethod
    def said(line: Mapping[str, Any]) -> str:
        """The same for people."""
        rate = f"{line['samples_per_s']:.1f} samples/s"
        return f"{rate}, MFU {line['mfu']:.1%}" if "mfu" in line else rate


@lru_cache(maxsize=8)
@torch.no_grad()
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square products: PyTorch's in ``dtype`` and in float32, which stands for a ``dtype``
    that the device emulates, and on a CPU ``expert_linear`` in ``dtype``, which may outrun PyTorch there."""
    side = _SIDE.get(device.type, _SIDE["cpu"])
    # The model's random numbers are those of the run, which must not depend on what is measured.
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=draw).to(device) for _ in range(2))
    own_a, own_b = a.to(dtype), b.to(dtype)
    products = [partial(torch.mm, x, y) for x, y in ((own_a, own_b), (a, b))]
    if device.type == "cpu":
        products.append(partial(expert_linear, own_a, [own_b], bounds=(0, side)))
    return 2 * side**3 / min(_seconds(product, device) for product in products)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest time that it takes."""
    least = float("inf")
    for _ in range(_TIMES):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        least = min(least, time.perf_counter() - start)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
