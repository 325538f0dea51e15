"""What a pickle of weights may mention, and what the rest would be."""

from __future__ import annotations

import torch
from torch._weights_only_unpickler import _get_allowed_globals

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
DTYPES = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_REFUSED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (meta device)",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils._rebuild_parameter_with_state": "a parameter with attributes",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a special device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a special device",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
    "torch.ComplexFloatStorage": "a complex tensor",
    "torch.ComplexDoubleStorage": "a complex tensor",
    **{
        f"torch.{name}Storage": "a quantised tensor"
        for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")
    },
}
# PyTorch's own list is private, and the only one; each name is a constant, a type or a function that PyTorch holds harmless
ALLOWED = {NAMESPACE, *_get_allowed_globals()} - _REFUSED.keys()
LAZY_VIEW = "a lazy view; save it again after resolve_conj() or resolve_neg()"


def full_name(mention: str) -> str:
    """The name that "module name" in a pickle stands for; protocol 2, which torch.save writes, has Python 2's module."""
    module, _, name = mention.partition(" ")
    return f"{'builtins' if module == '__builtin__' else module}.{name}"


def refusal(name: str) -> str:
    """Why a name is not on the list."""
    if name in _REFUSED:
        return f"it holds {_REFUSED[name]}; only dense, plain tensors can be weights: convert it and save it again"
    return (
        f"its pickle asks for {name}, which is not among the names that torch.load(weights_only=True) takes; other names "
        "could run code, so nothing was loaded: if you trust its origin, load it with torch.load in a sandbox and save "
        "the weights alone"
    )
