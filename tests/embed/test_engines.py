"""One job on several processes: every shard once, the files of one process, and a process that dies costs its shard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from embed_cases import Data

import beit3_fast
from beit3_fast.embed.ranks import Ranks
from beit3_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

# Pairs of ranks, as torchrun starts them, forked from one process that has imported everything. Each notes what it makes,
# and waits over its first shard for the other's first. In the third job rank 1 dies over its second shard, for which
# rank 0 waits over its own; over its third, when it must have heard of rank 1's first, it is ended, as torchrun does.
RANKS = """
import ctypes, json, os, signal, socket, sys, time
import beit3_fast
from beit3_fast.embed import work

checkpoint, folder, *sources = sys.argv[1:]
model = beit3_fast.create_model("beit3_tiny_patch16_32_retrieval", checkpoint)

def until(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)

def known(out):
    path = os.path.join(out, "manifest.json")
    # rank 1 may be gone before rank 0 has written its first
    if not os.path.exists(path):
        return []
    with open(path) as manifest:
        return json.load(manifest)["shards"]

def rank(number, port, job, out):
    # one that outlived the parent would hold its pipes open, and hide what the parent said
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none",
    }
    write, made = work.write_shard, []
    def noted(folder, shard, *rest):
        if job == "killed" and made:
            if number == 1:
                open(out + ".dying", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            until(lambda: os.path.exists(out + ".dying"))
            if len(made) == 2:
                time.sleep(99)
        with open(out + "." + job, "a") as log:
            log.write(f"{number} {shard}\\n")
        if not made:
            until(lambda: len({line[0] for line in open(out + "." + job)}) == 2)
        made.append(shard)
        return write(folder, shard, *rest)
    work.write_shard = noted
    report = beit3_fast.embed_dataset(
        model, sources, out, processor=beit3_fast.Processor.for_model(model),
        batch_size=2, shard_size=2, workers=0,
    )
    assert (report.embedded, report.skipped, len(report.shards)) == (12, 2, 7), report

for job, name in (("first", "a"), ("again", "a"), ("killed", "b"), ("resumed", "b")):
    out = os.path.join(folder, name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in (1, 0):
        child = os.fork()
        if not child:
            rank(number, port, job, out)
            os._exit(0)
        children.append(child)
    ends = [os.waitpid(children[0], 0)[1]]
    if job == "killed":
        (heard,) = [line.split()[1] for line in open(out + ".killed") if line[0] == "1"]
        until(lambda: heard in known(out))
        os.kill(children[1], signal.SIGKILL)
    ends.append(os.waitpid(children[1], 0)[1])
    assert ends == ([signal.SIGKILL] * 2 if job == "killed" else [0, 0]), (job, ends)
    if job == "killed":
        print(*known(out))
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(beit3_fast.save_checkpoint(model, tmp_path_factory.mktemp("c") / "m.safetensors"))


@pytest.fixture(scope="module")
def whole(
    model: Any, processor: Any, data: Data, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("whole")
    images = beit3_fast.Processor.for_model(model)
    settings: dict[str, Any] = {"batch_size": 2, "shard_size": 2, "workers": 0}
    beit3_fast.embed_dataset(model, [data.folder, data.tar], out, processor=images, **settings)
    return files(out)


def made(log: Path) -> list[tuple[str, int]]:
    """(rank, shard), in the order in which they were made."""
    pairs = [line.split() for line in log.read_text().splitlines()]
    return [(rank, int(shard)) for rank, shard in pairs]


def test_ranks_share_a_job_and_one_may_die(
    checkpoint: str, data: Data, whole: dict[str, bytes], tmp_path: Path
) -> None:
    call = [sys.executable, "-c", RANKS, checkpoint, str(tmp_path), str(data.folder)]
    done = subprocess.run(
        [*call, str(data.tar)], capture_output=True, text=True, check=False, timeout=100, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    known = set(map(int, done.stdout.split()))
    first = made(tmp_path / "a.first")
    assert sorted(shard for _, shard in first) == list(range(7))
    assert {rank for rank, _ in first} == {"0", "1"}
    assert files(tmp_path / "a") == whole
    assert not (tmp_path / "a.again").exists()

    killed = made(tmp_path / "b.killed")
    # rank 0 had heard of the one shard of rank 1
    assert [shard for rank, shard in killed if rank == "1" and shard in known]
    assert len(known) < 7
    resumed = made(tmp_path / "b.resumed")
    assert sorted(shard for _, shard in resumed) == sorted({*range(7)} - known)
    assert files(tmp_path / "b") == whole


def test_ranks_of_different_models_make_nothing() -> None:
    store = torch.distributed.HashStore()
    leader, follower = (Ranks.__new__(Ranks) for _ in range(2))
    leader.store = follower.store = store
    leader.rank, follower.rank = 0, 1
    work: Any = None

    def lead(_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leader.run(work, {"weights": "a", "items": 3, "tokenizer": None}, lead)
    with pytest.raises(ConfigError, match="rank 1 was started with another weights than rank 0"):
        follower.run(work, {"weights": "b", "items": 3, "tokenizer": None}, lead)


@pytest.mark.full
def test_torchrun(checkpoint: str, data: Data, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    call += ["beit3_fast", "embed", str(data.folder), str(data.tar), "--out", str(out)]
    call += ["--model", "beit3_tiny_patch16_32_retrieval", "--checkpoint", checkpoint]
    call += ["--batch-size", "2", "--shard-size", "2", "--workers", "0", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        call, capture_output=True, text=True, check=False, timeout=110, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    # of two processes one speaks
    (report,) = json.loads(done.stdout)
    assert (report["embedded"], report["shards"]) == (12, 7)
    assert files(out) == whole


@pytest.mark.full
@pytest.mark.timeout(300)
def test_ray_and_an_actor_that_is_killed(
    model: Any,
    data: Data,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    from beit3_fast.embed import ray_actors

    plain = ray_actors._Maker
    grave, log = tmp_path / "grave", tmp_path / "log"

    class Victim(plain):  # type: ignore[misc, valid-type]
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            if row["number"] == 2 and not grave.exists():
                grave.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            done: dict[str, Any] = super().__call__(row)
            with log.open("a") as file:
                file.write(f"{os.getpid()} {row['number']}\n")
            return done

    monkeypatch.setattr(ray_actors, "_Maker", Victim)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "out"
    options: dict[str, Any] = {"batch_size": 2, "shard_size": 2, "engine": "ray"}
    options |= {"processor": beit3_fast.Processor.for_model(model), "engine_workers": 2}
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        report = beit3_fast.embed_dataset(model, [data.folder, data.tar], out, **options)
        assert grave.exists()
        assert (report.embedded, report.skipped, report.resumed) == (12, 2, 0)
        lines = log.read_text().splitlines()
        assert sorted(line.split()[1] for line in lines) == [str(number) for number in range(7)]
        assert len({line.split()[0] for line in lines}) >= 2
        assert files(out) == whole
        again = beit3_fast.embed_dataset(model, [data.folder, data.tar], out, **options)
        assert again.resumed == 14
        with pytest.raises(ConfigError, match="engine_workers must be at most 2, the processors"):
            beit3_fast.embed_dataset(
                model, data.folder, tmp_path / "other", **(options | {"engine_workers": 3})
            )
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "dask"}, r"engine must be one of .*, got 'dask'"),
        ({"engine": "torchrun"}, r"start it with: torchrun --nproc-per-node 2"),
        ({"engine_workers": 2}, "goes with engine='ray'"),
        ({"engine": "local", "engine_workers": 2}, "goes with engine='ray'"),
    ],
)
def test_engines_that_cannot_be(
    options: dict[str, Any], message: str, model: Any, processor: Any, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        beit3_fast.embed_dataset(
            model, data.folder, tmp_path / "out", processor=processor, **options
        )
    assert not list(tmp_path.iterdir())


def test_without_ray(
    model: Any, processor: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"does not import .*; pip install 'ray\[data\]'"):
        beit3_fast.embed_dataset(
            model, data.folder, tmp_path / "out", processor=processor, engine="ray"
        )
