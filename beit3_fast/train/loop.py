"""The loop: steps, checkpoints and a log, and a run that was killed ends like one that was not."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from beit3_fast.checkpoint import save_checkpoint
from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.checkpoint.lock import held
from beit3_fast.errors import ConfigError, TrainingError
from beit3_fast.progress import Progress
from beit3_fast.train.average import Average
from beit3_fast.train.checkpoints import Checkpoints
from beit3_fast.train.log import Log
from beit3_fast.train.optimizer import Optimizer
from beit3_fast.train.options import TrainOptions
from beit3_fast.train.throughput import Throughput

_FORM = "beit3_fast run 1"


class Data(Protocol):
    """``data[n]`` is micro-batch n, of which n alone decides: a dataclass with ``to(device)`` and ``num_samples``."""

    def __getitem__(self, number: int) -> Any: ...


class Objective(Protocol):
    """What is minimised: see ``train.objective.MaskedDataModelling``."""

    def counts(self, batch: Any) -> Mapping[str, int]: ...

    def __call__(
        self, model: nn.Module, batch: Any, totals: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class TrainReport:
    """``step``: steps that were done in all, ``skipped`` of them without a change of the weights; ``resumed``: steps that
    an earlier process had done; ``loss``: the last one; ``complete``: whether the run is at its end."""

    step: int
    skipped: int
    resumed: int
    loss: float | None
    complete: bool


def train(
    model: nn.Module,
    data: Data,
    objective: Objective,
    options: TrainOptions,
    folder: str | PathLike[str],
    *,
    progress: bool = True,
) -> TrainReport:
    """Train ``model`` in place, and go on where an earlier call with the same arguments stopped or was killed.

    ``folder`` gets checkpoints, ``log.jsonl`` (a line a step) and at the end ``model.safetensors``, and
    ``average.safetensors`` with ``ema_decay``. What was interrupted ends with the same weights and log, bit for bit on a CPU
    with the same number of threads. PyTorch's random numbers are seeded with ``options.seed``. SIGTERM saves after the running
    step and returns.

    A step whose loss or gradient is not finite changes nothing; after ``options.max_skipped`` in a row its
    micro-batches are saved as ``bad-step-N.pt`` and TrainingError is raised. Raises ConfigError where the folder holds another
    run, CheckpointError where it cannot be read or written.
    """
    root = Path(folder)
    with held(root):
        run = _Run(model, data, objective, options, root)
        return run.go(progress)


class _Run:
    def __init__(
        self, model: nn.Module, data: Data, objective: Objective, options: TrainOptions, root: Path
    ) -> None:
        self.model, self.data, self.objective, self.options = model, data, objective, options
        self.root = root
        self.device = next(model.parameters()).device
        self.optimizer = Optimizer(model, options)
        self.average = None if options.ema_decay is None else Average(model, options.ema_decay)
        self.checkpoints = Checkpoints(root, options.keep)
        self.step = self.skipped = self.in_a_row = 0
        self.loss: float | None = None
        torch.manual_seed(options.seed)
        if steps := self.checkpoints.steps():
            self._resume(steps[-1])
        self.resumed = self.step

    def go(self, shown: bool) -> TrainReport:
        options = self.options
        log = Log(self.root, self.step, options.tensorboard)
        throughput = Throughput(self.model, options)
        bar = Progress(options.steps, self.step, shown)
        batches = self._batches()
        self.model.train()
        try:
            with _Stop() as stop:
                while self.step < options.steps and not stop.asked:
                    start = time.perf_counter()
                    micro = [next(batches) for _ in range(options.accumulation)]
                    line = self._do(micro)
                    line |= throughput.of(micro, time.perf_counter() - start)
                    if self.step % options.log_every == 0 or self.step == options.steps:
                        log.write(line)
                    bar.say(f"loss {line['loss']:.3f}, {throughput.said(line)}")
                    bar.add(1, 0 if line["lr"] is not None else 1)
                    if self.step % options.save_every == 0 and self.step < options.steps:
                        self._save()
        finally:
            bar.close()
            log.close()
        if self.step > self.resumed:
            self._save()
        complete = self.step == options.steps
        if complete:
            save_checkpoint(self.model, self.root / "model.safetensors")
            if self.average is not None:
                own = {**self.model.state_dict(), **self.average.shadow}
                facts = {
                    key: getattr(self.model, key, None) for key in ("name", "config", "preset")
                }
                save_checkpoint(own, self.root / "average.safetensors", **facts)
        return TrainReport(self.step, self.skipped, self.resumed, self.loss, complete)

    def _do(self, micro: list[Any]) -> dict[str, Any]:
        """One step; its line of the log."""
        options = self.options
        totals: Counter[str] = Counter()
        for batch in micro:
            totals.update(self.objective.counts(batch))
        self.optimizer.adamw.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        terms: Counter[str] = Counter()
        for batch in micro:
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"
            ):
                share, own = self.objective(self.model, batch.to(self.device), totals)
            share.backward()
            loss += share.detach()
            terms.update({name: float(value) for name, value in own.items()})
        limit = float("inf") if options.clip_grad is None else options.clip_grad
        norm = float(nn.utils.clip_grad_norm_(self.optimizer.parameters, limit))
        self.loss = float(loss)
        rate = None
        if math.isfinite(self.loss) and math.isfinite(norm):
            rate = self.optimizer.step(self.step)
            self.in_a_row = 0
            if self.average is not None:
                self.average.update(self.model)
        else:
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row > options.max_skipped:
                self._give_up(micro, norm)
        self.step += 1
        return {
            "step": self.step,
            "loss": self.loss,
            **terms,
            "lr": rate,
            "grad_norm": norm,
            "skipped": self.skipped,
        }

    def _batches(self) -> Iterator[Any]:
        options = self.options
        numbers = range(self.step * options.accumulation, options.steps * options.accumulation)
        loader: DataLoader[Any] = DataLoader(
            self.data,  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=options.workers,
            persistent_workers=False,
            # Else the loader would draw from the numbers that belong to the model.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _give_up(self, micro: list[Any], norm: float) -> None:
        path = self.root / f"bad-step-{self.step + 1}.pt"
        with replacing(path) as file:
            torch.save([asdict(batch) for batch in micro], file)
        raise TrainingError(
            f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, at last in step "
            f"{self.step + 1} (loss {self.loss}, norm of the gradient {norm}); its batch is {path}. Go on from the last "
            "checkpoint with a lower lr or clip_grad in another folder, or look at that batch"
        )

    def _state(self) -> dict[str, Any]:
        """All tensors of a checkpoint, in place; random numbers are a copy."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "random": {"cpu": torch.get_rng_state()},
        }
        if self.device.type == "cuda":
            state["random"]["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.average is not None:
            state["average"] = self.average.state()
        return state

    def _facts(self) -> dict[str, Any]:
        """What a continuation must share."""
        return {
            "form": _FORM,
            "options": self.options.fixed(),
            "data": getattr(self.data, "identity", None),
            "objective": repr(self.objective),
        }

    def _save(self) -> None:
        facts = {**self._facts(), "skipped": self.skipped, "in_a_row": self.in_a_row}
        self.checkpoints.save(self.step, self._state(), facts)

    def _resume(self, step: int) -> None:
        facts = self.checkpoints.facts(step)
        own = self._facts()
        other = [key for key in own if key != "options" and facts.get(key) != own[key]]
        was = facts.get("options", {})
        other += [key for key, value in own["options"].items() if was.get(key) != value]
        if other:
            raise ConfigError(
                f"{self.root} holds another run, of another {', '.join(other)}; give another folder, or the same "
                "arguments to go on with that one"
            )
        state = self._state()
        self.checkpoints.load(step, state)
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.step, self.skipped, self.in_a_row = step, facts["skipped"], facts["in_a_row"]


class _Stop:
    """Whether SIGTERM has asked this process to end; without it the signal would end the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
