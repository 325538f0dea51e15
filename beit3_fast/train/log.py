"""log.jsonl: a line for each step, the same whether a run was interrupted or not."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from beit3_fast.checkpoint.atomic import mend, replacing
from beit3_fast.errors import CheckpointError, ConfigError
from beit3_fast.finite import for_json

NAME = "log.jsonl"


class Log:
    """Appends to ``folder``/log.jsonl what was not written before: lines past ``step`` are dropped, half a line too.

    With ``tensorboard`` every number goes to ``folder``/tensorboard, too. Raises ConfigError where that is not installed,
    and as ``read_log``.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self._board = _board(folder / "tensorboard", step) if tensorboard else None
        self.path = folder / NAME
        if self.path.exists():
            whole = zip(_whole_lines(self.path), read_log(folder), strict=True)
            kept = [line for line, read in whole if read["step"] <= step]
            with replacing(self.path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())
        self._file = self.path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line; it survives the death of this process. Numbers that are not finite, which JSON has not, become null.

        Raises CheckpointError where it cannot be written.
        """
        plain = for_json(line)
        try:
            self._file.write(json.dumps(plain) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written: {error.strerror or error}{mend(error)}; checkpoints are unchanged"
            ) from error
        if self._board is not None:
            for key, value in plain.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(key, value, line["step"])

    def close(self) -> None:
        """Close the files."""
        # A line that could not be written was told of by ``write``; the others are written.
        with suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, numbers by name. Raises CheckpointError for one that is none."""
    path, read = folder / NAME, []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            read.append(_numbers(json.loads(line)))
        except ValueError as error:
            raise CheckpointError(
                f"{path}: line {number} must be JSON, got {line[:40]!r} ({error}); remove that line"
            ) from error
    return read


def _numbers(line: Any) -> dict[str, Any]:
    """Raises ValueError for what is no line of a log."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError('expected {"step": 1, ...}')
    for name, value in line.items():
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{name} is no number")
    return line


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"tensorboard = true needs the package tensorboard ({error}); pip install tensorboard, or leave it out: "
            f"{NAME} has the same numbers"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)


def _whole_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); give the folder of a run"
        ) from error
    return text[: text.rfind("\n") + 1].split("\n")[:-1]
