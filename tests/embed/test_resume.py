"""A job that was stopped at any moment ends with the same files as one that was not."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from embed_cases import Data
from held_elsewhere import held_elsewhere
from spm import tiny_sentencepiece_bytes, with_pieces
from torch import Tensor

import beit3_fast
from beit3_fast.embed import work
from beit3_fast.embed.decode import Chunk, Decoder
from beit3_fast.errors import CheckpointError, ConfigError, InputError
from beit3_fast.progress import Progress

# For each moment a process that dies by SIGKILL, without a chance to tidy, over the third shard. Forked from one that
# has imported everything and computed no embedding.
VICTIMS = """
import os, signal, sys
import beit3_fast
from beit3_fast.checkpoint import atomic
from beit3_fast.embed import manifest, work

checkpoint, out, *sources = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def plant(moment):
    if moment == "embedding":
        encode, calls = work.encode, []
        def sixth(*arguments):
            calls.append(1)
            if len(calls) == 6:
                die()
            return encode(*arguments)
        work.encode = sixth
    elif moment == "half a shard":
        replace = os.replace
        def half(partial, target):
            if target.name == "000002.safetensors":
                os.truncate(partial, 100)
                die()
            replace(partial, target)
        os.replace = half
    else:
        add = manifest.Manifest.add
        def before(self, number, shard):
            if number == 2:
                die()
            add(self, number, shard)
        manifest.Manifest.add = before

model = beit3_fast.create_model("beit3_tiny_patch16_32_retrieval", checkpoint)
for moment in ("embedding", "half a shard", "before the manifest"):
    child = os.fork()
    if not child:
        plant(moment)
        beit3_fast.embed_dataset(
            model, sources, out + moment, processor=beit3_fast.Processor.for_model(model),
            batch_size=2, shard_size=3, workers=1 if moment == "embedding" else 0,
        )
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""

TAKE = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(beit3_fast.save_checkpoint(model, tmp_path_factory.mktemp("c") / "m.safetensors"))


def run(checkpoint: str, out: Path, data: Data, **options: Any) -> Any:
    model = beit3_fast.create_model("beit3_tiny_patch16_32_retrieval", checkpoint)
    settings: dict[str, Any] = {"batch_size": 2, "shard_size": 3, "workers": 0} | options
    processor = beit3_fast.Processor.for_model(model)
    return beit3_fast.embed_dataset(
        model, [data.folder, data.tar], out, processor=processor, **settings
    )


def test_killed_and_resumed(checkpoint: str, data: Data, tmp_path: Path) -> None:
    call = [sys.executable, "-c", VICTIMS, checkpoint, f"{tmp_path}/", str(data.folder)]
    # a file, since a pipe would be waited for until the worker of the dead has noticed
    said = tmp_path / "stderr"
    with said.open("w") as file:
        done = subprocess.run([*call, str(data.tar)], stderr=file, check=False, timeout=100)
    assert done.returncode == 0, said.read_text()
    run(checkpoint, tmp_path / "whole", data)
    whole = files(tmp_path / "whole")
    for moment in ("embedding", "half a shard", "before the manifest"):
        out = tmp_path / moment
        assert set(json.loads((out / "manifest.json").read_text())["shards"]) == {"0", "1"}
        begun = os.stat(out / "000000.safetensors").st_mtime_ns
        # at once: a worker that outlives its parent must not keep the folder
        report = run(checkpoint, out, data)
        assert (report.embedded, report.skipped, report.resumed) == (12, 2, 6)
        assert os.stat(out / "000000.safetensors").st_mtime_ns == begun
        assert files(out) == whole, moment
        assert run(checkpoint, out, data).resumed == 14
        assert files(out) == whole


def test_a_shard_that_is_gone_or_cut_is_made_again(
    checkpoint: str, data: Data, tmp_path: Path
) -> None:
    run(checkpoint, tmp_path, data)
    before = files(tmp_path)
    (tmp_path / "000001.safetensors").unlink()
    (tmp_path / "000003.safetensors").write_bytes(b"cut")
    assert run(checkpoint, tmp_path, data).resumed == 14 - 6
    assert files(tmp_path) == before


def test_another_job_is_refused(
    model: Any, processor: Any, checkpoint: str, data: Data, tmp_path: Path
) -> None:
    run(checkpoint, tmp_path, data)
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="holds another job, of another shard_size; give another"):
        run(checkpoint, tmp_path, data, shard_size=4)
    with pytest.raises(ConfigError, match="another output"):
        run(checkpoint, tmp_path, data, output="cls")
    options: dict[str, Any] = {"processor": processor, "shard_size": 3, "workers": 0}
    with pytest.raises(ConfigError, match="another sources, items"):
        beit3_fast.embed_dataset(model, data.folder, tmp_path, **options)
    assert files(tmp_path) == before
    for damage in ("{", "[]", '{"format": "x"}', '{"format": "beit3_fast embeddings 1"}'):
        (tmp_path / "manifest.json").write_text(damage)
        with pytest.raises(CheckpointError, match=r"manifest.json cannot be used .*another folder"):
            run(checkpoint, tmp_path, data)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_weights_that_differ_a_little_are_another_job(
    kind: str, processor: Any, checkpoint: str, data: Data, tmp_path: Path
) -> None:
    def job(model: Any) -> Any:
        return beit3_fast.embed_dataset(
            model, data.folder, tmp_path, kind, processor=processor, workers=0
        )

    other = beit3_fast.create_model("beit3_tiny_patch16_32_retrieval", checkpoint)
    job(other)
    with torch.no_grad():
        if kind == "image":
            for weight in other.parameters():
                weight.mul_(1.001)
        else:
            other.backbone.text_embed.weight[-1].mul_(1.001)
    with pytest.raises(ConfigError, match="another job, of another weights"):
        job(other)


def test_rounded_weights_are_another_job_and_packed_ones_are_not(
    processor: Any, checkpoint: str, data: Data, tmp_path: Path
) -> None:
    def job(**options: Any) -> Any:
        name = "beit3_tiny_patch16_32_retrieval"
        own = beit3_fast.create_model(name, checkpoint, inference_only=True, **options)
        return beit3_fast.embed_dataset(
            own, data.folder, tmp_path, processor=processor, shard_size=3, workers=0
        )

    run_plain = beit3_fast.create_model("beit3_tiny_patch16_32_retrieval", checkpoint)
    options: dict[str, Any] = {"processor": processor, "shard_size": 3, "workers": 0}
    beit3_fast.embed_dataset(run_plain, data.folder, tmp_path, **options)
    assert job().resumed == 7
    for dtype in ("int8", "float8"):
        with pytest.raises(ConfigError, match="another weights"):
            job(dtype=dtype)
    for path in tmp_path.iterdir():
        path.unlink()
    job(dtype="int8")
    assert job(dtype="int8").resumed == 7


def test_files_written_again_are_another_job(
    model: Any, processor: Any, data: Data, tmp_path: Path
) -> None:
    shutil.copytree(data.folder, tmp_path / "photos")
    shutil.copy(data.tar, tmp_path)
    shutil.copy(data.index, tmp_path)
    sources = {"folder": "photos", "tar": data.tar.name, "index": data.index.name}

    def job(form: str) -> Any:
        return beit3_fast.embed_dataset(
            model,
            tmp_path / sources[form],
            tmp_path / f"out {form}",
            processor=processor,
            workers=0,
        )

    for form in sources:
        job(form)
        assert job(form).resumed
    for path in (tmp_path / "photos" / "0.png", tmp_path / data.tar.name):
        size, changed = path.stat().st_size, path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(changed + 1_000_000, changed + 1_000_000))
        assert path.stat().st_size == size
    for form in sources:
        with pytest.raises(
            ConfigError,
            match=r"of another sources, of which a file .* written again or is named by another path; ",
        ):
            job(form)


def test_another_tokenizer_is_another_job(
    model: Any, processor: Any, data: Data, tmp_path: Path
) -> None:
    def job(processor: Any, kind: str) -> Any:
        return beit3_fast.embed_dataset(
            model, data.folder, tmp_path / kind, kind, processor=processor, workers=0
        )

    other = beit3_fast.Processor.for_model(
        model, with_pieces(tiny_sentencepiece_bytes(), ["unheard"])
    )
    for kind in ("text", "pair", "image"):
        job(processor, kind)
    for kind in ("text", "pair"):
        with pytest.raises(ConfigError, match="another tokenizer"):
            job(other, kind)
    assert job(other, "image").resumed == 7


def test_a_worker_that_is_killed(
    checkpoint: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Decoder.__getitems__

    def killed(self: Decoder, places: list[int]) -> Chunk:
        if places[0] >= 6:
            time.sleep(0.5)  # until the first shards are taken
            os.kill(os.getpid(), signal.SIGKILL)
        return fetch(self, places)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__getitems__", killed)
        with pytest.raises(InputError, match=r"a decoding worker died .* the same call again"):
            run(checkpoint, tmp_path, data, workers=1)
    report = run(checkpoint, tmp_path, data)
    assert (report.embedded, report.skipped) == (12, 2)
    assert report.resumed <= 6


def test_a_worker_that_dies_while_the_model_computes(
    checkpoint: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch raises its error from a signal handler, wherever the main thread is."""

    def died(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(work, "encode", died)
    with pytest.raises(InputError, match=r"a decoding worker died .* the same call again"):
        run(checkpoint, tmp_path, data)


@pytest.mark.timeout(60)
def test_shared_memory_that_is_too_small(
    checkpoint: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("No space left on device (28)")

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
        wanted = (
            r"no room for 2 images of 0\.0234 MiB in all \(No space left.*workers=2 up to 5 batches of 2 wait.*; "
            r"take fewer workers .* --shm-size"
        )
        with pytest.raises(InputError, match=wanted):
            run(checkpoint, tmp_path, data, workers=2)

    def no_semaphore(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.data.DataLoader, "__iter__", no_semaphore)
        with pytest.raises(InputError, match=r"no room for what joins the processes \(.*No space"):
            run(checkpoint, tmp_path, data, workers=2)
    assert run(checkpoint, tmp_path, data, workers=2).embedded == 12


def test_two_processes_do_not_meet(checkpoint: str, data: Data, tmp_path: Path) -> None:
    with (
        held_elsewhere(tmp_path),
        pytest.raises(CheckpointError, match="another process writes to"),
    ):
        run(checkpoint, tmp_path, data)


def test_two_threads_do_not_meet(
    model: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"processor": beit3_fast.Processor.for_model(model), "workers": 0}
    encode, inside, finish = work.encode, threading.Event(), threading.Event()

    def waits(*arguments: Any) -> Tensor:
        if threading.current_thread() is first and not inside.is_set():
            inside.set()
            assert finish.wait(60)
        return encode(*arguments)

    monkeypatch.setattr(work, "encode", waits)
    first = threading.Thread(
        target=beit3_fast.embed_dataset, args=(model, data.folder, tmp_path), kwargs=options
    )
    first.start()
    try:
        assert inside.wait(60)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="another thread of this process writes to"):
                beit3_fast.embed_dataset(model, data.folder, tmp_path, **options)
        # the refused ones did not let other processes in
        call = [sys.executable, "-c", TAKE, str(tmp_path / ".lock")]
        assert subprocess.run(call, stderr=subprocess.DEVNULL, check=False).returncode
    finally:
        finish.set()
        first.join(60)
    assert beit3_fast.embed_dataset(model, data.folder, tmp_path, **options).resumed == 7


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [0.0]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = Progress(total=1000, done=200, shown=True)
    now[0] = 10.0
    bar.add(50)
    assert "] 250/1000, 5.0/s, 2:30 left" in terminal.getvalue()
    now[0] = 20.0
    bar.add(550, skipped=3)
    assert "] 800/1000, 30.0/s, 0:07 left, 3 skipped" in terminal.getvalue()
    assert bar.line(6e5).endswith("0.0/s, 55:33:20 left, 3 skipped")
    bar.close()
    assert terminal.getvalue().endswith("\n")
    silent = Terminal()
    monkeypatch.setattr(sys, "stderr", silent)
    quiet = Progress(10, 0, shown=False)
    now[0] = 99.0
    quiet.add(5)
    quiet.close()
    assert silent.getvalue() == ""
