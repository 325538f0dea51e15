"""The loop: steps, checkpoints and a log, and a run that was killed ends like one that was not."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from beit3_fast.checkpoint import save_checkpoint
from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.checkpoint.lock import held
from beit3_fast.errors import ConfigError, TrainingError
from beit3_fast.model.stack import set_recompute
from beit3_fast.progress import Progress
from beit3_fast.train.average import Average
from beit3_fast.train.checkpoints import Checkpoints
from beit3_fast.train.log import Log
from beit3_fast.train.optimizer import Optimizer
from beit3_fast.train.options import TrainOptions
from beit3_fast.train.parallel import clip, engine_for, own_numbers, whole
from beit3_fast.train.processes import Processes, joined
from beit3_fast.train.stop import Stop, leave_to_the_run
from beit3_fast.train.throughput import Throughput

_FORM = "beit3_fast run 4"


class Data(Protocol):
    """``data[n]`` is micro-batch n, of which n alone decides: a dataclass with ``to(device)`` and ``num_samples``.

    With "fsdp2" in bfloat16 it is called as ``to(device, dtype)``, dtype for what goes into the model.
    """

    def __getitem__(self, number: int) -> Any: ...


class Objective(Protocol):
    """What is minimised: see ``train.objective.MaskedDataModelling``.

    ``totals`` are the sums of ``counts`` over the step's micro-batches in all processes; what a call returns for each of
    them, added, is the step's loss. ``model`` is to be called, not looked into: it may be wrapped. One that has
    ``across_processes``, true, compares samples of all processes, so it is another loss on another number of them.
    """

    def counts(self, batch: Any) -> Mapping[str, int]: ...

    def __call__(
        self, model: nn.Module, batch: Any, totals: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class TrainReport:
    """``step``: steps that were done in all, ``skipped`` of them without a change of the weights; ``resumed``: steps that
    an earlier process had done; ``loss``: the last one; ``complete``: whether the run is at its end; ``in_a_row``: of the
    skipped steps those that were the last ones."""

    step: int
    skipped: int
    resumed: int
    loss: float | None
    complete: bool
    in_a_row: int = 0

    @property
    def said(self) -> str:
        """Steps done and skipped, in words."""
        words = f"{self.step} steps, {self.skipped} skipped"
        if self.in_a_row:
            words += f" (the last {self.in_a_row} in a row: look at log.jsonl before you use the weights)"
        return words


def train(
    model: nn.Module,
    data: Data,
    objective: Objective,
    options: TrainOptions,
    folder: str | PathLike[str],
    *,
    start: Mapping[str, str] | None = None,
    progress: bool = True,
) -> TrainReport:
    """Train ``model`` in place, and go on where an earlier call with the same arguments stopped or was killed.

    Under torchrun all processes call it with the same arguments and share each step's micro-batches; ``options.parallel``
    says how. After "fsdp2" the model has a part of the weights in each process; the whole ones are in the folder.

    ``folder`` gets checkpoints, ``log.jsonl`` (a line a step) and at the end ``model.safetensors``, and
    ``average.safetensors`` with ``ema_decay``. What was interrupted ends with the same weights and log, bit for bit on a CPU
    with the same number of threads and processes. PyTorch's random numbers are seeded with ``options.seed`` and the number of
    the micro-batch. SIGTERM to any process saves after the running step, and all return.

    ``start``: what the first weights are made of, by names that an error may use, as ``train.initial.start_of`` says it; a
    continuation with another one is refused. Weights of ``model`` itself are not compared, but replaced by the checkpoint's.

    A step whose loss or gradient is not finite changes nothing; after ``options.max_skipped`` in a row its
    micro-batches are saved as ``bad-step-N.pt`` (``bad-step-N.rank-R.pt``) and TrainingError is raised, which also tells that
    another process is gone. Raises ConfigError where the folder holds another run or processes cannot share the work,
    CheckpointError where the folder cannot be read or written.
    """
    root = Path(folder)
    with joined() as processes, _held(root, processes):
        run = _Run(model, data, objective, options, root, start or {}, processes)
        return run.go(progress and processes.leads)


@contextmanager
def _held(root: Path, processes: Processes) -> Iterator[None]:
    """Keep other runs out of the folder."""
    with ExitStack() as stack:
        processes.lead(lambda: stack.enter_context(held(root)))
        processes.check_shared(root)
        yield


class _Run:
    def __init__(
        self,
        model: nn.Module,
        data: Data,
        objective: Objective,
        options: TrainOptions,
        root: Path,
        start: Mapping[str, str],
        processes: Processes,
    ) -> None:
        self.model, self.data, self.objective, self.options = model, data, objective, options
        self.root, self.start, self.processes = root, start, processes
        # Sizes are in the weights; heads and drop path are not. FSDP2 gives the model a class of its own.
        self.kind = repr((type(model).__name__, getattr(model, "config", None)))
        own_numbers(0, options.accumulation, processes)
        # At "none" layers stay as the model's config made them.
        if options.checkpoint_activations != "none":
            set_recompute(model, options.checkpoint_activations)
        self.engine = engine_for(model, options, processes)
        self.optimizer = Optimizer(model, options)
        self.average = None if options.ema_decay is None else Average(model, options.ema_decay)
        self.checkpoints = Checkpoints(root, options.keep, processes)
        self.step = self.skipped = self.in_a_row = 0
        self.loss: float | None = None
        if steps := processes.lead(self.checkpoints.steps):
            self._resume(steps[-1])
        self.resumed = self.step

    def go(self, shown: bool) -> TrainReport:
        options = self.options
        log = Log(self.root, self.step, options.tensorboard) if self.processes.leads else None
        throughput = Throughput(self.model, options, self.processes.size)
        bar = Progress(options.steps, self.step, shown)
        self.model.train()
        try:
            with Stop() as stop:
                batches = self._batches()
                while self.step < options.steps:
                    start = time.perf_counter()
                    micro = self._load(batches, stop)
                    totals, told = self._agree(micro, throughput.done(micro), stop)
                    if told["stop"]:
                        break
                    line, stops = self._do(micro, totals, stop)
                    line |= throughput.of(told, time.perf_counter() - start)
                    if log and (self.step % options.log_every == 0 or self.step == options.steps):
                        log.write(line)
                    bar.say(f"loss {line['loss']:.3f}, {throughput.said(line)}")
                    bar.add(1, 0 if line["lr"] is not None else 1)
                    if stops:
                        break
                    if self.step % options.save_every == 0 and self.step < options.steps:
                        self._save()
                # Within: a second signal does not end what the first one asked for.
                if self.step > self.resumed:
                    self._save()
                complete = self.step == options.steps
                if complete:
                    self._write_weights()
        finally:
            bar.close()
            if log:
                log.close()
        return TrainReport(
            self.step, self.skipped, self.resumed, self.loss, complete, self.in_a_row
        )

    def _load(self, batches: Iterator[Any], stop: Stop) -> list[Any]:
        """This process's micro-batches of a step; fewer where it is asked to stop, since the step is then left out by all."""
        micro: list[Any] = []
        for _ in self._numbers(self.step):
            if stop.asked:
                break
            micro.append(next(batches))
        return micro

    def _agree(self, micro: list[Any], done: Mapping[str, float], stop: Stop) -> list[Counter[str]]:
        """What is counted in the step's micro-batches, and what is done with them and who wants to stop, over all processes."""
        counts: Counter[str] = Counter()
        for batch in micro:
            counts.update(self.objective.counts(batch))
        return self.processes.sums(counts, {**done, "stop": int(stop.asked)})

    def _do(
        self, micro: list[Any], totals: Counter[str], stop: Stop
    ) -> tuple[dict[str, Any], bool]:
        """One step: its line of the log, and whether a process wants to stop before the next one is loaded."""
        options, engine = self.options, self.engine
        self.optimizer.adamw.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=engine.device)
        own_terms: Counter[str] = Counter()
        for number, batch in zip(self._numbers(self.step), micro, strict=True):
            _seed(options.seed, number)
            with engine.micro_batch(last=batch is micro[-1]):
                with engine.precision():
                    share, own = self.objective(engine.called, engine.moved(batch), totals)
                engine.backward(share)
            loss += share.detach()
            own_terms.update({name: float(value) for name, value in own.items()})
        engine.settle()
        limit = float("inf") if options.clip_grad is None else options.clip_grad
        norm = clip(self.optimizer.parameters, limit)
        terms, told = self.processes.sums(own_terms, {"loss": float(loss), "stop": int(stop.asked)})
        self.loss = told["loss"]
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
        line = {
            "step": self.step,
            "loss": self.loss,
            **terms,
            "lr": rate,
            "grad_norm": norm,
            "skipped": self.skipped,
        }
        return line, bool(told["stop"])

    def _batches(self) -> Iterator[Any]:
        options = self.options
        steps = range(self.step, options.steps)
        numbers = (number for step in steps for number in self._numbers(step))
        loader: DataLoader[Any] = DataLoader(
            self.data,  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=options.workers,
            persistent_workers=False,
            worker_init_fn=leave_to_the_run,
            # Else the loader would draw from the numbers that belong to the model.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _numbers(self, step: int) -> range:
        return own_numbers(step, self.options.accumulation, self.processes)

    def _give_up(self, micro: list[Any], norm: float) -> None:
        own = f".rank-{self.processes.rank}" if self.processes.size > 1 else ""
        path = self.root / f"bad-step-{self.step + 1}{own}.pt"
        with replacing(path) as file:
            torch.save([asdict(batch) for batch in micro], file)
        saved = self.checkpoints.steps()
        again = f"; the same call goes on from step {saved[-1]}" if saved else ""
        raise TrainingError(
            f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, at last in step "
            f"{self.step + 1} (loss {self.loss}, norm of the gradient {norm}); its batch is {path}; look at "
            f"that batch, or begin anew in another folder with a lower lr or clip_grad{again}"
        )

    def _state(self) -> dict[str, Any]:
        """All tensors of a checkpoint, in place."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
        }
        if self.average is not None:
            state["average"] = self.average.state()
        return state

    def _write_weights(self) -> None:
        """The run's result, whole, for anyone to read."""
        facts = {key: getattr(self.model, key, None) for key in ("name", "config", "preset")}
        own = whole(self.model.state_dict(), self.processes)
        averaged = None if self.average is None else whole(self.average.state(), self.processes)

        def write() -> None:
            save_checkpoint(own, self.root / "model.safetensors", **facts)
            if averaged is not None:
                save_checkpoint({**own, **averaged}, self.root / "average.safetensors", **facts)

        self.processes.lead(write)

    def _facts(self) -> dict[str, Any]:
        """What a continuation must share."""
        return {
            "form": _FORM,
            "options": self.options.fixed(),
            "data": getattr(self.data, "identity", None),
            "objective": repr(self.objective),
            "model": self.kind,
            "start": dict(self.start),
        }

    def _save(self) -> None:
        facts = {**self._facts(), "skipped": self.skipped, "in_a_row": self.in_a_row}
        facts["processes"] = self.processes.size
        self.checkpoints.save(self.step, self._state(), facts)

    def _resume(self, step: int) -> None:
        facts = self.processes.lead(lambda: self.checkpoints.facts(step))
        other = _differences(facts, self._facts())
        if other:
            raise ConfigError(
                f"{self.root} holds another run, of another {', '.join(other)}; give another folder, or the same "
                "arguments to go on with that one"
            )
        self._check_processes(facts["processes"])
        self.checkpoints.load(step, self._state())
        self.step, self.skipped, self.in_a_row = step, facts["skipped"], facts["in_a_row"]

    def _check_processes(self, before: int) -> None:
        now = self.processes.size
        if before != now and getattr(self.objective, "across_processes", False):
            raise ConfigError(
                f"{self.root} holds a run on {before} processes, this is one on {now}, and "
                f"{type(self.objective).__name__} tells each pair apart from those of all processes, so its loss would be "
                f"another; go on on {before}, or give another folder"
            )


def _differences(was: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """In what a run that was begun differs from the one that is asked for."""
    if was.get("form") != own["form"]:
        return [f"version of this package (its form is {was.get('form')!r}, not {own['form']!r})"]
    other = [key for key in own if key not in ("options", "start") and was.get(key) != own[key]]
    begun = was["start"]
    names = [key for key in {**begun, **own["start"]} if begun.get(key) != own["start"].get(key)]
    other += [f"{key} (it has {begun.get(key)}, now {own['start'].get(key)})" for key in names]
    return other + [
        key for key, value in own["options"].items() if was["options"].get(key) != value
    ]


def _seed(seed: int, number: int) -> None:
    """What is drawn in a micro-batch is a function of its number: of no process, and of no moment of a restart."""
    torch.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]))
