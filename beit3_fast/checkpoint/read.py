"""A checkpoint file, read and checked, before any model is near it.

The form is told from the first bytes, never from the name: official files were also handed out as ``.zip``, and a
``.bin`` may be either form. Whatever is wrong with a file becomes a CheckpointError that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_fast import unreadable
from beit3_fast.checkpoint import keys, safetensors_file, torch_file
from beit3_fast.checkpoint.pickle_names import LAZY_VIEW
from beit3_fast.checkpoint.pickle_scan import MAX_TENSORS
from beit3_fast.data.presets import ImagePreset
from beit3_fast.errors import CheckpointError, ConfigError

PathLike = str | os.PathLike[str]

OWN_KEY = "beit3_fast"
"""The entry beside ``model`` in which files of ours in the ``.pth`` form keep the metadata."""

_MAX_ALIASING = 4
_NOT_WEIGHTS = (
    (
        b"version https://git-lfs",
        "it is a Git LFS pointer: run `git lfs pull` to get the file itself",
    ),
    (b"<", "it is a web page, so the download failed: download it again"),
    (b"\x1f\x8b", "it is gzip-compressed: unpack it first"),
    (b"BZh", "it is bzip2-compressed: unpack it first"),
    (b"\xfd7zXZ", "it is xz-compressed: unpack it first"),
    (b"7z\xbc\xaf", "it is a 7z archive: unpack it first"),
    (b"\x89HDF", "it is an HDF5 file; only PyTorch and safetensors files are read"),
    (b"\x93NUMPY", "it is a NumPy file; only PyTorch and safetensors files are read"),
    (b"PK\x05\x06", "it is an empty zip file"),
)


@dataclass
class Checkpoint:
    """Weights and what the file says about them.

    ``state`` maps names, as the file has them, to dense CPU tensors that nothing else refers to. ``metadata`` holds
    texts: for files of ours ``model``, ``config`` and ``preprocessing``. ``left_out`` names the other entries of the
    file (optimizer, epoch, ...), ``remarks`` what a user should know. ``form`` is "zip", "legacy" or "safetensors",
    and "memory" where no file is behind it.
    """

    path: Path | None
    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    form: str = "memory"
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    identity: tuple[int, ...] = ()

    def __str__(self) -> str:
        return str(self.path) if self.path else "the given state dict"

    @property
    def name(self) -> str | None:
        """The entrypoint that the weights belong to, where the file tells it."""
        return self.metadata.get("model")

    @property
    def config(self) -> dict[str, Any] | None:
        """The fields of BEiT3Config, where the file tells them. Raises CheckpointError when they cannot be read."""
        return self._of_metadata(config_in)

    @property
    def preset(self) -> str | dict[str, Any] | None:
        """The name or the fields of an ImagePreset, where the file tells it. Raises CheckpointError when it is none."""
        return self._of_metadata(preset_in)

    @cached_property
    def sha256(self) -> str:
        """The digest of the whole file, read again on first use. Raises CheckpointError when the file has changed."""
        if self.path is None:
            raise CheckpointError("a state dict that came from no file has no file digest")
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                if _identity(os.fstat(file.fileno())) != self.identity:
                    raise CheckpointError(
                        f"{self.path}: it has changed since it was read; read it again"
                    )
                while block := file.read(16 << 20):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    def _of_metadata(self, read: Callable[[Mapping[str, str]], Any]) -> Any:
        try:
            return read(self.metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{self}: {error}") from error.__cause__


def read_checkpoint(path: PathLike, *, key: str | None = None, verify: bool = True) -> Checkpoint:
    """Read a ``.pth`` (either form of torch.save, under any name) or ``.safetensors`` file onto the CPU.

    ``key`` picks the entry that holds the weights where the file has several, such as "model_ema"; without it the
    first of ``keys.WRAPPERS`` is taken. ``verify=False`` skips the checksums of the data and nothing else.
    Nothing in the file is executed. Raises CheckpointError, with the path and the reason, for every file that is not
    a whole, plain set of named tensors.
    """
    path = as_path(path)
    try:
        with _open(path) as file:
            status = os.fstat(file.fileno())
            checkpoint = _read(file, path, status.st_size, key, verify)
            checkpoint.identity = _identity(status)
            return checkpoint
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {unreadable.why(error)}") from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: is damaged ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def from_state(state: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint out of a dictionary of tensors, or of the dictionary that a ``.pth`` file would hold."""
    state, left_out = keys.unwrap(state, None)
    checked = {name: check_tensor(name, tensor) for name, tensor in state.items()}
    return Checkpoint(path=None, state=checked, left_out=left_out)


def config_in(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration that metadata hold. Raises CheckpointError when it cannot be read."""
    config = _json(metadata, "config")
    if config is not None and not isinstance(config, dict):
        raise CheckpointError("its config in the metadata is no table of values")
    return config


def preset_in(metadata: Mapping[str, str]) -> str | dict[str, Any] | None:
    """The name or the fields of the image preset that metadata hold. Raises CheckpointError when they make none."""
    preset = _json(metadata, "preprocessing")
    if preset is None:
        return None
    try:
        ImagePreset.get(preset)
    except ConfigError as error:
        raise CheckpointError(f"its image preset in the metadata is none: {error}") from error
    return preset


def _json(metadata: Mapping[str, str], key: str) -> Any:
    text = metadata.get(key)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {key} in the metadata is no valid JSON ({error})") from error


def as_path(path: PathLike) -> Path:
    """The path of a file. Raises CheckpointError for what can be the name of none."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise CheckpointError(
            f"expected the path of a file, as a str or a pathlib.Path, got {type(path).__name__}"
        )
    try:
        nameless = not text or b"\0" in os.fsencode(text)
    except UnicodeEncodeError:
        nameless = True
    if nameless:
        raise CheckpointError(f"{text!r} cannot be the name of a file; give its path")
    return Path(text)


def check_tensor(name: str, tensor: Any) -> Tensor:
    """The tensor without its ties to autograd. Raises CheckpointError unless it is dense, plain and has data."""
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{name} is a {type(tensor).__name__} and should be a tensor")
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise CheckpointError(
            f"{name} is a {type(tensor).__name__}; only plain tensors can be weights"
        )
    kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
    if kind != "strided" or tensor.is_nested:
        raise CheckpointError(f"{name} is a {kind} tensor; only dense tensors can be weights")
    if tensor.is_meta:
        raise CheckpointError(f"{name} is on the meta device and has no data")
    if tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"{name} is {LAZY_VIEW}")
    return tensor.detach()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True when dtype, shape and every bit are the same; NaN equals itself, zero differs from minus zero."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def _open(path: Path) -> BufferedReader:
    text = str(path)
    if text.startswith(("http:/", "https:/")):
        raise CheckpointError("only local files are read; download it first and give the path")
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise CheckpointError("it is a folder; give the path of the file in it")
    if not stat.S_ISREG(mode):
        raise CheckpointError("it is no regular file")
    return path.open("rb")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: BufferedReader, path: Path, size: int, key: str | None, verify: bool) -> Checkpoint:
    head = file.read(64)
    if not head:
        raise CheckpointError("it is empty; download it again")
    if head[8:9] == b"{" and head[:4] != torch_file.ZIP_MAGIC:
        state, metadata = safetensors_file.read(file, size, verify)
        if key is not None:
            raise CheckpointError(f"safetensors files have one set of weights and no entry {key!r}")
        state, _ = keys.unwrap(state, None)
        remark = (
            () if "sha256" in metadata else ("it carries no digest, so damage would go unnoticed",)
        )
        return Checkpoint(path, state, metadata, "safetensors", (), remark)
    if head.startswith(torch_file.ZIP_MAGIC):
        content, remarks = torch_file.read_zip(file, size, verify)
        form = "zip"
    elif head.startswith(torch_file.LEGACY_MAGIC):
        content, remarks = torch_file.read_legacy(file, size)
        form = "legacy"
    else:
        raise CheckpointError(_describe(head))
    metadata = _own_metadata(content)
    state, left_out = keys.unwrap(content, key)
    left_out = tuple(entry for entry in left_out if entry != OWN_KEY)
    state = {name: check_tensor(name, tensor) for name, tensor in state.items()}
    if len(state) > MAX_TENSORS:
        raise CheckpointError(f"it holds {len(state)} tensors; at most {MAX_TENSORS} are read")
    total = sum(tensor.nbytes for tensor in state.values())
    if total > _MAX_ALIASING * size:
        raise CheckpointError(f"its tensors unfold to {total} bytes, far more than its own {size}")
    return Checkpoint(path, state, metadata, form, left_out, tuple(remarks))


def _own_metadata(content: Any) -> dict[str, str]:
    own = dict.get(content, OWN_KEY) if isinstance(content, dict) else None
    return {} if own is None or isinstance(own, Tensor) else check_texts(own)


def check_texts(metadata: Any) -> dict[str, str]:
    """What a file says beside its weights. Raises CheckpointError unless it is a dictionary of texts."""
    texts = dict(metadata.items()) if isinstance(metadata, Mapping) else None
    if texts is None:
        raise CheckpointError(
            f"metadata must be a dictionary of texts, got {type(metadata).__name__}"
        )
    for name, text in texts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(f"metadata must be texts under names, got {name!r}: {text!r}")
        try:
            (name + text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"metadata must be text that UTF-8 can hold, got {name!r}: {text!r}"
            ) from error
    return texts


def _describe(head: bytes) -> str:
    for magic, reason in _NOT_WEIGHTS:
        if head.lstrip().startswith(magic):
            return reason
    if head[0] == 0x80 and head[1:2] and head[1] <= 5:
        return (
            "it is a pickle that torch.save did not write; pickles can run code, so it was not opened: "
            "save the weights with torch.save"
        )
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"it is a text file that begins with {head[:20].decode()!r}, not weights"
    return "it is neither a PyTorch file nor a safetensors file; is it damaged, or another file?"
