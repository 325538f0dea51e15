"""A run that is asked to end does not load what no step will use, and the bar goes on where the run does."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from train_cases import OPTIONS, Watched, config, curve, data, run, small, weights

from beit3_fast.data.paired import PairedData, read_paired
from beit3_fast.errors import ConfigError
from beit3_fast.model import BEiT3ForRetrieval
from beit3_fast.train import MaskedDataModelling, TrainReport, read_log, train
from beit3_fast.train.contrastive import ContrastiveTuning
from beit3_fast.train.processes import joined

FOUR = replace(OPTIONS, steps=3, warmup_steps=1, accumulation=4, save_every=100)


class Loaded:
    """The micro-batches of a world, of which it notes what is loaded; the signal comes while ``at`` is."""

    def __init__(self, world: Path, at: int | None = None) -> None:
        self.own, self.at, self.numbers = data(world), at, list[int]()
        self.identity = self.own.identity

    def __getitem__(self, number: int) -> Any:
        self.numbers.append(number)
        if number == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.own[number]


def terminate_at(call: int) -> Watched:
    return Watched(lambda own: os.kill(os.getpid(), signal.SIGTERM) if own == call else None)


def test_a_signal_comes_before_what_is_to_be_loaded(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "whole", FOUR)
    stopped = Loaded(world)
    assert run(world, tmp_path / "run", FOUR, data=stopped, objective=terminate_at(2)).step == 1
    assert stopped.numbers == [0, 1, 2, 3]
    while_loading = Loaded(world, at=9)
    report = run(world, tmp_path / "run", FOUR, data=while_loading)
    assert (report.resumed, report.step, report.complete) == (1, 2, False)
    assert while_loading.numbers == [4, 5, 6, 7, 8, 9]
    rest = Loaded(world)
    assert run(world, tmp_path / "run", FOUR, data=rest).complete
    assert rest.numbers == [8, 9, 10, 11], "a step that was not made is read again, whole"
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    ours, expected = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_a_signal_to_one_of_two_processes(world: Path, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        own, again = Loaded(world), Loaded(world, at=6)
        objective = terminate_at(1 if rank else 0)
        with joined():
            first = run(world, tmp_path / "run", FOUR, data=own, objective=objective)
            second = run(world, tmp_path / "run", FOUR, data=again)
        return first.step, own.numbers, second.step, again.numbers

    first, second = on_ranks(2, tmp_path / "ranks", work)
    assert first == (1, [0, 1], 1, [4, 5]), "it loads its own part, as it was told nothing"
    assert second == (1, [2, 3], 1, [6])


def test_contrastive_tuning_keeps_its_number_of_processes(world: Path, tmp_path: Path) -> None:
    """Its pairs are told apart from those of all processes, so on two it would be another loss."""
    rows = read_paired(world / "coco_retrieval.train.jsonl", lambda entry: None)

    def tuned(objective: ContrastiveTuning) -> TrainReport:
        torch.manual_seed(0)
        own: Any = BEiT3ForRetrieval(config(world))
        pairs = PairedData(rows, 2, data(world).processor, lambda batch, _: batch)
        options = replace(FOUR, ema_decay=None)
        return train(own, pairs, objective, options, tmp_path / "run", progress=False)

    class Stopped(ContrastiveTuning):
        def __call__(self, model: Any, batch: Any, totals: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(model, batch, totals)

        def __repr__(self) -> str:
            return repr(ContrastiveTuning())

    def refused(_: int) -> str:
        with pytest.raises(ConfigError) as caught:
            tuned(ContrastiveTuning())
        return str(caught.value)

    assert tuned(Stopped()).step == 1
    for said in on_ranks(2, tmp_path / "ranks", refused):
        assert "holds a run on 1 processes, this is one on 2, and ContrastiveTuning tells" in said
        assert "go on on 1, or give another folder" in said
    assert tuned(ContrastiveTuning()).resumed == 1


def test_waiting_for_data_is_time_of_the_run(world: Path, tmp_path: Path) -> None:
    class Slow(Loaded):
        def __getitem__(self, number: int) -> Any:
            time.sleep(0.3)
            return super().__getitem__(number)

    options = replace(FOUR, steps=1, accumulation=1)
    run(world, tmp_path, options, data=Slow(world))
    (line,) = read_log(tmp_path)
    assert line["samples_per_s"] < 7 / 0.3


def test_the_bar_goes_on_where_the_run_does(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    options = replace(FOUR, accumulation=1)
    run(world, tmp_path, options, objective=terminate_at(2))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train(small(world), data(world), MaskedDataModelling(), options, tmp_path)
    assert "] 3/3," in terminal.getvalue()


def test_a_model_in_evaluation_mode_is_trained_in_training_mode(
    world: Path, tmp_path: Path
) -> None:
    """Else drop path would do nothing."""
    modes = []

    class Looking(Watched):
        def __call__(self, model: Any, batch: Any, totals: Any) -> Any:
            modes.append(model.training)
            return super().__call__(model, batch, totals)

    options = replace(FOUR, steps=1, accumulation=1)
    run(world, tmp_path, options, small(world).eval(), objective=Looking(lambda call: None))
    assert modes == [True]
