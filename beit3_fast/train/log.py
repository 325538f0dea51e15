"""log.jsonl: a line for each step, the same whether a run was interrupted or not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from beit3_fast.checkpoint.atomic import mend, replacing
from beit3_fast.errors import CheckpointError

NAME = "log.jsonl"


class Log:
    """Appends to ``folder``/log.jsonl what was not written before: lines past ``step`` are dropped, half a line too."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / NAME
        if self.path.exists():
            kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= step]
            with replacing(self.path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())
        self._file = self.path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line; it survives the death of this process. Numbers that are not finite, which JSON has not, become null.

        Raises CheckpointError where it cannot be written.
        """
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        try:
            self._file.write(json.dumps(plain) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written: {error.strerror or error}{mend(error)}; checkpoints are unchanged"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in _whole_lines(folder / NAME)]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
