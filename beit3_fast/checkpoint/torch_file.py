"""Reading what ``torch.save`` wrote: the zip form of today and the plain form from before torch 1.6.

``torch.load(weights_only=True)`` does the reading; everything that it leaves open is checked first: what the pickle asks
for, that each storage lies in the file at its full length, and the checksum of every record.
"""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import zipfile
import zlib
from typing import Any, BinaryIO

import torch

from beit3_fast.checkpoint.pickle_names import NAMESPACE
from beit3_fast.checkpoint.pickle_scan import MAX_TENSORS, Scan, scan_pickle
from beit3_fast.errors import CheckpointError
from beit3_fast.locks import fork_safe_lock

ZIP_MAGIC = b"PK\x03\x04"
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
LEGACY_MAGIC = pickle.dumps(_MAGIC_NUMBER, protocol=2)
_PROTOCOL_VERSION = 1001

_FOLDER = 0x10  # of the attributes of DOS
_MAX_PICKLE = 256 << 20
_MAX_DIRECTORY = 32 << 20
_CHUNK = 4 << 20

# stated in full: the process may have other defaults
_OPTIONS: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": False}

_namespace_lock = fork_safe_lock()


def read_zip(file: BinaryIO, size: int, verify: bool) -> tuple[Any, list[str]]:
    """The object in a zip written by ``torch.save``, and remarks. Raises CheckpointError."""
    _check_directory(file, size)
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            entries = len(archive.infolist())
    except Exception as error:
        raise CheckpointError(
            f"its zip directory is damaged or cut off ({error}); copy or download it again"
        ) from error
    root = _archive_folder(records)
    if entries != len(records):
        raise CheckpointError("two records in it have the same name")
    if entries > MAX_TENSORS + 100:
        raise CheckpointError(f"it holds {entries} records; at most {MAX_TENSORS} tensors are read")
    if sum(info.file_size for info in records.values()) > size:
        raise CheckpointError("its records claim to be larger than the file itself")
    for name, info in records.items():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"its record {name} is compressed or encrypted, which torch.save never does; "
                "unpack it, or save the weights again"
            )
        if info.is_dir() or info.external_attr & _FOLDER:
            raise CheckpointError(
                f"its record {name} is marked as a folder, which PyTorch would not read; copy or download it again"
            )
        if not name.startswith(root) or ".." in name.split("/") or "\\" in name:
            raise CheckpointError(f"its record {name!r} leaves the folder {root!r} of the archive")
    unchecked = verify and not any(info.CRC for info in records.values())
    for info in records.values() if verify and not unchecked else ():
        _check_crc(file, info, size)
    pickled = records[f"{root}data.pkl"]
    if pickled.file_size > _MAX_PICKLE:
        raise CheckpointError(f"its pickle of {pickled.file_size} bytes is too large for weights")
    file.seek(_data_offset(file, pickled, size))
    pickle_bytes = io.BytesIO(file.read(pickled.file_size))
    scan = scan_pickle(pickle_bytes)
    if pickle_bytes.tell() != pickled.file_size:
        raise CheckpointError(
            f"its pickle ends at byte {pickle_bytes.tell()} of {pickled.file_size}: it has been added to"
        )
    for key, storage in scan.storages.items():
        record = records.get(f"{root}data/{key}")
        if record is None:
            raise CheckpointError(f"the data of its tensor storage {key} is missing")
        if record.file_size != storage.nbytes:
            raise CheckpointError(
                f"its tensor storage {key} should have {storage.nbytes} bytes and has {record.file_size}"
            )
    file.seek(0)
    remarks = []
    if unchecked or not verify:
        remarks.append("checksums were not verified: damage to the numbers would go unnoticed")
    return _load(file, scan), remarks


def read_legacy(file: BinaryIO, size: int) -> tuple[Any, list[str]]:
    """The object in a file written by ``torch.save`` before torch 1.6, and remarks. Raises CheckpointError."""
    file.seek(0)
    if scan_pickle(file).value != _MAGIC_NUMBER or scan_pickle(file).value != _PROTOCOL_VERSION:
        raise CheckpointError("it does not begin as torch.save writes it")
    system = scan_pickle(file).value
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("it was written on a big-endian machine; save it again on this one")
    scan = scan_pickle(file)
    keys = scan_pickle(file).value
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(scan.storages):
        raise CheckpointError("its list of tensor storages does not fit its tensors")
    position = file.tell()
    for key in keys:
        storage = scan.storages[str(key)]
        file.seek(position)
        head = file.read(8)
        if len(head) != 8 or struct.unpack("<q", head)[0] != storage.numel:
            raise CheckpointError(f"the data of its tensor storage {key} is damaged or cut off")
        position += 8 + storage.nbytes
    if position != size:
        raise CheckpointError(
            f"its tensors end at byte {position} and the file at {size}: it is cut off or has been added to"
        )
    file.seek(0)
    return _load(file, scan), [
        "the old file form has no checksums: damage to the numbers would go unnoticed"
    ]


def _load(file: BinaryIO, scan: Scan) -> Any:
    try:
        if NAMESPACE not in scan.globals:
            return torch.load(file, **_OPTIONS)
        # safe_globals is one set for the whole process: threads take turns, and an entry of the user's stays
        with _namespace_lock:
            if argparse.Namespace in torch.serialization.get_safe_globals():
                return torch.load(file, **_OPTIONS)
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, **_OPTIONS)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"PyTorch cannot read it ({type(error).__name__}: {reason}); copy or download it again"
        ) from error


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuse a huge table of contents before the standard library builds an object for each entry."""
    tail_start = max(0, size - 65_536 - 22)
    file.seek(tail_start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or end + 22 > len(tail):
        raise CheckpointError(
            "its zip directory is missing: it is cut off; copy or download it again"
        )
    behind = len(tail) - end - 22 - int(struct.unpack_from("<H", tail, end + 20)[0])
    if behind:
        raise CheckpointError(
            f"its zip directory ends {behind} bytes from the end of the file: it has been cut off or added to; "
            "copy or download it again"
        )
    length = int(struct.unpack_from("<I", tail, end + 12)[0])
    if length == 0xFFFFFFFF and end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        file.seek(min(struct.unpack_from("<Q", tail, end - 12)[0], size))
        record = file.read(56)
        length = struct.unpack_from("<Q", record, 40)[0] if len(record) == 56 else size + 1
    if length > min(size, _MAX_DIRECTORY):
        raise CheckpointError(
            f"its zip directory claims {length} bytes, which is damaged or hostile"
        )


def _archive_folder(records: dict[str, zipfile.ZipInfo]) -> str:
    """The folder, with its slash, in which ``torch.save`` put everything."""
    names = list(records)
    if any(name.split("/")[-1] == "constants.pkl" or "/code/" in name for name in names):
        raise CheckpointError(
            "it is a TorchScript archive, which holds a program; save the weights with torch.save instead"
        )
    if any(name.split("/")[-1] == "archive_format" or "/data/weights/" in name for name in names):
        raise CheckpointError(
            "it is an archive of torch.export, which holds a program; save the weights with torch.save instead"
        )
    folders = [name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl")]
    if len(folders) != 1:
        inner = next(
            (n for n in names if n.endswith((".pth", ".pt", ".bin", ".safetensors"))), None
        )
        mend = f"unpack it and load {inner}" if inner else "is it another kind of zip?"
        raise CheckpointError(f"it is a zip file that torch.save did not write; {mend}")
    return folders[0]


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> int:
    file.seek(info.header_offset)
    head = file.read(30)
    if len(head) != 30 or head[:4] != ZIP_MAGIC:
        raise CheckpointError(f"the header of its record {info.filename} is damaged")
    name_length, extra_length = struct.unpack_from("<HH", head, 26)
    offset = info.header_offset + 30 + name_length + extra_length
    if file.read(name_length) != info.filename.encode() or offset + info.file_size > size:
        raise CheckpointError(f"the header of its record {info.filename} is damaged")
    return offset


def _check_crc(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> None:
    file.seek(_data_offset(file, info, size))
    left, checksum = info.file_size, 0
    while left:
        block = file.read(min(left, _CHUNK))
        if not block:
            break
        checksum = zlib.crc32(block, checksum)
        left -= len(block)
    if left or checksum != info.CRC:
        raise CheckpointError(
            f"the checksum of its record {info.filename} is wrong: the file is damaged; copy or download it again"
        )
