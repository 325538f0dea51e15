"""A weight kept only in the layout that the CPU kernels read: one copy of it, for inference.

``PackedWeight`` is a tensor [O, I] whose memory is the packed form. ``expert_linear`` reads that form; to
everything else it behaves as the plain weight, which is unpacked for the call. It has no gradient and cannot be
changed in place, except as a whole by ``copy_`` (which ``load_state_dict`` uses); moved to another dtype or
device, it becomes a plain parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map

from beit3_fast.errors import ConfigError
from beit3_fast.ops import library
from beit3_fast.ops.dispatch import rows_in_memory


class PackedWeight(Tensor):
    """[O, I], fp32 or bf16, on the CPU; ``packed`` is the only memory. Made by ``pack``."""

    packed: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, shape: tuple[int, int]) -> PackedWeight:
        weight: PackedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=packed.dtype, device=packed.device, requires_grad=False
        )
        weight.packed = packed
        return weight

    def unpack(self) -> Tensor:
        """The plain weight [O, I], bit for bit what was packed."""
        library.load()
        plain: Tensor = torch.ops.beit3_fast.unpack_weight(self.packed, *self.shape)
        return plain

    @property
    def data(self) -> Tensor:
        """The same packed memory; setting another dtype or device makes this a plain parameter."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        # torch.nn.Module.to() ends here, with its own tensor where nothing has to change.
        if isinstance(value, PackedWeight):
            self.packed = value.packed
        elif (
            value.shape == self.shape and value.dtype == self.dtype and value.device == self.device
        ):
            self.packed = pack(value).packed
        else:
            torch.utils.swap_tensors(self, nn.Parameter(value.detach(), requires_grad=False))

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        """Raises ConfigError for True."""
        if requires_grad:
            raise ConfigError(
                "this weight is packed for inference and has no gradient; create the model without "
                "inference_only=True to train it"
            )
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return pack, (self.unpack(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        copied = _parameter(PackedWeight(self.packed.clone(), (self.shape[0], self.shape[1])))
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return PackedWeight(first.packed, (first.shape[0], first.shape[1]))
        if func is torch.ops.aten.copy_.default and isinstance(first, PackedWeight):
            source = args[1].unpack() if isinstance(args[1], PackedWeight) else args[1]
            plain = source.to(first.dtype).expand(first.shape)
            first.packed.copy_(pack(plain).packed)
            increment_version(first.packed)  # PyTorch does not count changes made within a dispatch
            return first
        if func._schema.is_mutable and isinstance(first, PackedWeight):
            raise ConfigError(
                f"{func._schema.name.removeprefix('aten::')} cannot change a weight that is packed for "
                "inference; create the model without inference_only=True"
            )

        def plainly(value: Any) -> Any:
            return value.unpack() if isinstance(value, PackedWeight) else value

        return func(*tree_map(plainly, args), **tree_map(plainly, kwargs or {}))


def pack(weight: Tensor) -> Any:
    """A weight [O, I], fp32 or bf16, as the parameter of an inference model."""
    library.load()
    packed = torch.ops.beit3_fast.pack_weight(rows_in_memory(weight.detach()))
    return _parameter(PackedWeight(packed, (weight.shape[0], weight.shape[1])))


def _parameter(weight: PackedWeight) -> Any:
    return nn.Parameter(weight, requires_grad=False)


def pack_linear(linear: nn.Linear) -> None:
    """Keep a linear layer's weight packed only; its state dict goes on holding the plain weight."""
    linear.weight = pack(linear.weight)
    linear.register_state_dict_post_hook(_unpack_entry)


def _unpack_entry(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state.get(f"{prefix}weight")
    if isinstance(weight, PackedWeight):
        state[f"{prefix}weight"] = weight.unpack()
