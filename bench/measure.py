"""Runs a plan: parity of everything first, then speed, then memory; the result is the report's data."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from beit3_fast.parity import Parity, worst_of
from beit3_fast.timing import Effort, Samples
from bench.baselines import REFERENCE, RUNTIMES, build_reference
from bench.ceilings import BareProducts, measure_ceilings, onednn_multiplies
from bench.environment import available_memory, environment
from bench.events import timed_rounds
from bench.memory import MemoryProbeFailed, Probe, measure_peak, settle
from bench.speeds import UNMEASURED, bare_speed, peer_ratios, ratios, round_figure, speed
from bench.tasks import Output
from bench.workloads import Workload, move, step

Report = dict[str, Any]
_REFERENCE_DTYPE = "float32"
_BARE = "onednn_products "
# Messages of other libraries quote their files; a report holds no paths.
_PATH = re.compile(r"(?:/[\w.+-]+){2,}")


@dataclass(frozen=True)
class Case:
    """One workload in one dtype at one batch size."""

    workload: Workload
    dtype: str
    batch: int

    @property
    def title(self) -> str:
        """For progress lines."""
        return f"{self.workload.name}, {self.dtype}, batch {self.batch}"

    @property
    def row(self) -> dict[str, Any]:
        """How the report's rows begin."""
        return {"workload": self.workload.name, "dtype": self.dtype, "batch": self.batch}

    def products(self, runtime: str) -> str:
        """The dtype of a runtime's products with weights."""
        return RUNTIMES[runtime].products or self.dtype


@dataclass(frozen=True)
class Plan:
    """All that one run measures.

    memory: whether the peak memory of a case is measured.
    costly: whether runtimes that take minutes to convert run too.
    cache_bytes: built models are kept up to this size, so that parity and timing build each one once.
    """

    cases: tuple[Case, ...]
    runtimes: tuple[str, ...]
    device: torch.device
    threads: int
    effort: Effort
    memory: Callable[[Case], bool]
    costly: bool = False
    ceiling_seconds: float = 0.25
    cache_bytes: int = 4 << 30


class Progress:
    """Numbered lines on the standard error, or silence."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self._steps, self._done, self._quiet = steps, 0, quiet
        self._start = time.perf_counter()

    def __call__(self, doing: str) -> None:
        """Says that the next step begins."""
        self._done += 1
        elapsed = time.perf_counter() - self._start
        self.say(f"[{self._done:2d}/{self._steps} {elapsed:5.0f} s] {doing}")

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)


class _Models:
    """Built models, the least recently used ones dropped beyond a number of bytes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._models: dict[tuple[object, ...], nn.Module] = {}

    def get(self, runtime: str, workload: Workload, dtype: str) -> nn.Module:
        key = (runtime, workload.model_key, dtype)
        model = self._models.pop(key, None)
        if model is None:
            self._make_room()
            model = self._build(runtime, workload, dtype)
        self._models[key] = model
        return model

    def _build(self, runtime: str, workload: Workload, dtype: str) -> nn.Module:
        if (runtime, dtype) == (REFERENCE, _REFERENCE_DTYPE):
            return build_reference(workload).to(self._plan.device)
        weights = self.get(REFERENCE, workload, _REFERENCE_DTYPE).state_dict()
        return RUNTIMES[runtime].build(workload, weights, getattr(torch, dtype), self._plan.device)

    def _make_room(self) -> None:
        while (
            len(self._models) > 1
            and sum(map(_size, self._models.values())) > self._plan.cache_bytes
        ):
            del self._models[next(iter(self._models))]


def _size(model: nn.Module) -> int:
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    return own + int(getattr(model, "converted_bytes", 0))


def run(plan: Plan, progress: Progress) -> Report:
    """The report's data by the JSON contract. Without parity of every gated row there is no speed in it."""
    torch.set_num_threads(plan.threads)
    models = _Models(plan)
    parities: dict[tuple[Case, str], Parity] = {}
    impls: dict[tuple[Case, str], str] = {}
    skipped = []
    for case in plan.cases:
        progress(f"parity of {case.title}")
        able = []
        for name in plan.runtimes:
            obstacle = _obstacle(case, name, models, plan)
            if obstacle is None:
                able.append(name)
            else:
                skipped.append({**case.row, "runtime": name, "reason": obstacle})
        for name, parity in check_parity(case, able, models.get, plan.device).items():
            parities[case, name] = parity
            impls[case, name] = RUNTIMES[name].impl(models.get(name, case.workload, case.dtype))
            if not parity.passed:
                progress.say(f"  {name} is NOT in parity: {parity.reason}")

    passed = all(p.passed for (_, name), p in parities.items() if RUNTIMES[name].gate)
    ceilings: dict[str, Any] = {"matmul_tflops": {}, "copy_gbps": None, "tile_loop_tflops": {}}
    bare: list[dict[str, Any]] = []
    speeds: dict[tuple[Case, str], dict[str, Any]] = {}
    against: dict[str, list[dict[str, Any]]] = {"ratios": [], "peer_ratios": []}
    if passed:
        progress("ceilings of this machine")
        dtypes = dict.fromkeys(case.dtype for case in plan.cases)
        dtypes |= dict.fromkeys(case.products(name) for case, name in parities)
        ceilings = measure_ceilings(
            # The rate of float8 products, which GPUs have, is not measured.
            [getattr(torch, dtype) for dtype in dtypes if dtype != "float8"],
            plan.device,
            seconds=plan.ceiling_seconds,
        )
        for case in plan.cases:
            progress(f"speed of {case.title}")
            able = [name for name in plan.runtimes if (case, name) in parities]
            samples = _time(case, able, models, plan)
            work = case.workload.work(case.workload.inputs(case.batch))
            alone = {
                dtype: samples.pop(_BARE + dtype) for dtype in dtypes if _BARE + dtype in samples
            }
            bare += [bare_speed(case.row, work, *products) for products in alone.items()]
            for name, seconds in samples.items():
                dtype = case.products(name)
                speeds[case, name] = speed(
                    case.row, work, dtype, seconds, ceilings, alone.get(dtype)
                )
            against["ratios"] += ratios(case.row, samples)
            against["peer_ratios"] += peer_ratios(case.row, samples)
        # The processes that measure memory need room, and the models of this one are done.
        del models
        settle()
        _measure_memory(plan, parities, speeds, progress)

    results = []
    for (case, name), parity in parities.items():
        results.append(
            {
                **case.row,
                "runtime": name,
                "impl": impls[case, name],
                "products": case.products(name),
                "device": plan.device.type,
                **speeds.get((case, name), UNMEASURED),
                "parity": _figures(parity),
            }
        )
    return {
        "schema": 1,
        "passed": passed,
        "environment": environment(plan.threads, plan.device),
        "ceilings": {**ceilings, "onednn_products": bare},
        "results": results,
        **against,
        "skipped": skipped,
    }


def steps_of(plan: Plan) -> int:
    """How many progress lines a run that passes will print."""
    return 2 * len(plan.cases) + 1 + sum(map(plan.memory, plan.cases))


def check_parity(
    case: Case,
    runtimes: list[str],
    get: Callable[[str, Workload, str], nn.Module],
    device: torch.device,
) -> dict[str, Parity]:
    """Every runtime's outputs against torchscale in fp32, with torchscale in the same dtype as baseline."""
    workload, dtype = case.workload, getattr(torch, case.dtype)

    def outputs(name: str, as_dtype: str) -> dict[str, Output]:
        model, parts = get(name, workload, as_dtype), []
        for index in range(workload.parity_batches(case.batch)):
            inputs = workload.inputs(case.batch, first=index * case.batch)
            inputs = move(inputs, getattr(torch, as_dtype), device)
            parts.append(workload.task.outputs(step(model, workload, inputs), inputs))
        if len(parts) == 1:
            return parts[0]
        return {
            key: Output(torch.cat([part[key].value for part in parts]), parts[0][key].gradient)
            for key in parts[0]
        }

    reference = outputs(REFERENCE, _REFERENCE_DTYPE)
    baseline = reference
    if dtype != getattr(torch, _REFERENCE_DTYPE):
        baseline = outputs(REFERENCE, case.dtype)
    verdicts = {}
    for name in runtimes:
        found = baseline if name == REFERENCE else outputs(name, case.dtype)
        if found.keys() != reference.keys():
            nan, other = math.nan, sorted(found.keys() ^ reference.keys())
            reason = f"only one of it and {REFERENCE} gives {', '.join(other[:5])}"
            verdicts[name] = Parity(nan, nan, nan, False, reason)
            continue
        verdicts[name] = worst_of(
            {
                key: RUNTIMES[name].judge(
                    found[key].value,
                    reference[key].value,
                    baseline[key].value,
                    gradient=reference[key].gradient,
                )
                for key in reference
            }
        )
    return verdicts


def _obstacle(case: Case, name: str, models: _Models, plan: Plan) -> str | None:
    """Why a runtime does not run a case, or None. One that is not ours to mend has to run once for that."""
    runtime, workload = RUNTIMES[name], case.workload
    obstacle = runtime.obstacle(workload, getattr(torch, case.dtype), plan.device)
    if obstacle is None and runtime.costly and not plan.costly:
        return "takes minutes to convert; runs with --full, or if named by --runtimes"
    if obstacle is not None or runtime.gate:
        return obstacle
    # The source, a copy in the making, and what the runtime itself packs.
    weights = _size(models.get(REFERENCE, workload, _REFERENCE_DTYPE))
    if available_memory() < 4 * weights:
        return f"needs about {4 * weights / 2**30:.1f} GiB of free memory"
    try:
        inputs = move(workload.inputs(case.batch), getattr(torch, case.dtype), plan.device)
        step(models.get(name, workload, case.dtype), workload, inputs)
    except Exception as error:
        message = (str(error).strip().splitlines() or ["no message"])[0]
        return f"failed: {type(error).__name__}: {_PATH.sub('...', message)[:160]}"
    return None


def _time(case: Case, runtimes: list[str], models: _Models, plan: Plan) -> Samples:
    dtype = getattr(torch, case.dtype)
    one, inputs = (move(case.workload.inputs(n), dtype, plan.device) for n in (1, case.batch))
    calls: dict[str, Callable[[], object]] = {}
    for name in runtimes:
        # A model that was built again since parity has work to do on its first call.
        try:
            model = models.get(name, case.workload, case.dtype)
            step(model, case.workload, inputs if RUNTIMES[name].costly else one)
        except Exception:
            if RUNTIMES[name].gate:
                raise
            continue
        calls[name] = partial(step, model, case.workload, inputs)
    if plan.device.type == "cpu" and not case.workload.task.train:
        work = case.workload.work(case.workload.inputs(case.batch))
        for name in dict.fromkeys([case.dtype, *map(case.products, calls)]):
            products = getattr(torch, name)
            if onednn_multiplies(products):
                calls[_BARE + name] = BareProducts(work, products)
    return timed_rounds(calls, plan.effort, plan.device)


def _measure_memory(
    plan: Plan,
    parities: dict[tuple[Case, str], Parity],
    speeds: dict[tuple[Case, str], dict[str, Any]],
    progress: Progress,
) -> None:
    for case in filter(plan.memory, plan.cases):
        progress(f"memory of {case.title}")
        for name in plan.runtimes:
            if (case, name) not in speeds or RUNTIMES[name].costly:
                continue
            probe = Probe(
                name, case.workload.name, case.dtype, case.batch, plan.threads, plan.device.type
            )
            try:
                speeds[case, name]["peak_memory_mib"] = measure_peak(probe)
            except MemoryProbeFailed as error:
                progress.say(f"  {error}")


def _figures(parity: Parity) -> dict[str, Any]:
    figures: dict[str, Any] = asdict(parity)
    for name, value in figures.items():
        if isinstance(value, float):
            # JSON knows neither NaN nor infinity.
            figures[name] = round_figure(value) if math.isfinite(value) else None
    return figures
