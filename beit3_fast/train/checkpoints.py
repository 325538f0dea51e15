"""Checkpoints of a run: folders that appear whole or not at all, written by torch.distributed.checkpoint.

A folder is written under a name that nobody reads, brought to the disk and renamed, so a process may die at any moment. Each
process writes its parts; any number of processes reads them. The folder's
``.metadata`` is a pickle, as PyTorch has it: go on only with runs that you trust. (The weights at the end are saved as
safetensors.)
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from beit3_fast.checkpoint.atomic import mend, sync_folder
from beit3_fast.errors import CheckpointError
from beit3_fast.train.processes import Processes, is_lost

_PREFIX, _PARTIAL = "step-", ".partial"
_FACTS = "run.json"


class Checkpoints:
    """The checkpoints in a folder, the last ``keep`` of which stay. What killed processes left is swept at the start.

    Those of steps that were skipped (fact "in_a_row") take the place of none: older weights may be the last good ones.
    All processes of a run make one, save and load together; rank 0 alone sweeps, names and removes.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.processes = processes or Processes()
        self.processes.lead(self._sweep)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        found = [path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in found if name.isdecimal())

    def save(self, step: int, state: dict[str, Any], facts: Mapping[str, Any]) -> None:
        """Write nested tensors ``state`` and ``facts`` for JSON. Raises CheckpointError; older ones are then as they were."""
        target, partial = self._path(step), self._partial(step)

        def begin() -> None:
            with _explained(target):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def finish() -> None:
            with _explained(target):
                _write_facts(partial / _FACTS, {"step": step, **facts})
                sync_folder(partial)
                if not target.exists():
                    os.rename(partial, target)
                sync_folder(self.folder)
            self._prune()

        try:
            self.processes.lead(begin)
            with _explained(target):
                _quietly(
                    dcp.save,
                    state,
                    storage_writer=_Writer(partial, sync_files=True),
                )
            self.processes.lead(finish)
        finally:
            if self.processes.leads:
                shutil.rmtree(partial, ignore_errors=True)

    def facts(self, step: int) -> dict[str, Any]:
        """The facts of a checkpoint. Raises CheckpointError."""
        path = self._path(step) / _FACTS
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); {self._instead(step)}"
            ) from error
        if not isinstance(facts, dict) or facts.get("step") != step:
            raise CheckpointError(f"{path} is not of this step; {self._instead(step)}")
        return facts

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Read a checkpoint into the tensors of ``state``. Raises CheckpointError."""
        path = self._path(step)
        try:
            _quietly(dcp.load, state, storage_reader=dcp.FileSystemReader(path))
        except Exception as error:
            if self.processes.size > 1 and is_lost(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(
                f"{path} cannot be read ({reason}); {self._instead(step)}"
            ) from error

    def _sweep(self) -> None:
        for path in self.folder.glob(f".{_PREFIX}*{_PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        counted = [step for step in steps if not self._skipped(step)]
        first = counted[-self.keep] if len(counted) >= self.keep else 0
        for old in steps:
            if old < first:
                # Renamed first: what is deleted halfway must not look like a checkpoint.
                os.rename(self._path(old), self._partial(old))
                shutil.rmtree(self._partial(old), ignore_errors=True)

    def _skipped(self, step: int) -> bool:
        try:
            return bool(self.facts(step).get("in_a_row"))
        except CheckpointError:
            return False

    def _path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08}"

    def _partial(self, step: int) -> Path:
        return self.folder / f".{_PREFIX}{step:08}{_PARTIAL}"

    def _instead(self, step: int) -> str:
        older = [other for other in self.steps() if other < step]
        if older:
            return f"remove the folder to go on from step {older[-1]}"
        return "there is no older one; give another folder to begin anew"


class _Writer(dcp.FileSystemWriter):
    """Raises the error of the system itself: the other ranks are told of a failure without its context."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            failure = _of_the_system(error)
            if failure is None:
                raise
            raise failure from None


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {error.strerror or error}{mend(error)}; older checkpoints are unchanged"
        ) from error


def _write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(facts, file)
        file.flush()
        os.fsync(file.fileno())


def _quietly(call: Any, state: dict[str, Any], **options: Any) -> None:
    """Run what may be told that it is alone. Raises the first failure itself, which PyTorch wraps in a BaseException."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        try:
            call(state, **options)
        except dcp.CheckpointException as error:
            failure = next(iter(error.failures.values()))[0]
            raise failure from error


def _of_the_system(error: BaseException) -> OSError | None:
    """The error of the system behind one of torch.save's, which complains of the file that it could not end."""
    while not isinstance(error, OSError):
        if error.__context__ is None:
            return None
        error = error.__context__
    return error
