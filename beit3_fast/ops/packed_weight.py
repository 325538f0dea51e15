"""A weight kept only in the layout that the kernels read: one copy of it, for inference.

``PackedWeight`` is a tensor [O, I], or [O, ...] with I numbers behind O, whose memory is the packed form, exact,
rounded to int8 (CPU) or to float8 (CPU and CUDA; scales, then rows of numbers). ``expert_linear`` reads that form; to
everything else it behaves as the plain weight, which is unpacked for the call. It has no gradient and cannot be changed in place, nor through a view (an
``UnpackedView``), except as a whole by ``copy_`` (which ``load_state_dict`` uses); moved to another dtype or device, it
becomes a plain parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_leaves, tree_map

from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.float8 import E4M3, Quantized
from beit3_fast.float8 import dequantize as dequantize_float8
from beit3_fast.float8 import quantize as round_to_float8
from beit3_fast.ops import library
from beit3_fast.ops.dispatch import rows_in_memory

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_PACKED = (
    "it is packed for inference; create the model without inference_only=True, dtype='int8' or "
    "dtype='float8'"
)
_SCALE_BYTES = 4
# Columns of a panel of packed weights (csrc/cpu/kernels.h): equal parts of whole panels can lie apart.
PANEL = 32


class PackedWeight(Tensor):
    """[O, I], fp32 or bf16; ``packed`` is the only memory. Made by ``pack``, ``quantize`` and ``quantize_float8``."""

    packed: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        weight: PackedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device, requires_grad=False
        )
        weight.packed = packed
        return weight

    @property
    def is_int8(self) -> bool:
        """Whether the packed form is rounded to int8."""
        return self.packed.dtype is torch.int8

    @property
    def is_float8(self) -> bool:
        """Whether the packed form is rounded to float8."""
        return self.packed.dtype is torch.uint8

    @property
    def is_rounded(self) -> bool:
        """Whether the packed form is rounded to 8 bits."""
        return self.is_int8 or self.is_float8

    def float8(self) -> Quantized:
        """Numbers [O, I] and scales [O, 1] of a weight rounded to float8, in the memory of the packed form."""
        rows, columns = self.shape
        behind = rows * _SCALE_BYTES
        scales = self.packed[:behind].view(torch.float32).view(rows, 1)
        return Quantized(self.packed[behind:].view(E4M3).view(rows, columns), scales)

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight [O, I]: bit for bit what was packed, or what rounding to 8 bits left of it."""
        if self.is_float8:
            return dequantize_float8(self.float8(), self.shape[1]).to(dtype or self.dtype)
        library.load()
        columns = math.prod(self.shape[1:])
        plain: Tensor = torch.ops.beit3_fast.unpack_weight(self.packed, self.shape[0], columns)
        return plain.view(self.shape).to(dtype or self.dtype)

    def _packed_like(self, plain: Tensor) -> Tensor:
        if self.is_float8:
            return _pack_float8(plain.detach().to(self.device))
        packed: Tensor = (quantize(plain) if self.is_int8 else pack(plain.to(self.dtype))).packed
        return packed

    @property
    def data(self) -> Tensor:
        """The same packed memory; setting another dtype or device makes this a plain parameter."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        # torch.nn.Module.to() ends here, with its own tensor where nothing has to change.
        if value.shape != self.shape:
            raise ShapeError(
                f"data of a packed weight must have its shape {list(self.shape)}, got {list(value.shape)}"
            )
        if isinstance(value, PackedWeight) and value.dtype == self.dtype:
            self.packed = value.packed
        elif value.dtype == self.dtype and value.device == self.device:
            self.packed = self._packed_like(value)
        else:
            torch.utils.swap_tensors(self, nn.Parameter(value.detach(), requires_grad=False))

    @property
    def requires_grad(self) -> bool:
        """False; setting True raises ConfigError."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        """Raises ConfigError for True."""
        if requires_grad:
            raise ConfigError(f"this weight has no gradient: {_PACKED}, to train it")
        return self

    def share_memory_(self) -> PackedWeight:
        """Moves the packed form to memory that processes share."""
        self.packed.share_memory_()
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, {self.dtype}{self._kind()})"

    def _kind(self) -> str:
        return ", int8" if self.is_int8 else ", float8" if self.is_float8 else ""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if self.is_rounded:
            return _parameter, (self.packed, tuple(self.shape), self.dtype)
        return pack, (self.unpack(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        copied = _parameter(self.packed.clone(), tuple(self.shape), self.dtype)
        memo[id(self)] = copied
        return copied

    def __tensor_flatten__(self) -> tuple[list[str], tuple[tuple[int, ...], torch.dtype]]:
        """For torch.compile and torch.export, which see the packed form and nothing else."""
        return ["packed"], (tuple(self.shape), self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: tuple[tuple[int, ...], torch.dtype], *_: Any
    ) -> PackedWeight:
        return PackedWeight(inner["packed"], *meta)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            with torch.inference_mode(False):  # a parameter made there would have no version
                return PackedWeight(first.packed, tuple(first.shape), first.dtype)
        if func is torch.ops.aten.copy_.default and isinstance(first, PackedWeight):
            source = args[1]
            if isinstance(source, PackedWeight):
                source = source.unpack(torch.float32 if source.is_rounded else None)
            first.packed.copy_(first._packed_like(source.expand(first.shape)))
            increment_version(first.packed)  # PyTorch does not count changes made within a dispatch
            return first
        if func is torch.ops.aten._to_copy.default and _changes_nothing(first, kwargs or {}):
            return PackedWeight(first.packed.clone(), tuple(first.shape), first.dtype)
        if func is torch.ops.aten.view.default and tuple(args[1]) == (
            first.shape[0],
            math.prod(first.shape[1:]),
        ):
            return PackedWeight(first.packed, tuple(args[1]), first.dtype)
        return _on_copies(func, args, kwargs or {})


class UnpackedView(Tensor):
    """A view of a packed weight, for reading: a write would be lost with ``plain``, the copy behind it, and raises."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> UnpackedView:
        view: UnpackedView = Tensor._make_wrapper_subclass(
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=plain.device,
        )
        view.plain = plain
        return view

    def unpack(self) -> Tensor:
        """The numbers as a plain tensor."""
        return self.plain

    # PyTorch refuses the following to a tensor without memory of its own, or reads it all the same.

    def tolist(self) -> Any:
        """The numbers in lists."""
        return self.plain.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The numbers in an array, for reading."""
        array = self.plain.numpy(force=force)
        array.flags.writeable = False
        return array

    def share_memory_(self) -> UnpackedView:
        """Moves the copy to memory that processes share."""
        self.plain.share_memory_()
        return self

    def __dlpack__(self, **options: Any) -> Any:
        return self.plain.clone().__dlpack__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.clone().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"UnpackedView({self.plain!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["plain"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> UnpackedView:
        return UnpackedView(inner["plain"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _on_copies(func, args, kwargs or {})


def _on_copies(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls an op with the plain numbers. Raises ConfigError where it would write to them."""
    # Within inference_mode, calls that are made of others come here whole: .to() of what needs no change, too.
    made_of_others = func.decompose(*args, **kwargs)
    if made_of_others is not NotImplemented:
        return made_of_others
    schema = func._schema
    if schema.is_mutable:
        _check_written(schema, args, kwargs)

    def plainly(value: Any) -> Any:
        return value.unpack() if isinstance(value, (PackedWeight, UnpackedView)) else value

    result = func(*tree_map(plainly, args), **tree_map(plainly, kwargs))
    if schema.is_mutable or not any(returned.alias_info for returned in schema.returns):
        return result
    # As for detach: a view has the version of what it is a view of.
    with torch.inference_mode(False):
        return tree_map(lambda t: UnpackedView(t) if isinstance(t, Tensor) else t, result)


def _changes_nothing(weight: PackedWeight, wanted: dict[str, Any]) -> bool:
    """Whether .to() leaves dtype and device as they are; "cpu" and "cpu:0" are one device."""
    dtype, device = wanted.get("dtype"), wanted.get("device")
    if device is not None and device.type == "cpu":
        device = torch.device("cpu")
    return dtype in (None, weight.dtype) and device in (None, weight.device)


def _check_written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ConfigError where an op would write to the copy that a packed weight is unpacked to."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    for argument in schema.arguments:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = tree_leaves(given.get(argument.name))
        if any(isinstance(tensor, (PackedWeight, UnpackedView)) for tensor in written):
            name = schema.name.removeprefix("aten::")
            raise ConfigError(f"{name} cannot change this weight: {_PACKED}")


def packed_size(shape: Sequence[int], bytes_each: int) -> int:
    """How many numbers of ``bytes_each`` a weight [O, I] is when packed: a header and panels (csrc/cpu/packed_weight.h), with the
    scales and sums of int8 columns."""
    rows, depth = shape
    words = -(-depth * bytes_each // 64) * 16 + (2 if bytes_each == 1 else 0)
    return (64 + -(-rows // PANEL) * PANEL * words * 4) // bytes_each


def pack(weight: Tensor) -> Any:
    """A weight [O, I] or [O, ...], fp32 or bf16, as the parameter of an inference model. Raises ShapeError for another."""
    _check_weight(weight, most_dimensions=8, dtypes=(torch.float32, torch.bfloat16))
    library.load()
    packed = torch.ops.beit3_fast.pack_weight(rows_in_memory(weight.detach().flatten(1)))
    return _parameter(packed, tuple(weight.shape), weight.dtype)


def quantize(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A weight [O, I] rounded to int8, each output channel by its own scale, for activations of ``dtype``.

    The scale is the channel's largest magnitude / 127; a channel with a number that is not finite gives NaN. Raises
    ShapeError for a tensor of another kind.
    """
    _check_weight(weight, most_dimensions=2, dtypes=_FLOATING)
    library.load()
    plain = weight.detach()
    plain = plain if plain.dtype in (torch.float32, torch.bfloat16) else plain.float()
    packed = torch.ops.beit3_fast.quantize_weight(rows_in_memory(plain))
    return _parameter(packed, tuple(weight.shape), dtype)


def quantize_float8(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A weight [O, I] rounded to e4m3, each output channel by its own scale (``beit3_fast.float8``), for activations of
    ``dtype``. A channel with a number that is not finite gives NaN."""
    return _parameter(_pack_float8(weight.detach()), tuple(weight.shape), dtype)


def _check_weight(weight: object, most_dimensions: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(weight, Tensor):
        raise ShapeError(f"a weight must be a tensor, got {type(weight).__name__}")
    if not (2 <= weight.dim() <= most_dimensions and weight.numel()) or weight.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ShapeError(
            f"a weight must be {'[O, I]' if most_dimensions == 2 else '[O, I] or [O, ...]'} with at least one number, "
            f"{names}, got {list(weight.shape)}, {weight.dtype}"
        )


def _pack_float8(plain: Tensor) -> Tensor:
    numbers, scales = round_to_float8(plain, max(plain.shape[1], 1))
    packed = (scales.contiguous().view(torch.uint8), numbers.view(torch.uint8))
    return torch.cat([part.flatten() for part in packed])


def _parameter(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    return nn.Parameter(PackedWeight(packed, shape, dtype), requires_grad=False)


def keep_packed(linear: nn.Linear | nn.Conv2d, weight: Any) -> None:
    """Give a linear layer, or a convolution of patches, a weight made here; its state dict goes on holding plain weights."""
    linear.weight = weight
    linear.register_state_dict_post_hook(_unpack_entry)
    linear.register_load_state_dict_pre_hook(_pack_assigned)


def _unpack_entry(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state.get(f"{prefix}weight")
    if isinstance(weight, PackedWeight):
        # In fp32 a rounded weight comes back as the same numbers when it is rounded again.
        state[f"{prefix}weight"] = weight.unpack(torch.float32 if weight.is_rounded else None)


def _pack_assigned(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """load_state_dict(assign=True) puts the given tensor in the place of the weight: in the form that this one has."""
    weight, given = module.weight, state.get(f"{prefix}weight")
    if (
        metadata.get("assign_to_params_buffers")
        and isinstance(weight, PackedWeight)
        and isinstance(given, Tensor)
        and given.shape == weight.shape
    ):
        if weight.is_rounded:
            packed = weight._packed_like(given.detach())
            state[f"{prefix}weight"] = _parameter(packed, tuple(weight.shape), weight.dtype)
        elif given.dtype in (torch.float32, torch.bfloat16):
            state[f"{prefix}weight"] = pack(given)
