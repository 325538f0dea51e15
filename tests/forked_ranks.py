"""Processes of one group, forked from this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(count: int, folder: Path, work: Callable[[int], object]) -> list[Any]:
    """What ``work(rank)`` gives in each of ``count`` processes of a gloo group; tensors and plain containers of them."""
    processes = []
    for rank in range(count):
        process = os.fork()
        if not process:
            code = 1
            try:
                # The threads of this process were not forked.
                torch.set_num_threads(1)
                store = f"file://{folder}/store"
                dist.init_process_group("gloo", store, rank=rank, world_size=count)
                torch.save(work(rank), folder / f"{rank}.pt")
                dist.destroy_process_group()
                code = 0
            finally:
                os._exit(code)
        processes.append(process)
    assert not any(os.waitpid(process, 0)[1] for process in processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
