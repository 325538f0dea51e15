"""The operands of expert_linear, and what is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from beit3_fast.derived import derived
from beit3_fast.errors import ShapeError
from beit3_fast.float8 import Quantized
from beit3_fast.ops import dispatch
from beit3_fast.ops.packed_weight import PackedWeight

Weight = Tensor | tuple[Tensor, ...]


class Norm(NamedTuple):
    """LayerNorm in front of the product: one weight and bias [I] per expert, and epsilon."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    eps: float = 1e-5


Leaves = Literal["all", "scales", "nothing"]


class Measured(NamedTuple):
    """Rows [M, C] and, where the op that wrote them left them, their statistics: a LayerNorm need not read them first.

    ``parts`` fp32 [M, T, 2]: mean and sum of squared deviations of each ``width`` columns of a row, the last part
    having what is left. They are those of the rows as stored and are trusted: rows that change must lose them.
    ``rounded``: the rows in 8 bits, for a product with weights in 8 bits. Where ``stored`` is False, ``rows`` has their
    shape alone. ``scales``: those that the rows would have in 8 bits, for attention, whose result goes by the values'.
    """

    rows: Tensor
    parts: Tensor | None = None
    width: int = 0
    rounded: Quantized | None = None
    stored: bool = True
    scales: Tensor | None = None

    @classmethod
    def in_8_bits(cls, like: Tensor, parts: Tensor, width: int, rounded: Quantized) -> Measured:
        """Rows of the dtype of ``like`` that are stored in 8 bits alone."""
        count, columns = rounded.numbers.shape
        return cls(
            like.new_empty(1, columns).expand(count, -1), parts, width, rounded, stored=False
        )

    def select(self, rows: Tensor) -> Measured:
        """The rows that ``rows`` int64 [R] names."""
        parts = None if self.parts is None else self.parts[rows]
        rounded = None if self.rounded is None else self.rounded.select(rows)
        if rounded is not None and parts is not None and not self.stored:
            return Measured.in_8_bits(self.rows, parts, self.width, rounded)
        return Measured(self.rows[rows], parts, self.width, rounded)


def measured(x: Tensor | Measured) -> Measured:
    """The rows with their statistics, or without if they come bare."""
    return x if isinstance(x, Measured) else Measured(x)


def flat(weights: Sequence[Weight]) -> list[Tensor]:
    """All tensors of a list of weights."""
    return [part for w in weights for part in (w if isinstance(w, tuple) else (w,))]


def rounding(weight: Tensor) -> str:
    """To what a weight is rounded: "int8", "float8" or nothing, ""."""
    if not isinstance(weight, PackedWeight):
        return ""
    return "int8" if weight.is_int8 else "float8" if weight.is_float8 else ""


def shape(weight: Weight) -> tuple[int, ...]:
    """The shape of the stacked weight."""
    if isinstance(weight, Tensor):
        return tuple(weight.shape)
    return (sum(part.shape[0] for part in weight), *weight[0].shape[1:])


def check(
    x: Tensor,
    parts: Tensor | None,
    width: int,
    weights: Sequence[Weight],
    biases: Sequence[Weight] | None,
    bounds: Sequence[int],
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    rows: Tensor | None,
) -> None:
    """Raises ShapeError for arguments of ``expert_linear`` that do not fit together."""
    for name, tensor in (("x", x), ("residual", residual), ("rows", rows)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "x"):
            raise ShapeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise ShapeError(
            f"x must be a floating-point tensor [M, I], got {x.dtype} of shape {tuple(x.shape)}"
        )
    if not x.shape[1]:
        raise ShapeError(f"x must have at least one feature, got shape {list(x.shape)}")
    if parts is not None:
        _check_parts(parts, width, x)
    shapes = _shapes("weights", weights)
    bias_shapes = [] if biases is None else _shapes("biases", biases)
    own, own_biases = flat(weights), flat(biases or ())
    _check_devices("weights", own, x)
    _check_devices("biases", own_biases, x)
    if residual is not None:
        _check_devices("residual", (residual,), x)
    if rows is not None:
        _check_devices("rows", (rows,), x)
    if parts is not None:
        _check_devices("statistics", (parts,), x)
    others = () if residual is None else (residual,)
    dtype = x.dtype
    for tensor in (*own, *own_biases, *others):
        if tensor.dtype is not dtype and not dispatch.multiplies_with(x, tensor):
            raise ShapeError(
                f"weights, biases and residual must have x's dtype {x.dtype}, got {tensor.dtype}; "
                "convert them or run under torch.autocast, which leaves float64 alone"
            )
    rounded = {rounding(part) for part in own}
    if len(rounded) > 1:
        names = " and ".join(sorted(name or "not" for name in rounded))
        raise ShapeError(
            f"weights must be rounded to int8 or float8 all together or not at all, got {names}"
        )
    features = x.shape[1]
    out, inner = (*shapes[0], 0)[:2]
    if not out:
        raise ShapeError(f"weights must have at least one out-feature, got shape {list(shapes[0])}")
    for expert, found in enumerate(shapes):
        if found != (out, inner) or inner != features:
            raise ShapeError(
                f"weights[{expert}] must have shape [O, I] = [{out}, {features}] like x and the other "
                f"experts, got {list(found)}"
            )
    if biases is not None:
        _check_vectors("biases", bias_shapes, len(weights), out)
    if norm is not None:
        if not isinstance(norm, Norm):
            raise ShapeError(f"norm must be a Norm of beit3_fast.ops, got {type(norm).__name__}")
        for name, group in (("norm.weights", norm.weights), ("norm.biases", norm.biases)):
            found_shapes = _shapes(name, group)
            _check_devices(name, group, x)
            _check_vectors(name, found_shapes, len(weights), features)
        if not isinstance(norm.eps, (float, int)) or not 0 <= norm.eps < float("inf"):
            raise ShapeError(
                f"norm.eps must be a number, finite and not negative, got {norm.eps!r}"
            )
    if activation not in (None, "gelu"):
        raise ShapeError(f"activation must be None or 'gelu', got {activation!r}")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ShapeError(f"rows must be int64 [R], got {rows.dtype} of shape {tuple(rows.shape)}")
    count = x.shape[0] if rows is None else rows.shape[0]
    if (
        not isinstance(bounds, (list, tuple))
        or len(bounds) != len(weights) + 1
        or not all(isinstance(bound, (int, torch.SymInt)) for bound in bounds)
        or bounds[0] != 0
        or bounds[-1] != count
        or any(bounds[e] > bounds[e + 1] for e in range(len(weights)))
    ):
        raise ShapeError(
            f"bounds must be a list of {len(weights) + 1} ascending row numbers from 0 to {count}, "
            f"got {bounds!r}"
        )
    if rows is not None and rows.device.type == "cpu" and not torch.compiler.is_compiling():
        derived(f"distinct rows of {x.shape[0]}", (rows,), lambda: _check_rows(rows, x.shape[0]))
    if residual is not None and tuple(residual.shape) != (x.shape[0], out):
        raise ShapeError(
            f"residual must have shape [M, O] = [{x.shape[0]}, {out}], got {list(residual.shape)}"
        )


def _check_devices(name: str, tensors: Sequence[Tensor], x: Tensor) -> None:
    device = x.device
    for tensor in tensors:
        if tensor.device != device:
            raise ShapeError(
                f"{name} must be on x's device {device}, got {tensor.device}; "
                "move all operands of a call to one device"
            )


def _check_parts(parts: Tensor, width: int, x: Tensor) -> None:
    count, features = x.shape
    expected = (count, -(-features // max(width, 1)), 2)
    if width < 1 or parts.dtype != torch.float32 or tuple(parts.shape) != expected:
        raise ShapeError(
            f"the statistics of x {[count, features]} in parts of {width} columns must be float32 "
            f"{list(expected)}, got {parts.dtype} of shape {list(parts.shape)}"
        )


def _check_rows(rows: Tensor, count: int) -> bool:
    named = rows.unique()
    if named.numel() and not 0 <= int(named[0]) <= int(named[-1]) < count:
        raise ShapeError(
            f"rows must name rows of x, 0 to {count - 1}, got {int(named[0])} to {int(named[-1])}"
        )
    if named.numel() != rows.numel():
        raise ShapeError("rows must not name a row twice")
    return True


def _shapes(name: str, tensors: Any) -> list[tuple[int, ...]]:
    """The shape of one tensor, or of one tuple of tensors stacked, for each expert."""
    if tensors is None or isinstance(tensors, (str, Tensor)) or not hasattr(tensors, "__len__"):
        raise ShapeError(
            f"{name} must be a list, one entry per expert, got {type(tensors).__name__}"
        )
    if name == "weights" and not len(tensors):
        raise ShapeError("weights must hold at least one expert, got none")
    for expert, entry in enumerate(tensors):
        for part in (entry or (None,)) if isinstance(entry, tuple) else (entry,):
            if not isinstance(part, Tensor) or not part.dim():
                raise ShapeError(
                    f"{name}[{expert}] must be a tensor or a tuple of tensors, got {type(entry).__name__}"
                )
    return [shape(entry) for entry in tensors]


def _check_vectors(name: str, shapes: Sequence[Sequence[int]], experts: int, size: int) -> None:
    if [tuple(shape) for shape in shapes] != [(size,)] * experts:
        raise ShapeError(
            f"{name} must hold {experts} tensors of shape [{size}], "
            f"got {[list(shape) for shape in shapes]}"
        )
