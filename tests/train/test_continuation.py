"""A run that was killed at any moment ends like one that was not; nothing that was saved is lost."""

from __future__ import annotations

import codecs
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from held_elsewhere import held_elsewhere
from train_cases import OPTIONS, Watched, curve, data, model, run, small, weights

from beit3_fast.errors import CheckpointError, ConfigError
from beit3_fast.train import MaskedDataModelling, TrainOptions, checkpoints, loop, read_log
from beit3_fast.train.checkpoints import Checkpoints
from beit3_fast.train.log import Log
from beit3_fast.train.optimizer import Optimizer


def assert_same(folder: Path, whole: Path, moment: str = "") -> None:
    assert curve(folder) == curve(whole), moment
    for name in ("model", "average"):
        own, expected = weights(folder, name), weights(whole, name)
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in expected), (moment, name)


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    report = run(world, folder)
    assert (report.step, report.resumed, report.complete) == (8, 0, True)
    return folder


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, patch: pytest.MonkeyPatch) -> None:
    """Die at the ``number``th call of a function, before it does anything."""
    call, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            die()
        return call(*arguments, **options)

    patch.setattr(owner, name, counted)


def half_written(patch: pytest.MonkeyPatch) -> None:
    """Die at the second checkpoint when half of its file is on the disk."""
    save, calls = checkpoints.dcp.save, []

    def cut(state: Any, storage_writer: Any) -> None:
        save(state, storage_writer=storage_writer)
        calls.append(1)
        if len(calls) == 2:
            file = storage_writer.path / "__0_0.distcp"
            os.truncate(file, file.stat().st_size // 2)
            (storage_writer.path / ".metadata").unlink()
            die()

    patch.setattr(checkpoints.dcp, "save", cut)


def at_rename(name: str, patch: pytest.MonkeyPatch) -> None:
    """Die before a folder gets a name."""
    rename = os.rename

    def unless(source: Any, target: Any) -> None:
        if Path(target).name == name:
            die()
        rename(source, target)

    patch.setattr(os, "rename", unless)


# How many steps are not lost, and when the process dies.
MOMENTS: dict[str, tuple[int, Callable[[pytest.MonkeyPatch], None]]] = {
    "before the first checkpoint": (0, lambda patch: at_call(Optimizer, "step", 3, patch)),
    "between two checkpoints": (6, lambda patch: at_call(Optimizer, "step", 8, patch)),
    "half a checkpoint": (3, half_written),
    "before the new name": (3, lambda patch: at_rename("step-00000006", patch)),
    "before the old one goes": (8, lambda patch: at_rename(".step-00000003.partial", patch)),
    "at the end": (8, lambda patch: at_call(loop, "save_checkpoint", 2, patch)),
}


# In them little happens that others do not meet.
REPEATS = ("before the new name", "at the end")


def started(work: Callable[[], Any]) -> int:
    """Begin something in a process of its own, whose number is returned."""
    process = os.fork()
    if not process:
        try:
            work()
        finally:
            os._exit(0)
    return process


def child(work: Callable[[], Any]) -> int:
    """Do something in a process of its own; how it ended, as ``os.waitpid`` has it."""
    return os.waitpid(started(work), 0)[1]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=pytest.mark.full if moment in REPEATS else ())
        for moment in MOMENTS
    ],
)
def test_killed_and_continued(moment: str, world: Path, whole: Path, tmp_path: Path) -> None:
    done, plant = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:

        def work() -> None:
            plant(patch)
            run(world, tmp_path)

        assert child(work) == signal.SIGKILL
    # Nothing of the new process may show, except, where nothing was saved, the weights that it begins with.
    own = small(world, seed=99 if done else 0)
    torch.manual_seed(99)
    assert run(world, tmp_path, own=own).resumed == done
    assert_same(tmp_path, whole)
    assert Checkpoints(tmp_path, 2).steps() == [6, 8]
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.full
def test_killed_at_twenty_random_points(world: Path, whole: Path, tmp_path: Path) -> None:
    luck = random.Random(0)
    start = time.monotonic()
    run(world, tmp_path / "measure")
    seconds = time.monotonic() - start
    for number in range(20):
        folder = tmp_path / str(number)
        deaths = 0
        while True:
            process = os.fork()
            if not process:
                run(world, folder)
                os._exit(0)
            if deaths < 1 + number % 3:
                time.sleep(luck.uniform(0.0, seconds))
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            if status == 0:
                break
            deaths += 1
        assert_same(folder, whole, str(number))


@pytest.mark.full
def test_two_hundred_kills_while_saving(tmp_path: Path) -> None:
    luck = random.Random(1)
    state = {"w": torch.randn(300_000)}

    def save_on() -> None:
        own = Checkpoints(tmp_path, keep=1)
        step = (own.steps() or [0])[-1]
        while True:
            step += 1
            state["w"].fill_(step)
            own.save(step, state, {})

    last = 0
    for _ in range(200):
        process = os.fork()
        if not process:
            save_on()
        time.sleep(luck.uniform(0.005, 0.06))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        own = Checkpoints(tmp_path, keep=1)
        steps = own.steps()
        if steps:
            assert own.facts(steps[-1])["step"] == steps[-1] >= last
            read = {"w": torch.zeros(300_000)}
            own.load(steps[-1], read)
            assert bool((read["w"] == steps[-1]).all())
            last = steps[-1]
        assert steps or not last
    assert last > 20


def test_workers_and_rarer_checkpoints_change_nothing(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    options = replace(OPTIONS, workers=2, save_every=5, keep=3)
    assert run(world, tmp_path, options).step == 8
    assert_same(tmp_path, whole)
    assert Checkpoints(tmp_path, 3).steps() == [5, 8]


def test_sigterm_saves_and_returns(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = Optimizer.step, []

    def terminated(self: Optimizer, number: int) -> float:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", terminated)
        report = run(world, tmp_path)
    assert (report.step, report.complete) == (5, False)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "model.safetensors").exists()
    assert run(world, tmp_path).resumed == 5
    assert_same(tmp_path, whole)


def test_a_second_sigterm_does_not_end_the_save(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints.dcp.save

    def terminated(state: Any, storage_writer: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(state, storage_writer=storage_writer)

    with monkeypatch.context() as patch:
        # The first one comes while step 3 is saved, the second in the save that it asks for.
        patch.setattr(checkpoints.dcp, "save", terminated)
        assert run(world, tmp_path).step == 3
    assert run(world, tmp_path).resumed == 3
    assert_same(tmp_path, whole)


def test_sigterm_to_all_processes_of_a_run_with_workers(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    """As schedulers send it: to the whole group, and again."""
    ready, options = tmp_path / "ready", replace(OPTIONS, workers=2)

    def wait(number: int) -> None:
        if number == 9:
            ready.touch()
            time.sleep(1.0)

    def work() -> None:
        os.setpgid(0, 0)
        run(world, tmp_path / "run", options, objective=Watched(wait))

    process = started(work)
    while not ready.exists():
        time.sleep(0.02)
    for _ in range(2):
        os.killpg(process, signal.SIGTERM)
        time.sleep(0.05)
    assert os.waitpid(process, 0)[1] == 0
    assert Checkpoints(tmp_path / "run", 2).steps() == [3, 5]
    assert run(world, tmp_path / "run", options).resumed == 5
    assert_same(tmp_path / "run", whole)


def test_a_finished_run_is_left_as_it_is(world: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    own = small(world, seed=5)
    report = run(world, tmp_path / "run", own=own)
    assert (report.step, report.resumed, report.complete) == (8, 8, True)
    assert_same(tmp_path / "run", whole)
    assert all(torch.equal(own.state_dict()[k], v) for k, v in weights(whole).items())


def test_another_run_is_refused(world: Path, whole: Path) -> None:
    before = curve(whole)
    with pytest.raises(ConfigError, match="holds another run, of another lr; give another folder"):
        run(world, whole, replace(OPTIONS, lr=1.0))
    with pytest.raises(ConfigError, match="of another data"):
        run(world, whole, data=data(world, seed=1))
    with pytest.raises(ConfigError, match="of another objective"):
        run(world, whole, objective=MaskedDataModelling(text=2.0))
    for change in ({"num_heads": 4}, {"drop_path_rate": 0.9}, {"embed_dim": 16}):
        with pytest.raises(ConfigError, match="of another model"):
            run(world, whole, own=model(world, attention="shared", **change))
    assert curve(whole) == before


def test_other_images_are_another_run_and_a_moved_folder_is_not(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(world, moved)
    assert run(world, whole, data=data(moved)).resumed == 8
    index = moved / "imagenet.train.index.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[0]] * len(lines)))
    with pytest.raises(ConfigError, match="of another data"):
        run(world, whole, data=data(moved))


def test_a_damaged_checkpoint_names_the_one_before(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    for damage in ("__0_0.distcp", "run.json", ".metadata"):
        folder = tmp_path / damage
        shutil.copytree(whole, folder)
        (folder / "step-00000008" / damage).write_bytes(b"{")
        with pytest.raises(CheckpointError, match="remove the folder to go on from step 6"):
            run(world, folder)
        before = curve(folder)
    shutil.rmtree(folder / "step-00000008")
    assert curve(folder) == before == curve(whole)
    assert run(world, folder).resumed == 6
    assert_same(folder, whole)


def test_a_full_disk(world: Path, whole: Path, tmp_path: Path) -> None:
    """A limit to the size of files stands for a disk without room: both are errors of the system while writing."""
    shutil.copytree(whole, tmp_path / "run")
    said = tmp_path / "said"

    def work() -> None:
        shutil.rmtree(tmp_path / "run/step-00000008")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            run(world, tmp_path / "run")
        except CheckpointError as error:
            said.write_text(str(error))

    child(work)
    assert (
        "cannot be written: File too large (make room, or write to another disk)"
        in said.read_text()
    )
    assert "older checkpoints are unchanged" in said.read_text()
    assert Checkpoints(tmp_path / "run", 2).steps() == [6]
    assert run(world, tmp_path / "run").resumed == 6
    assert_same(tmp_path / "run", whole)


def test_a_full_disk_under_the_log(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.write({"step": 1, "loss": float("inf")})
    log.close()
    with open("/dev/full", "wb", buffering=0) as full:
        log._file = codecs.getwriter("utf-8")(full)  # type: ignore[assignment]
        with pytest.raises(
            CheckpointError, match=r"log.jsonl: cannot be written: No space left .*make room"
        ):
            log.write({"step": 2})
    assert read_log(tmp_path) == [{"step": 1, "loss": None}]


@pytest.mark.parametrize("content", ["\0" * 20, "{}}", "half\u2028a line", "[1]", "{}"])
def test_a_line_of_the_log_that_is_none(content: str, tmp_path: Path) -> None:
    """As a power cut leaves one."""
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{content}\n{{"step": 3}}\n')
    for read in (lambda: read_log(tmp_path), lambda: Log(tmp_path, 3)):
        with pytest.raises(CheckpointError, match=r"log.jsonl: line 2 must be JSON, got .*remove"):
            read()


def test_a_disk_that_is_full_while_a_run_writes_its_log(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Log.__init__

    def on_a_full_disk(self: Log, *arguments: Any) -> None:
        begin(self, *arguments)
        self._file.close()
        self._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115

    monkeypatch.setattr(Log, "__init__", on_a_full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        run(world, tmp_path)


def test_two_processes_do_not_meet(world: Path, tmp_path: Path) -> None:
    with (
        held_elsewhere(tmp_path),
        pytest.raises(CheckpointError, match="another process writes to"),
    ):
        run(world, tmp_path, TrainOptions(steps=1))
