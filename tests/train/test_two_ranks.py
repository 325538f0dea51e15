"""Two processes train as one does on the same samples, stop together and lose nothing."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from train_cases import (
    OPTIONS,
    Watched,
    assert_close,
    config,
    curve,
    data,
    run,
    small,
    weights,
)

from beit3_fast import derived
from beit3_fast.data.mixed import Mix
from beit3_fast.data.paired import PairedData, read_paired
from beit3_fast.errors import CheckpointError, ConfigError, TrainingError
from beit3_fast.model import BEiT3ForRetrieval
from beit3_fast.train import MaskedDataModelling, parallel, read_log, train
from beit3_fast.train.checkpoints import Checkpoints
from beit3_fast.train.contrastive import ContrastiveTuning
from beit3_fast.train.optimizer import Optimizer
from beit3_fast.train.processes import Processes, joined

# The norms are about 2.5.
THREE = replace(OPTIONS, steps=3, save_every=2, warmup_steps=1, clip_grad=1.0)


class Uneven:
    """The first micro-batch of a step has no texts, the second no images: two processes use other parameters."""

    identity = "uneven"

    def __init__(self, world: Path) -> None:
        self.kinds = data(world, Mix(image=2, pair=1)), data(world, Mix(text=3))

    def __getitem__(self, number: int) -> Any:
        return self.kinds[number % 2][number // 2]


def equal(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in own.items() if torch.equal(tensor, other[name])]


@pytest.fixture(scope="module")
def one(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: an ordinary run, and one of uneven batches."""
    folder = tmp_path_factory.mktemp("one")
    run(world, folder / "run", THREE)
    run(world, folder / "uneven", THREE, data=Uneven(world))
    return folder


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_are_one(engine: str, world: Path, one: Path, tmp_path: Path) -> None:
    again = {"ddp": "ffn", "fsdp2": "layer"}[engine]
    options = replace(THREE, parallel=engine, checkpoint_activations=again)
    images = replace(options, steps=1, weight_decay=1.0)

    def work(_: int) -> Any:
        with joined():
            report = run(world, tmp_path / "uneven", options, data=Uneven(world))
            run(world, tmp_path / "images", images, data=data(world, Mix(image=2)))
            return report

    reports = on_ranks(2, tmp_path / "ranks", work)
    assert reports[0] == reports[1]
    assert reports[0].complete
    assert_close(tmp_path / "uneven", one / "uneven")
    before, after = small(world).state_dict(), weights(tmp_path / "images")
    untouched = equal(before, after)
    assert "mlm_head.weight" in untouched, "what no process used must not decay"
    assert "beit3.encoder.layers.0.ffn.B.fc1.weight" in untouched
    assert "beit3.encoder.layers.0.ffn.A.fc1.weight" not in untouched


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_lost_rank_ends_the_run_and_nothing_is_lost(
    engine: str, world: Path, one: Path, tmp_path: Path
) -> None:
    """Rank 1 is killed in the third step; the checkpoint of step 2 goes on on two ranks, bit for bit, and on one."""
    options = replace(THREE, parallel=engine)

    def die(call: int) -> None:
        if call == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed(rank: int) -> str:
        objective = Watched(die if rank else lambda call: None)
        with pytest.raises(TrainingError, match="rank 0 lost the other processes") as caught:
            run(world, tmp_path / "two", options, objective=objective)
        return str(caught.value)

    def whole(_: int) -> Any:
        with joined():
            return [run(world, tmp_path / name, options) for name in ("two", "whole")]

    said, end = on_ranks(2, tmp_path / "killed", killed)
    assert end == signal.SIGKILL
    assert "the same command goes on from the last checkpoint" in said
    assert Checkpoints(tmp_path / "two", 2).steps() == [2]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    resumed, _ = on_ranks(2, tmp_path / "whole-ranks", whole)
    assert [report.resumed for report in resumed] == [2, 0]
    assert curve(tmp_path / "two") == curve(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "whole")
    assert len(equal(ours, theirs)) == len(ours)
    assert run(world, tmp_path / "one", THREE).resumed == 2
    torch.testing.assert_close(
        weights(tmp_path / "one"), weights(one / "run"), rtol=1e-4, atol=2e-6
    )


def test_sigterm_to_any_rank_and_a_gradient_that_is_not_finite_on_one(
    world: Path, tmp_path: Path
) -> None:
    options = replace(THREE, steps=5, parallel="ddp", save_every=100)

    def work(rank: int) -> Any:
        def terminate(call: int) -> None:
            if rank and call == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        objective = Watched(terminate, spoil=(2,) if rank else ())
        return run(world, tmp_path / "run", options, objective=objective)

    reports = on_ranks(2, tmp_path / "ranks", work)
    assert [(own.step, own.skipped, own.complete) for own in reports] == [(3, 1, False)] * 2
    lines = read_log(tmp_path / "run")
    assert [line["lr"] is None for line in lines] == [False, True, False]
    assert Checkpoints(tmp_path / "run", 2).steps() == [3]
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_disk_that_is_full_for_one_rank(world: Path, tmp_path: Path) -> None:
    options = replace(THREE, parallel="fsdp2", save_every=1)

    def work(rank: int) -> str:
        def fill(call: int) -> None:
            if rank and call == 2:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        with pytest.raises(CheckpointError) as caught:
            run(world, tmp_path / "run", options, objective=Watched(fill))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return str(caught.value)

    for said in on_ranks(2, tmp_path / "ranks", work):
        assert "step-00000002: cannot be written: File too large (make room" in said
        assert "older checkpoints are unchanged" in said
    assert Checkpoints(tmp_path / "run", 2).steps() == [1]
    assert not list((tmp_path / "run").glob(".step*"))


def test_weights_that_are_gathered_anew_are_packed_anew(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 gathers other values into the same tensors, often at the same address, as here: what was derived from them
    before must be forgotten."""
    monkeypatch.setattr(derived, "_stamp", lambda source: (source._version, source.dtype))
    options = replace(THREE, parallel="fsdp2")
    batch = data(world)[0]

    def work(_: int) -> Any:
        with joined() as processes:
            own = small(world)
            engine = parallel.engine_for(own, options, processes)
            optimizer = Optimizer(own, options)
            with torch.no_grad():
                before = own.eval()(batch)["image"]
            share, _ = MaskedDataModelling()(own.train(), batch, batch.counts)
            engine.backward(share)
            optimizer.step(0)
            with torch.no_grad():
                after = own.eval()(batch)["image"]
            return before, after, parallel.whole(own.state_dict(), processes)

    before, after, state = on_ranks(2, tmp_path / "ranks", work)[0]
    fresh = small(world).eval()
    fresh.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(after, fresh(batch)["image"])
    assert not torch.allclose(before, after)


@pytest.mark.full
def test_bfloat16_of_sharded_weights(world: Path, one: Path, tmp_path: Path) -> None:
    options = replace(THREE, parallel="fsdp2", precision="bfloat16")
    on_ranks(2, tmp_path / "ranks", lambda _: run(world, tmp_path / "half", options))
    half, full = (
        [line["loss"] for line in read_log(own)] for own in (tmp_path / "half", one / "run")
    )
    assert half != full
    assert half == pytest.approx(full, rel=1e-2)
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.float32}


def test_contrastive_tuning_with_parts_is_that_with_whole_weights(
    world: Path, tmp_path: Path
) -> None:
    """The scale of the loss is a single number, which FSDP2 leaves whole."""
    rows = read_paired(world / "coco_retrieval.train.jsonl", lambda entry: None)

    def trained(engine: str) -> None:
        torch.manual_seed(0)
        own: Any = BEiT3ForRetrieval(config(world))
        processor = data(world).processor
        pairs = PairedData(rows, 3, processor, lambda batch, _: batch)
        options = replace(THREE, parallel=engine, clip_grad=0.5, accumulation=4)
        train(own, pairs, ContrastiveTuning(), options, tmp_path / engine, progress=False)

    def work(_: int) -> None:
        with joined():
            for engine in ("ddp", "fsdp2"):
                trained(engine)

    on_ranks(2, tmp_path / "ranks", work)
    curves = [
        [(line["loss"], line["grad_norm"]) for line in read_log(tmp_path / engine)]
        for engine in ("ddp", "fsdp2")
    ]
    for ours, expected in zip(*curves, strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
    ours, expected = (weights(tmp_path / engine) for engine in ("fsdp2", "ddp"))
    assert expected["logit_scale"] != math.log(1 / 0.07)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_what_cannot_be_shared(world: Path, tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        said = []
        with joined() as processes:
            with pytest.raises(ConfigError, match="must be a multiple of the 2 processes") as error:
                run(world, tmp_path / "run", replace(THREE, accumulation=3))
            said.append(str(error.value))
            disk = tmp_path / f"disk {rank}"
            disk.mkdir(exist_ok=True)
            with pytest.raises(CheckpointError, match="1 of 2 processes do not see what rank 0"):
                processes.check_shared(disk)
        return said

    assert on_ranks(2, tmp_path / "ranks", work)[1] == on_ranks(2, tmp_path / "again", work)[0]


def test_micro_batches_of_a_step_are_the_same_on_any_number_of_ranks() -> None:
    def of(size: int, step: int) -> list[int]:
        numbers = []
        for rank in range(size):
            processes = Processes()
            processes.rank, processes.size = rank, size
            numbers += parallel.own_numbers(step, 12, processes)
        return numbers

    for size in (1, 2, 3, 4, 12):
        assert of(size, 5) == list(range(60, 72))
