"""What a runtime of the benchmark is, and how its results are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from beit3_fast.parity import Parity, model_parity
from bench.workloads import Workload

Weights = Mapping[str, Tensor]
Build = Callable[[Workload, Weights, torch.dtype, torch.device], nn.Module]
Obstacle = Callable[[Workload, torch.dtype, torch.device], str | None]
# To round weights by channel and rows by row to 8 bits, in plain PyTorch calls and fp32, costs six workloads 0.029 to 0.042
# (this package, whose heads are not rounded, 0.023 to 0.038); half as much again is more than rounding.
INT8_BOUND = 0.06
# Two factors of a product rounded to e4m3 have an error of 2.7 % each, four times that of int8.
FLOAT8_BOUND = 0.2
BOUNDS = {"int8": INT8_BOUND, "float8": FLOAT8_BOUND}


@dataclass(frozen=True)
class Runtime:
    """One way to run BEiT-3.

    about: what it is and how it is set up, for --help and the report.
    build: (workload, weights, dtype, device) -> a module that takes the workload's inputs.
    impl: what the runtime chose to run with, for the report.
    obstacle: (workload, dtype, device) -> why it cannot run, or None.
    default: whether it is in the report when no runtimes are named.
    costly: whether it takes minutes to convert or compile. It then runs only where asked; its memory,
        which would be that of the conversion, is not measured.
    gate: whether a result out of parity stops the benchmark. Others are shown with their error.
    judge: (its output, torchscale's in fp32, torchscale's in its dtype, gradient=...) -> the verdict.
    products: what both factors of its products with weights are rounded to, a key of BOUNDS; None: the row's dtype.
    """

    about: str
    build: Build
    impl: Callable[[nn.Module], str]
    obstacle: Obstacle = lambda workload, dtype, device: None
    default: bool = True
    costly: bool = False
    gate: bool = True
    judge: Callable[..., Parity] = model_parity
    products: str | None = None


def converted(
    about: str,
    build: Build,
    impl: str,
    obstacle: Obstacle,
    judge: Callable[..., Parity] = model_parity,
    products: str | None = None,
) -> Runtime:
    """A runtime of somebody else that converts or compiles torchscale's model first."""

    def reason(workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        if workload.task.train:
            return "runs inference only"
        return obstacle(workload, dtype, device)

    return Runtime(
        about,
        build,
        lambda model: impl,
        reason,
        costly=True,
        gate=False,
        judge=judge,
        products=products,
    )


def missing(*packages: str) -> str | None:
    """What to say if some of these packages are not installed."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"not installed: {', '.join(absent)} (make bench-baselines)" if absent else None


def int8_parity(
    found: Tensor, reference: Tensor, baseline: Tensor, *, gradient: bool = False
) -> Parity:
    """The rule for 8-bit products, whose error no dtype explains: finite, and the rms within INT8_BOUND."""
    figures = model_parity(found, reference, baseline, gradient=gradient)
    return _within(figures, INT8_BOUND, "int8")


def float8_parity(
    found: Tensor, reference: Tensor, baseline: Tensor, *, gradient: bool = False
) -> Parity:
    """As ``int8_parity``, within FLOAT8_BOUND."""
    figures = model_parity(found, reference, baseline, gradient=gradient)
    return _within(figures, FLOAT8_BOUND, "float8")


def _within(figures: Parity, bound: float, dtype: str) -> Parity:
    if figures.rel_rms <= bound:
        return replace(figures, passed=True, reason="")
    if math.isnan(figures.rel_rms):
        return figures
    reason = f"relative rms error {figures.rel_rms:.3e} is over {bound}, the rule for {dtype}"
    return replace(figures, passed=False, reason=reason)
