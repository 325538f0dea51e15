"""A line that says how far a job is, how fast, and how long it will take."""

from __future__ import annotations

import sys
import time

_WIDTH = 24
# A terminal shows motion; a log file is spared.
_TERMINAL_EVERY, _LOG_EVERY = 0.2, 30.0


class Progress:
    """On stderr where ``shown``: a bar that is drawn again in place on a terminal, now and then a line elsewhere."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.done, self.before = total, done, done
        self.skipped = 0
        self.note = ""
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def add(self, done: int, skipped: int = 0) -> None:
        """``done`` more items, ``skipped`` of them in vain."""
        self.done += done
        self.skipped += skipped
        now = time.monotonic()
        if self._shown and now - self._last >= (_TERMINAL_EVERY if self._terminal else _LOG_EVERY):
            self._last = now
            self._write(now)

    def say(self, note: str) -> None:
        """What stands at the end of the line from now on."""
        self.note = f", {note}"

    def clear_line(self) -> None:
        """Make room for a message."""
        if self._terminal:
            sys.stderr.write("\r\x1b[K")

    def close(self) -> None:
        """The last state, and the end of the line."""
        if self._terminal:
            self._write(time.monotonic())
            sys.stderr.write("\n")

    def line(self, seconds: float) -> str:
        """What is shown after ``seconds`` of work."""
        full = _WIDTH * self.done // max(1, self.total)
        rate = (self.done - self.before) / seconds if seconds > 0 else 0.0
        left = _clock((self.total - self.done) / rate) if rate else "?"
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return (
            f"[{'#' * full}{'.' * (_WIDTH - full)}] {self.done}/{self.total}, {rate:.1f}/s, {left} left"
            + skipped
            + self.note
        )

    def _write(self, now: float) -> None:
        line = self.line(now - self._start)
        sys.stderr.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
