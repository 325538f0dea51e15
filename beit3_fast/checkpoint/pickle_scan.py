"""What a pickle would build, found out without building it.

PyTorch's restricted unpickler runs nothing foreign. This pass runs before it, over the same bytes, for what that reader
does not promise: every refused name is reported in words, the work is bounded (tuples nested so that hashing one of
them takes years, storages larger than the file, expanded tensors, millions of instructions), and a key that comes
twice is an error instead of a silent choice. Only the values below exist here; nothing is imported, nothing is called.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import torch

from beit3_fast.errors import CheckpointError

MAX_TENSORS = 50_000
MAX_INSTRUCTIONS = 2_000_000

NAMESPACE = "argparse.Namespace"
STORAGE_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
# read from the table of attributes: asking the module for one by name could import a part of torch
_DTYPES = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_ALLOWED = {
    NAMESPACE,
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    *STORAGE_DTYPES,
    *_DTYPES,
}
_REFUSED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (meta device)",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
    "torch.ComplexFloatStorage": "a complex tensor",
    "torch.ComplexDoubleStorage": "a complex tensor",
    **{
        f"torch.{name}Storage": "a quantised tensor"
        for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")
    },
}


class Global(NamedTuple):
    """A name that the pickle mentions."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A block of tensor data that lies outside the pickle."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Built(NamedTuple):
    """An object that a name of the table would make."""

    kind: str


@dataclass
class Scan:
    """``value`` is the outermost value, with stand-ins for all that is not plain data."""

    value: Any = None
    globals: set[str] = field(default_factory=set)
    storages: dict[str, Storage] = field(default_factory=dict)
    tensors: int = 0
    instructions: int = 0


def scan_pickle(stream: BinaryIO) -> Scan:
    """Follow one pickle from the stream's position to its end. Raises CheckpointError."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
            if opcode.name == "STOP":
                break
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"its pickle is damaged or cut off ({type(error).__name__}: {error}); copy or download it again"
        ) from error
    return machine.result


class _Machine:
    def __init__(self) -> None:
        self.result = Scan()
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        self.result.instructions += 1
        if self.result.instructions > MAX_INSTRUCTIONS:
            raise CheckpointError(
                f"its pickle has more than {MAX_INSTRUCTIONS} instructions; "
                "no BEiT-3 checkpoint needs a fraction of that"
            )
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        else:
            handler = _HANDLERS.get(name)
            if handler is None:
                raise CheckpointError(
                    f"its pickle uses the instruction {name}, which PyTorch's safe reader does not know; "
                    "write the file again with torch.save and its default protocol"
                )
            handler(self, argument)

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def empty_list(self, _: Any) -> None:
        self.stack.append([])

    def empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        _expect(self.stack[-1], list).append(item)

    def appends(self, _: Any) -> None:
        items = self.pop_mark()
        _expect(self.stack[-1], list).extend(items)

    def set_item(self, _: Any) -> None:
        value = self.stack.pop()
        self.insert([self.stack.pop(), value])

    def set_items(self, _: Any) -> None:
        self.insert(self.pop_mark())

    def insert(self, items: list[Any]) -> None:
        target = _expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bytes, type(None))):
                raise CheckpointError(
                    "a dictionary in it has a key that is neither text nor number"
                )
            if key in target:
                raise CheckpointError(f"the key {key!r} comes twice in one dictionary")
            target[key] = value

    def tuple_of_marked(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise IndexError("stack is too short for a tuple")
        self.stack[-count:] = [items]

    def mention(self, argument: Any) -> None:
        name = str(argument).replace(" ", ".", 1)
        self.result.globals.add(name)
        if name not in _ALLOWED:
            raise CheckpointError(_refusal(name))
        self.stack.append(Global(name))

    def persistent(self, _: Any) -> None:
        pid = self.stack.pop()
        if isinstance(pid, tuple) and len(pid) == 6 and pid[5] is None:
            pid = pid[:5]
        if not (isinstance(pid, tuple) and len(pid) == 5 and _text(pid[0]) == "storage"):
            raise CheckpointError("its pickle refers to outside data that is no tensor storage")
        _, kind, key, _, numel = pid
        if not (isinstance(kind, Global) and kind.name in STORAGE_DTYPES and _is_count(numel)):
            raise CheckpointError("its pickle describes a tensor storage that makes no sense")
        storage = Storage(str(_text(key)), STORAGE_DTYPES[kind.name], numel)
        if self.result.storages.setdefault(storage.key, storage) != storage:
            raise CheckpointError(f"its tensor storage {storage.key} is described in two ways")
        self.stack.append(storage)

    def reduce(self, _: Any) -> None:
        arguments = _expect(self.stack.pop(), tuple)
        function = self.stack.pop()
        if not isinstance(function, Global):
            raise CheckpointError("its pickle calls something that is no known function")
        name = function.name
        if name.startswith("torch._utils._rebuild_tensor"):
            self.result.tensors += 1
            if self.result.tensors > MAX_TENSORS:
                raise CheckpointError(f"it holds more than {MAX_TENSORS} tensors")
            _check_tensor(name, arguments)
            self.stack.append(Built("tensor"))
        elif name == "torch._utils._rebuild_parameter" and arguments[0] == Built("tensor"):
            self.stack.append(Built("tensor"))
        elif name == "collections.OrderedDict" and arguments == ():
            self.stack.append({})
        elif name in ("torch.Size", "torch.device"):
            self.stack.append(Built(name))
        else:
            raise CheckpointError(f"its pickle calls {name} in a way that no weights need")

    def new_object(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind != Global(NAMESPACE) or arguments != ():
            raise CheckpointError("its pickle makes an object that no weights need")
        self.stack.append(Built(NAMESPACE))

    def build(self, _: Any) -> None:
        self.stack.pop()
        if not (isinstance(self.stack[-1], dict) or self.stack[-1] == Built(NAMESPACE)):
            raise CheckpointError("its pickle sets the inner state of an object that has none")

    def stop(self, _: Any) -> None:
        self.result.value = self.stack.pop()

    def ignore(self, _: Any) -> None:
        pass


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.ignore,
    "MARK": _Machine.mark,
    "EMPTY_LIST": _Machine.empty_list,
    "EMPTY_DICT": _Machine.empty_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "TUPLE": _Machine.tuple_of_marked,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "GLOBAL": _Machine.mention,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "STOP": _Machine.stop,
}


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__}, found {type(value).__name__}")
    return value


def _text(value: Any) -> Any:
    return value.decode("ascii") if isinstance(value, bytes) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refusal(name: str) -> str:
    if name in _REFUSED:
        return f"it holds {_REFUSED[name]}; only dense, plain tensors can be weights: convert it and save it again"
    return (
        f"its pickle asks for {name}, which weights never need and which could run code, so nothing was loaded; "
        "if you trust its origin, load it with torch.load in a sandbox and save the weights alone"
    )


def _check_tensor(function: str, arguments: tuple[Any, ...]) -> None:
    storage, offset, size, stride = arguments[:4]
    limit = {"torch._utils._rebuild_tensor": 4, "torch._utils._rebuild_tensor_v3": 7}.get(
        function, 6
    )
    counts = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if (
        not isinstance(storage, Storage)
        or len(arguments) > limit
        or not counts
        or not all(_is_count(n) for n in (offset, *size, *stride))
    ):
        raise CheckpointError("its pickle describes a tensor that makes no sense")
    width, available = 1, storage.numel
    if function.endswith("_v3"):
        width = _DTYPES[arguments[6].name].itemsize // storage.dtype.itemsize or 1
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if numel and (numel * width > available or (last + 1) * width > available):
        raise CheckpointError(
            f"a tensor of shape {list(size)} reaches beyond its storage of {storage.nbytes} bytes"
        )
