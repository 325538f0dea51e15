"""Several processes on this machine, told of each other as torchrun does it."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def on_ranks(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returns in each of ``size`` processes, or how the process ended, as ``os.waitpid`` has it.

    ``folder`` takes the results. What ``work`` raises fails the test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        process = os.fork()
        if not process:
            _child(rank, size, port, folder, work)
        processes.append(process)
    ends = [os.waitpid(process, 0)[1] for process in processes]
    results: list[Any] = []
    for rank, end in enumerate(ends):
        failed = folder / f"{rank}.txt"
        assert not failed.exists(), failed.read_text()
        path = folder / f"{rank}.pt"
        results.append(torch.load(path, weights_only=False) if path.exists() else end)
    return results


def _child(rank: int, size: int, port: int, folder: Path, work: Callable[[int], Any]) -> None:
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }
    try:
        torch.set_num_threads(1)
        with mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()}):
            torch.save(work(rank), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(0)
