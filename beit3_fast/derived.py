"""Tensors derived from weights (stacked, packed, interpolated), kept as long as the weights are unchanged.

A derived tensor is recomputed when a source's storage, strides, dtype, device or version counter changes: ``load_state_dict``,
``copy_``, ``.to()`` and the ``step`` of any ``torch.optim.Optimizer`` (a fused one too, which leaves the counter alone: steps
are watched) are all seen. What PyTorch writes without counting is not, and needs ``beit3_fast.refresh(model)`` after it:

- through ``parameter.data``, ``parameter.untyped_storage()``, numpy or a tensor from ``from_dlpack``;
- by a collective of ``torch.distributed`` (``broadcast``, ``all_reduce``);
- by a fused optimizer's function without its object (``torch.optim.sgd.sgd(..., fused=True)``).

Of tensors in shared memory, which other processes may write, nothing is kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from beit3_fast.errors import ConfigError
from beit3_fast.locks import fork_safe_lock

T = TypeVar("T")
Stamp = tuple[tuple[Any, ...], ...]

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_lock = fork_safe_lock()
_store: WeakIdKeyDictionary = WeakIdKeyDictionary()
_sources: WeakIdKeyDictionary = WeakIdKeyDictionary()
_taken = threading.local()
_times_forgotten = 0


class _Entry(NamedTuple):
    """A derived value, the state of its sources, and the sources and their storages, held weakly.

    The weak references tell a source from a later one at the same address: memory is soon used again.
    """

    stamp: Stamp
    sources: tuple[weakref.ref[Tensor], ...]
    storages: tuple[StorageWeakRef, ...]
    value: Any

    def holds(self, sources: Sequence[Tensor], stamp: Stamp) -> bool:
        """Whether the value belongs to these very sources in the state ``stamp``."""
        return self.stamp == stamp and all(
            own() is source for own, source in zip(self.sources, sources, strict=True)
        )


def _stamp(source: Tensor) -> tuple[Any, ...]:
    return (
        source.untyped_storage()._cdata,
        source.data_ptr(),
        source._version,
        source.dtype,
        source.device,
        source.stride(),
    )


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a computation with these tensors is recorded for derivatives, so that nothing of it may be kept."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return is_transformed()


def is_transformed() -> bool:
    """Whether this runs under forward-mode differentiation or a transform of ``torch.func`` (jvp, grad, vmap), which know
    PyTorch's own calls only."""
    if torch.compiler.is_compiling():
        return False
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_kept(source: Tensor) -> bool:
    """Whether ``derived`` keeps what is made of this tensor."""
    return not (source.is_inference() or (source.device.type == "cpu" and source.is_shared()))


def derived(kind: str, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
    """``make()``, or what it returned before for these very sources in their present state.

    Tensors made under ``torch.inference_mode`` carry no version counter: for them nothing is kept, nor in a transform of
    ``torch.func`` or under a ``FakeTensorMode``. Thread safe; ``make`` runs at most once per state.
    """
    if torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
        return make()
    if is_transformed() or torch._C._get_dispatch_mode(_FAKE) is not None:
        return make()
    stamp: Stamp = tuple(_stamp(source) for source in sources)
    owner = sources[0]
    entries = _store.get(owner)
    if entries is not None:
        entry = entries.get(kind)
        if entry is not None and entry.holds(sources, stamp):
            return taken(entry.value)
    with _lock:
        entries = _store.setdefault(owner, {})
        entry = entries.get(kind)
        if entry is None or not entry.holds(sources, stamp):
            with torch.inference_mode(False), torch.no_grad():
                value = make()
            if not all(map(is_kept, sources)):
                return taken(value)
            entry = _Entry(
                stamp,
                tuple(weakref.ref(source) for source in sources),
                tuple(StorageWeakRef(source.untyped_storage()) for source in sources),
                value,
            )
            entries[kind] = entry
            for source in sources:
                _sources[source] = None
        return taken(entry.value)


@contextmanager
def keeping() -> Iterator[list[Any]]:
    """A list of the derived values that this thread takes within it: what a CUDA graph reads must live as long as the graph."""
    before, _taken.values = getattr(_taken, "values", None), []
    try:
        yield _taken.values
    finally:
        _taken.values = before


def taken(value: T) -> T:
    """The value, noted down where this thread is ``keeping`` what it takes."""
    if not torch.compiler.is_compiling():
        values = getattr(_taken, "values", None)
        if values is not None:
            values.append(value)
    return value


class Snapshot:
    """The tensors of a module as they are: ``holds`` says whether they are the same ones in the same state.

    Their memory stays, so no other tensor comes to the same address. Like derived tensors it sees everything but what is
    written without being counted, and that after ``refresh`` of any module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = [
            (table, name, tensor, tensor.data_ptr(), _version(tensor))
            for part in module.modules()
            for table in (part._parameters, part._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self._memory = [tensor.detach() for _, _, tensor, _, _ in self._own]
        self._forgotten = _times_forgotten

    def holds(self) -> bool:
        """Whether every tensor is the one that it was, in its place and unchanged."""
        for table, name, tensor, pointer, version in self._own:
            if table.get(name) is not tensor or tensor.data_ptr() != pointer:
                return False
            if version is not None and tensor._version != version:
                return False
        return _times_forgotten == self._forgotten


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def forget(module: nn.Module) -> None:
    """Drop everything derived from the parameters and buffers of ``module``: after they were written without PyTorch's counting
    it (the list is at the top of this module), and before ``torch.utils.swap_tensors``. Raises ConfigError for no module.
    """
    global _times_forgotten
    if not isinstance(module, nn.Module):
        raise ConfigError(f"refresh takes a torch.nn.Module, got {type(module).__name__}")
    with _lock:
        for tensor in (*module.parameters(), *module.buffers()):
            _store.pop(tensor, None)
            _sources.pop(tensor, None)
        _times_forgotten += 1


def _after_step(optimizer: Optimizer, *_: object) -> None:
    with _lock:
        changed = [p for group in optimizer.param_groups for p in group["params"] if p in _sources]
    if changed:
        increment_version(changed)


register_optimizer_step_post_hook(_after_step)
