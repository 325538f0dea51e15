"""Weights into a file, which is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BufferedRandom
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.checkpoint import safetensors_file
from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.checkpoint.read import (
    OWN_KEY,
    PathLike,
    as_path,
    check_tensor,
    check_texts,
    config_in,
    preset_in,
)
from beit3_fast.checkpoint.safetensors_file import DIGESTS
from beit3_fast.errors import CheckpointError

SUFFIXES = {".safetensors": "safetensors", ".pth": "zip", ".pt": "zip", ".bin": "zip"}


def save_checkpoint(
    model: nn.Module | Mapping[str, Tensor],
    path: PathLike,
    *,
    name: str | None = None,
    config: Any = None,
    preset: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the weights of a model, or a state dict, to ``path`` and return it.

    The suffix decides the form: ``.safetensors`` with digests, or ``.pth`` (``.pt``, ``.bin``) in the official form
    ``{"model": state}``, which the official loaders read. ``name`` (an entrypoint), ``config`` (a BEiT3Config or its
    dictionary) and ``preset`` (an ImagePreset, its dictionary or its name) go into the metadata; a
    model's own ``name``, ``config`` and ``preset`` serve when they are not given. Names, dtypes and values are kept
    bit for bit; tensors that share memory are written one by one.

    The file appears whole or not at all, and only then replaces an older one. Raises CheckpointError when the weights
    or the path cannot be used, or the disk cannot take them.
    """
    path = as_path(path)
    try:
        texts = {} if metadata is None else check_texts(metadata)
        form = _form(path)
        if not isinstance(model, (nn.Module, Mapping)):
            raise CheckpointError(
                f"a model or a state dict is needed to save, got {type(model).__name__}"
            )
        if isinstance(model, nn.Module):
            name = name if name is not None else getattr(model, "name", None)
            config = config if config is not None else getattr(model, "config", None)
            preset = preset if preset is not None else getattr(model, "preset", None)
        if name is not None:
            texts["model"] = name
        for key, value in (("config", config), ("preprocessing", preset)):
            if value is not None:
                texts[key] = _to_json(key, value)
        _check_readable(texts)
        tensors = _tensors(model.state_dict() if isinstance(model, nn.Module) else model)
        with replacing(path) as file:
            if form == "zip":
                _write_zip(file, tensors, texts)
            else:
                # other libraries look for this word before they read a file
                safetensors_file.write(file, tensors, {"format": "pt", **texts})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    return path


def _form(path: Path) -> str:
    form = SUFFIXES.get(path.suffix.lower())
    if form is None:
        raise CheckpointError(
            f"the name must end in one of {', '.join(SUFFIXES)}, which decides the form of the file"
        )
    return form


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise CheckpointError(f"{name!r} cannot be the name of a tensor")
        tensors[name] = check_tensor(name, tensor)
    if not tensors:
        raise CheckpointError("there are no tensors to save")
    return tensors


def _to_json(key: str, value: Any) -> str:
    table = value.to_dict() if hasattr(value, "to_dict") else value
    try:
        return json.dumps(table, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the {key} cannot be written as JSON: {error}") from error


def _check_readable(texts: Mapping[str, str]) -> None:
    """Raises CheckpointError for what ``read_checkpoint`` and ``load_checkpoint`` would refuse later."""
    taken = [name for name in DIGESTS if name in texts]
    if taken:
        raise CheckpointError(
            f"metadata cannot have {', '.join(taken)}, which is written by itself"
        )
    config_in(check_texts(texts))
    preset_in(texts)


class _Recorder:
    """Passes writes on and keeps the error of the operating system, which the archive writer would replace."""

    def __init__(self, file: BufferedRandom) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_zip(file: BufferedRandom, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    content: dict[str, Any] = {"model": {n: _alone(tensor) for n, tensor in tensors.items()}}
    if texts:
        content[OWN_KEY] = texts
    recorder = _Recorder(file)
    try:
        torch.save(content, recorder)  # type: ignore[arg-type]
    except Exception as error:
        if recorder.error is not None:
            raise recorder.error from error
        raise CheckpointError(f"cannot be written: {error}") from error


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, on the CPU: torch.save writes all the memory behind a view."""
    tensor = tensor.cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
