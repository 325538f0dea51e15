"""One file of embeddings: rows and their names, as safetensors or Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.embed.manifest import write
from beit3_fast.errors import CheckpointError, ConfigError
from beit3_fast.retrieval import EmbeddingIndex
from beit3_fast.retrieval.origin import Origin

FORMATS = ("safetensors", "parquet")


def check_format(form: Any) -> None:
    """Raises ConfigError for an unknown format, and for Parquet without pyarrow."""
    if form not in FORMATS:
        raise ConfigError(f"format must be one of {list(FORMATS)}, got {form!r}")
    if form == "parquet":
        _pyarrow()


def write_shard(
    folder: Path,
    number: int,
    form: str,
    rows: Tensor,
    names: list[str],
    skipped: list[dict[str, str]],
    origin: Origin,
) -> dict[str, Any]:
    """Write rows fp32 [N, C] and the list of what they lack, whole or not at all; what the manifest says of them.

    A safetensors file is an index and keeps ``origin``, what made the rows.
    """
    path = folder / f"{number:06}.{form}"
    listed = folder / f"{number:06}.skipped.jsonl"
    try:
        if skipped:
            write(listed, "".join(json.dumps(entry) + "\n" for entry in skipped))
        else:
            listed.unlink(missing_ok=True)
        if form == "parquet":
            _write_parquet(path, rows, names)
        else:
            EmbeddingIndex(rows, names, "torch", origin=origin).save(path)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    return {"file": path.name, "bytes": size, "rows": len(names), "skipped": len(skipped)}


def read_shard(folder: Path, number: int, form: str) -> tuple[Tensor, list[str]]:
    """Rows fp32 [N, C] of a shard and their names as ``stored_name`` has them. Raises CheckpointError."""
    path = folder / f"{number:06}.{form}"
    if form != "parquet":
        index = EmbeddingIndex.load(path, "torch")
        return index.embeddings, index.names
    _, parquet = _pyarrow()
    try:
        table = parquet.read_table(path)
        names = table["name"].to_pylist()
        values = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.tensor(values).view(len(names), -1 if names else 0), names
    # a damaged file is answered with errors of every kind
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def stored_name(name: str, form: str) -> str:
    """A name as a shard has it: Arrow's strings are UTF-8, names of files need not be."""
    if form != "parquet":
        return name
    return name.encode("utf-8", "backslashreplace").decode()


def _write_parquet(path: Path, rows: Tensor, names: list[str]) -> None:
    """Columns ``name`` (string) and ``embedding`` (list of C float32)."""
    pyarrow, parquet = _pyarrow()
    texts = [stored_name(name, "parquet") for name in names]
    flat = pyarrow.array(rows.contiguous().flatten().numpy())
    columns = {
        "name": pyarrow.array(texts, pyarrow.string()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
    }
    try:
        with replacing(path) as file:
            parquet.write_table(pyarrow.table(columns), file)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    # A package that was built for another numpy fails in ways of its own.
    except Exception as error:
        raise ConfigError(
            f"format='parquet' needs pyarrow, which does not import ({error}); pip install pyarrow, or use "
            "format='safetensors'"
        ) from error
    return pyarrow, pyarrow.parquet
