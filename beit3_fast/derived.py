"""Tensors derived from weights (stacked, packed, interpolated), kept as long as the weights are unchanged.

A derived tensor is recomputed when a source's storage, dtype, device or version counter changes; optimizers,
``load_state_dict``, ``copy_`` and ``.to()`` are all seen. Writing through ``parameter.data`` leaves no trace in
PyTorch: call ``beit3_fast.refresh(model)`` after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
Stamp = tuple[tuple[Any, ...], ...]

_lock = threading.RLock()
_store: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _stamp(source: Tensor) -> tuple[Any, ...]:
    return (id(source), source.data_ptr(), source._version, source.dtype, source.device)


def derived(kind: str, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
    """``make()``, or what it returned before for these very sources in their present state.

    Tensors made under ``torch.inference_mode`` carry no version counter: for them nothing is kept. Thread
    safe; ``make`` runs at most once per state.
    """
    if any(source.is_inference() for source in sources) or torch.compiler.is_compiling():
        return make()
    stamp: Stamp = tuple(_stamp(source) for source in sources)
    owner = sources[0]
    entries = _store.get(owner)
    if entries is not None:
        entry = entries.get(kind)
        if entry is not None and entry[0] == stamp:
            return entry[1]
    with _lock:
        entries = _store.setdefault(owner, {})
        entry = entries.get(kind)
        if entry is None or entry[0] != stamp:
            with torch.no_grad(), torch.inference_mode(False):
                entry = (stamp, make())
            entries[kind] = entry
        return entry[1]


def forget(module: nn.Module) -> None:
    """Drop everything derived from the parameters and buffers of ``module``."""
    with _lock:
        for tensor in (*module.parameters(), *module.buffers()):
            _store.pop(tensor, None)
