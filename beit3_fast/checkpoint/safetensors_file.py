"""Reading and writing the safetensors format, with digests.

A file is eight bytes of header length, a JSON header and the tensors' bytes. The format has no checksum and readers in
use accept a key that comes twice; files written here carry two digests in the metadata, ``sha256`` of all bytes after
the header and ``header_sha256`` of the header without the two, and both are verified on reading. Tensors are streamed
one at a time in both directions, so that neither needs a second copy of the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from io import BufferedReader
from typing import Any, BinaryIO

import torch
from torch import Tensor

from beit3_fast.checkpoint.pickle_scan import MAX_TENSORS
from beit3_fast.errors import CheckpointError

DIGESTS = ("sha256", "header_sha256")
_MAX_HEADER = 32 << 20
_MAX_DIMENSIONS = 16
_CHUNK = 16 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write(file: BinaryIO, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write dense tensors and text metadata at the position of ``file``, which must be able to seek.

    Raises CheckpointError for a dtype that the format does not know, OSError when writing fails.
    """
    _check_byte_order()
    header: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    # wider types first, so that every tensor lies aligned whatever comes before it
    order = sorted(state, key=lambda name: -state[name].dtype.itemsize)
    end = 0
    for name in order:
        tensor = state[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"safetensors has no name for {tensor.dtype}, the dtype of {name}"
            )
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header["__metadata__"] = {**metadata, "sha256": "0" * 64}
    header.update({name: entries[name] for name in state})
    header["__metadata__"]["header_sha256"] = _header_digest(header)
    start = file.tell()
    file.write(_encode(header))
    digest = hashlib.sha256()
    for name in order:
        data = _bytes_of(state[name])
        digest.update(data)
        file.write(data)
    header["__metadata__"]["sha256"] = digest.hexdigest()
    finish = file.tell()
    file.seek(start)
    file.write(_encode(header))
    file.seek(finish)


def read(file: BufferedReader, size: int, verify: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU with storage of their own, and metadata. Raises CheckpointError."""
    _check_byte_order()
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"its header claims {length} bytes of a file of {size}; it is cut off or damaged: "
            "copy or download it again"
        )
    header = _decode(file.read(length))
    metadata = _check_metadata(header.pop("__metadata__", {}))
    spans = _check_entries(header, size - 8 - length)
    claimed = {name: metadata[name] for name in DIGESTS if name in metadata}
    if verify and claimed:
        if len(claimed) != len(DIGESTS):
            raise CheckpointError("one of its two digests is missing: it is damaged")
        if _header_digest({"__metadata__": metadata, **header}) != claimed["header_sha256"]:
            raise CheckpointError("its header does not fit its digest: it is damaged")
    state: dict[str, Tensor] = dict.fromkeys(header, torch.empty(0, device="cpu"))
    digest = hashlib.sha256()
    for name, dtype, shape in spans:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        view = memoryview(_bytes_of(tensor))
        for begin in range(0, len(view), _CHUNK):
            block = view[begin : begin + _CHUNK]
            if file.readinto(block) != len(block):
                raise CheckpointError(f"the data of {name} is cut off")
            if verify and claimed:
                digest.update(block)
        state[name] = tensor
    if verify and claimed and digest.hexdigest() != claimed["sha256"]:
        raise CheckpointError(
            "its tensors do not fit its sha256: the file is damaged; copy or download it again"
        )
    return state, metadata


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise CheckpointError(
            "safetensors files are read and written on little-endian machines only"
        )


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a dense CPU tensor as bytes; a copy where the tensor lies elsewhere or not in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _encode(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_digest(header: Mapping[str, Any]) -> str:
    metadata = {k: v for k, v in header["__metadata__"].items() if k not in DIGESTS}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _decode(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise CheckpointError(f"the key {name!r} comes twice in its header")
            table[name] = value
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"its header is no valid JSON ({error}): it is damaged or no safetensors file"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError("its header is no JSON object: it is damaged or no safetensors file")
    return header


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("the metadata in its header is not a table of texts")
    return metadata


def _check_entries(
    header: Mapping[str, Any], available: int
) -> list[tuple[str, torch.dtype, list[int]]]:
    """Name, dtype and shape of all tensors in the order of their bytes, which must follow each other without gaps."""
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"it holds more than {MAX_TENSORS} tensors")
    spans: list[tuple[int, int, str, torch.dtype, list[int]]] = []
    for name, entry in header.items():
        try:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            dtype_name = entry["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the header entry of {name} is incomplete") from error
        if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
            raise CheckpointError(f"{name} has the dtype {dtype_name!r}, which is not supported")
        dtype = _DTYPES[dtype_name]
        numbers = [begin, end, *(shape if isinstance(shape, list) else [None])]
        if len(numbers) > _MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in numbers):
            raise CheckpointError(
                f"the header entry of {name} has offsets or sizes that make no sense"
            )
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise CheckpointError(
                f"{name} of shape {shape} and dtype {dtype_name} does not fit its {end - begin} bytes"
            )
        spans.append((begin, end, name, dtype, shape))
    spans.sort(key=lambda span: span[:2])
    position = 0
    for begin, end, name, _, _ in spans:
        if begin != position:
            raise CheckpointError(f"the data of {name} overlaps or leaves a gap before it")
        position = end
    if position != available:
        raise CheckpointError(
            f"its tensors need {position} bytes after the header and there are {available}: "
            "it is cut off or has been added to"
        )
    return [(name, dtype, shape) for _, _, name, dtype, shape in spans]
