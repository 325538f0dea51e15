"""The processes of a run, one or those that torchrun started, and what they tell each other."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from beit3_fast.errors import Beit3FastError, CheckpointError, TrainingError
from beit3_fast.torchrun import started_by_torchrun

T = TypeVar("T")

# What the libraries below torch.distributed say where a connection ends.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")

# A DistributedDataParallel that is the last to hold its group frees it with the interpreter locked, and can wait forever for a
# thread that needs the interpreter.
_groups: list[Any] = []


class Processes:
    """``size`` processes, of which this one is ``rank``. Every method is to be called by all of them, in one order."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sums(self, *own: Mapping[str, Any]) -> list[Counter[str]]:
        """The sums by name over all processes, of each mapping: in the order of ranks, so the same bits everywhere."""
        told: list[Any] = [own]
        if self.size > 1:
            told = [None] * self.size
            dist.all_gather_object(told, own)
        totals: list[Counter[str]] = [Counter() for _ in own]
        for parts in told:
            for total, part in zip(totals, parts, strict=True):
                total.update(part)
        return totals

    def lead(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, where alone it is done; an error of this package is raised everywhere."""
        told: list[Any] = [None, None]
        if self.leads:
            try:
                told[0] = work()
            except Beit3FastError as error:
                told[1] = error
        if self.size > 1:
            dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        result: T = told[0]
        return result

    def lead_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, in every process, in the others after rank 0, which may write what they read."""
        made: list[T] = []
        self.lead(lambda: made.append(work()))
        return made[0] if self.leads else work()

    def check_shared(self, folder: Path) -> None:
        """Raises CheckpointError where a process does not see what rank 0 writes into ``folder``."""
        if self.size == 1:
            return
        path = folder / f".shared-{secrets.token_hex(6)}"

        def leave() -> str:
            path.touch()
            return path.name

        name = self.lead(leave)
        (seen,) = self.sums({"seen": (folder / name).exists()})
        if self.leads:
            path.unlink(missing_ok=True)
        if seen["seen"] < self.size:
            raise CheckpointError(
                f"{folder}: {self.size - seen['seen']} of {self.size} processes do not see what rank 0 writes there; "
                "give a folder on a file system that all machines share"
            )


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run, connected as long as the block lasts, unless they are connected already.

    Under torchrun with CUDA a process takes the device of its local rank; tensors there go by NCCL, all else by gloo. Raises
    TrainingError where another process is lost.
    """
    begins = started_by_torchrun() and not dist.is_initialized()
    if begins:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        _groups.append(dist.group.WORLD)
    processes = Processes()
    try:
        yield processes
    except RuntimeError as error:
        if processes.size == 1 or not is_lost(error):
            raise
        raise TrainingError(
            f"rank {processes.rank} lost the other processes of the run ({' '.join(str(error).split())[:200]}); look "
            "for the first error of another rank; the same command goes on from the last checkpoint"
        ) from error
    finally:
        if begins:
            dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether another process ended, or cannot be reached."""
    if isinstance(error, Beit3FastError):
        return False
    return isinstance(error, dist.DistError) or any(own in str(error).lower() for own in _LOST)
