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

from beit3_fast.checkpoint.pickle_names import (
    ALLOWED,
    DTYPES,
    LAZY_VIEW,
    NAMESPACE,
    STORAGE_DTYPES,
    full_name,
    refusal,
)
from beit3_fast.errors import CheckpointError

MAX_TENSORS = 50_000
MAX_INSTRUCTIONS = 2_000_000
MAX_COPIED = 256 << 20
# what an item of a tuple, list or dictionary takes in memory, about
_ITEM = 100


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
    copied: int = 0
    instructions: int = 0


def scan_pickle(stream: BinaryIO) -> Scan:
    """Follow one pickle from the stream's position to its end. Raises CheckpointError."""
    machine = _Machine()
    try:
        while machine.running:
            code = stream.read(1)
            if not code:
                raise EOFError("it ends before its end mark")
            opcode = _OPCODES[code.decode("latin-1")]
            # asked before the argument is read: not all forms of arguments are safe to decode
            if opcode.name not in _KNOWN:
                raise CheckpointError(
                    f"its pickle uses the instruction {opcode.name}, which PyTorch's safe reader does not know; "
                    "write the file again with torch.save and its default protocol"
                )
            machine.step(opcode.name, opcode.arg.reader(stream) if opcode.arg else None)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"its pickle is damaged or cut off ({type(error).__name__}: {error}); copy or download it again"
        ) from error
    return machine.result


class _Machine:
    def __init__(self) -> None:
        self.running = True
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
        elif name in _PUTS:
            self.memo[argument] = self.stack[-1]
        elif name in _GETS:
            self.stack.append(self.memo[argument])
        else:
            _HANDLERS[name](self, argument)

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
            _check_hashable(key)
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
        name = full_name(argument)
        self.result.globals.add(name)
        if name not in ALLOWED:
            raise CheckpointError(refusal(name))
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
        else:
            self.stack.append(self.plain_value(name, arguments))

    def plain_value(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What may lie beside weights: a call in the form that torch.save writes, and in no other."""
        if tuple(map(type, arguments)) not in _PLAIN.get(name, ()):
            raise CheckpointError(f"its pickle calls {name} in a way that no weights need")
        first = arguments[0] if arguments else None
        if isinstance(first, (str, bytes, tuple, list, dict)):
            self.result.copied += len(first) * (1 if isinstance(first, (str, bytes)) else _ITEM)
            if self.result.copied > MAX_COPIED:
                raise CheckpointError(
                    f"its pickle makes more than {MAX_COPIED} bytes of plain values; no weights need a fraction of that"
                )
        if name == "collections.Counter":
            return dict(*arguments)
        if name == "_codecs.encode":
            if arguments[1] != "latin1":
                raise CheckpointError(f"its pickle has bytes in the codec {arguments[1]!r}")
            return arguments[0].encode("latin1")
        for item in arguments[0] if name == "builtins.set" else ():
            _check_hashable(item)
        return Built(name)

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
        self.running = False

    def ignore(self, _: Any) -> None:
        pass


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
_PUTS = {"BINPUT", "LONG_BINPUT"}
_GETS = {"BINGET", "LONG_BINGET"}
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
# names that make plain values, and the types of arguments that torch.save gives them
_PLAIN: dict[str, tuple[tuple[type, ...], ...]] = {
    "torch.Size": ((tuple,),),
    "torch.device": ((str,), (str, int)),
    "torch.serialization._get_layout": ((str,),),
    "_codecs.encode": ((str, str),),
    "builtins.bytearray": ((), (bytes,)),
    "builtins.complex": ((float, float),),
    "builtins.set": ((list,),),
    "collections.Counter": ((), (dict,)),
}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_KNOWN = {*_CONSTANTS, *_LITERALS, *_PUTS, *_GETS, *_HANDLERS}


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__}, found {type(value).__name__}")
    return value


def _text(value: Any) -> Any:
    return value.decode("ascii") if isinstance(value, bytes) else value


def _check_hashable(key: Any) -> None:
    """Raises CheckpointError for what can make a dictionary or set slow: tuples nested, numbers made to collide."""
    number = isinstance(key, float) or (isinstance(key, int) and abs(key) < 2**64)
    if not number and not isinstance(key, (str, bytes, type(None))):
        raise CheckpointError(
            "a dictionary or set in it has a key that is neither text nor number (of up to 64 bits)"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tensor(function: str, arguments: tuple[Any, ...]) -> None:
    storage, offset, size, stride = arguments[:4]
    metadata = arguments[6] if function.endswith("_v2") and len(arguments) == 7 else None
    if isinstance(metadata, dict) and {"conj", "neg"} & metadata.keys():
        raise CheckpointError(f"a tensor in it is {LAZY_VIEW}")
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
        width = DTYPES[arguments[6].name].itemsize // storage.dtype.itemsize or 1
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if numel and (numel * width > available or (last + 1) * width > available):
        raise CheckpointError(
            f"a tensor of shape {list(size)} reaches beyond its storage of {storage.nbytes} bytes"
        )
