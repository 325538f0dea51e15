"""What torchrun tells the processes that it starts."""

from __future__ import annotations

import os


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank_here() -> int:
    """This process's number under torchrun, else 0."""
    return int(os.environ["RANK"]) if started_by_torchrun() else 0
