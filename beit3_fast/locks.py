"""Locks that a forked process finds free, whoever held them when it was forked."""

from __future__ import annotations

import os
import threading
from typing import Any


def fork_safe_lock() -> Any:
    """A reentrant lock for a module. In a forked child it is as new: the thread that held it is not there to let go of it."""
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock
