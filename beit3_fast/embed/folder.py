"""A folder of embeddings as one index."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from beit3_fast.embed import manifest
from beit3_fast.errors import CheckpointError
from beit3_fast.retrieval import EmbeddingIndex

_AGAIN = "call embed again with the same arguments"


def load_embeddings(folder: str | PathLike[str], backend: str = "auto") -> EmbeddingIndex:
    """All rows that ``embed_dataset`` wrote into ``folder``, in the order of the items, as one index.

    ``backend`` as for EmbeddingIndex. The rows are held in memory. Raises CheckpointError for another folder, shards in
    Parquet, a job that is not finished and a damaged shard; ConfigError for a backend that is not there.
    """
    try:
        path = Path(folder)
    except TypeError as error:
        raise CheckpointError(f"expected the path of a folder, got {folder!r:.80}") from error
    if not (path / manifest.NAME).exists():
        raise CheckpointError(
            f"{path} is no folder that embed_dataset filled: it has no {manifest.NAME}; name such a folder, or an index file"
        )
    try:
        job, shards = manifest.read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; embed again into another folder") from error
    if job.get("format") != "safetensors":
        raise CheckpointError(
            f"{path}: its shards are in {job.get('format')!r}, which is not searched; embed with format='safetensors' "
            "(--format safetensors)"
        )
    numbers = range(manifest.number_of_shards(job["items"], job["shard_size"]))
    missing = [
        number
        for number in numbers
        if number not in shards or not manifest.is_whole(path, shards[number])
    ]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(numbers)} shards are not finished; {_AGAIN}"
        )
    parts = [_shard(path / shards[number]["file"], backend) for number in numbers]
    names = [name for part in parts for name in part.names]
    if not names:
        raise CheckpointError(
            f"{path}: none of its {job['items']} items could be used; its .skipped.jsonl files say why"
        )
    rows = torch.cat([part.embeddings for part in parts])
    return EmbeddingIndex(rows, names, backend, origin=parts[0].origin)


def _shard(path: Path, backend: str) -> EmbeddingIndex:
    try:
        return EmbeddingIndex.load(path, backend)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged; delete it and {_AGAIN}") from error
