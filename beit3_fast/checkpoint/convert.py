"""One form of checkpoint file into the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from beit3_fast.checkpoint.load import check_checkpoint
from beit3_fast.checkpoint.read import PathLike, as_path, read_checkpoint, same_bits
from beit3_fast.checkpoint.safetensors_file import DIGESTS
from beit3_fast.checkpoint.save import save_checkpoint
from beit3_fast.errors import CheckpointError


@dataclass(frozen=True)
class Conversion:
    """What ``convert_checkpoint`` wrote. ``left_out`` are entries of the source that are no weights."""

    source: Path
    target: Path
    tensors: int
    nbytes: int
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]


def convert_checkpoint(
    source: PathLike,
    target: PathLike,
    *,
    model: nn.Module | None = None,
    preset: Any = None,
    key: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write the weights of ``source`` to ``target`` in the form that its suffix names, then read them back and compare.

    All names, dtypes and bits are kept, and so is the metadata of files of ours. ``model``, which may be on the meta
    device, is one that the weights must fit; its ``name`` and ``config`` go into the metadata, as does ``preset`` (see
    ``save_checkpoint``). ``key`` is as in ``read_checkpoint``. Raises CheckpointError, also when ``target`` exists and
    ``overwrite`` is not set.
    """
    source, target = as_path(source), as_path(target)
    if target.exists():
        if source.exists() and source.samefile(target):
            raise CheckpointError(f"{target}: is the source itself; give another name")
        if not overwrite:
            raise CheckpointError(
                f"{target}: exists already; give another name, or overwrite=True to replace it"
            )
    checkpoint = read_checkpoint(source, key=key)
    if model is not None:
        report = check_checkpoint(model, checkpoint)
        if report.interpolated:
            old, new = next(iter(report.interpolated.values()))
            raise CheckpointError(
                f"{source}: is for {old[0]}x{old[1]} patches and the named model for {new[0]}x{new[1]}; "
                "name the model of the file's own image size"
            )
    if preset is None and checkpoint.preset is None:
        preset = getattr(model, "preset", None)
    save_checkpoint(
        checkpoint.state,
        target,
        name=getattr(model, "name", None),
        config=getattr(model, "config", None),
        preset=preset,
        metadata={k: v for k, v in checkpoint.metadata.items() if k not in ("format", *DIGESTS)},
    )
    written = read_checkpoint(target)
    if not _equal(checkpoint.state, written.state):
        raise CheckpointError(f"{target}: does not read back as it was written; is the disk sound?")
    return Conversion(
        source,
        target,
        len(checkpoint.state),
        sum(tensor.nbytes for tensor in checkpoint.state.values()),
        checkpoint.left_out,
        checkpoint.remarks,
    )


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(same_bits(a[name], b[name]) for name in a)
