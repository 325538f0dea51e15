"""Four processes, and the command under torchrun: saved on some ranks and loaded on others, killed and terminated."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_recipe import RECIPE
from train_cases import OPTIONS, Watched, assert_close, curve, run, weights

from beit3_fast.checkpoint import read_checkpoint
from beit3_fast.train import read_log
from beit3_fast.train.checkpoints import Checkpoints

FOUR = replace(OPTIONS, steps=4, accumulation=4, warmup_steps=1, save_every=100)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_saved_on_four_ranks(engine: str, world: Path, tmp_path: Path) -> None:
    """Stopped on four ranks, a run goes on on four, bit for bit, on two with the other engine, and on one."""
    options = replace(FOUR, parallel=engine)
    run(world, tmp_path / "one process", FOUR)

    def stopped(rank: int) -> Any:
        def terminate(call: int) -> None:
            if rank == 3 and call == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return run(world, tmp_path / "stopped", options, objective=Watched(terminate))

    def resumed(folder: Path, its_engine: str, _: int) -> Any:
        return run(world, folder, replace(options, parallel=its_engine))

    assert {own.step for own in on_ranks(4, tmp_path / "ranks", stopped)} == {2}
    parts = list((tmp_path / "stopped/step-00000002").glob("*.distcp"))
    assert len(parts) == 4
    other = {"ddp": "fsdp2", "fsdp2": "ddp"}[engine]
    for size, its_engine in ((4, engine), (2, other), (1, engine)):
        folder = tmp_path / f"on {size}"
        shutil.copytree(tmp_path / "stopped", folder)
        go_on = partial(resumed, folder, its_engine)
        reports = on_ranks(size, tmp_path / f"ranks {size}", go_on)
        assert {own.resumed for own in reports} == {2}
        assert_close(folder, tmp_path / "one process")
    on_ranks(4, tmp_path / "ranks of all", partial(resumed, tmp_path / "whole", engine))
    assert curve(tmp_path / "on 4") == curve(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "on 4"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def torchrun(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "beit3_fast", "pretrain", f"--config={recipe}", f"--out={out}", "--quiet"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def workers(job: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    return [int(own) for own in path.read_text().split()]


def until_step(job: subprocess.Popen[str], out: Path, step: int) -> None:
    log = out / "log.jsonl"
    while not (log.exists() and len(read_log(out)) >= step):
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)


@pytest.fixture
def recipe(world: Path) -> Path:
    path = world / "two-ranks.toml"
    more = 'steps = 12\naccumulation = 2\nparallel = "fsdp2"\nema_decay = 0.9\n'
    path.write_text(RECIPE.replace("steps = 4\n", more))
    return path


@pytest.mark.full
@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
@pytest.mark.timeout(600)
def test_torchrun_killed_and_continued(recipe: Path, tmp_path: Path) -> None:
    """kill -9 of the launcher and its processes at random steps: the same command ends with the same bits."""
    luck = random.Random(2)
    whole = torchrun(recipe, tmp_path / "whole")
    said, complaint = whole.communicate()
    assert whole.returncode == 0, complaint
    assert said.count("12 steps, 0 skipped") == 1, "rank 0 alone reports"
    out = tmp_path / "killed"
    for least in (4, 8):
        job = torchrun(recipe, out)
        until_step(job, out, least)
        time.sleep(luck.uniform(0.0, 0.3))
        for process in (*workers(job), job.pid):
            os.kill(process, signal.SIGKILL)
        job.communicate()
    last = torchrun(recipe, out)
    assert last.wait() == 0, last.communicate()
    names = ("step", "loss", "lr", "grad_norm", "skipped")
    ours, theirs = (
        [[line[name] for name in names] for line in read_log(own)]
        for own in (out, tmp_path / "whole")
    )
    assert ours == theirs
    for name in ("model", "average"):
        own = read_checkpoint(out / f"{name}.safetensors").state
        expected = read_checkpoint(tmp_path / f"whole/{name}.safetensors").state
        assert all(torch.equal(own[key], tensor) for key, tensor in expected.items())


@pytest.mark.full
@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("whom", ["the launcher", "one rank"])
def test_torchrun_terminated(whom: str, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("steps = 12", "steps = 100000"))
    job = torchrun(recipe, tmp_path / "run")
    until_step(job, tmp_path / "run", 4)
    start = time.monotonic()
    os.kill(job.pid if whom == "the launcher" else workers(job)[1], signal.SIGTERM)
    job.communicate()
    assert time.monotonic() - start < 30
    steps = Checkpoints(tmp_path / "run", 2).steps()
    assert steps[-1] == len(read_log(tmp_path / "run"))
    assert not (tmp_path / "run/model.safetensors").exists()
