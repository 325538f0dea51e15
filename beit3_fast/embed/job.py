"""embed_dataset: all embeddings of a dataset, shard by shard."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from beit3_fast.checkpoint.lock import held
from beit3_fast.data import Processor
from beit3_fast.data.digest import digest_of_tensors
from beit3_fast.embed.manifest import Manifest
from beit3_fast.embed.ranks import Ranks
from beit3_fast.embed.ray_actors import check_ray, make_with_ray
from beit3_fast.embed.shards import check_format
from beit3_fast.embed.sources import Blob, Item, digest_of, list_items
from beit3_fast.embed.work import (
    EmbedReport,
    Engine,
    Work,
    encode,
    make_local,
    telling_of_dead_workers,
)
from beit3_fast.errors import ConfigError, InputError
from beit3_fast.model.embeddings import Embeddings
from beit3_fast.ops.packed_weight import PackedWeight
from beit3_fast.progress import Progress
from beit3_fast.torchrun import started_by_torchrun

OUTPUTS = ("pooled", "cls")
ENGINES = ("auto", "local", "torchrun", "ray")
_MOST_WORKERS = 256


def embed_dataset(
    model: Any,
    sources: str | PathLike[str] | Sequence[str | PathLike[str]],
    folder: str | PathLike[str],
    kind: str = "image",
    output: str = "pooled",
    *,
    processor: Processor,
    batch_size: int = 32,
    shard_size: int = 2048,
    workers: int | None = None,
    progress: bool = False,
    format: str = "safetensors",
    engine: str = "auto",
    engine_workers: int | None = None,
) -> EmbedReport:
    """Embed every image, text or pair of ``sources`` into files in ``folder``.

    ``sources``: folders, image or text files, ``.tar`` shards in webdataset's layout, ``.jsonl`` indices in the official
    form. ``kind``: "image", "text" or "pair". ``output``: "pooled" or "cls", as for ``encode_image``. A shard holds the
    rows of ``shard_size`` items in their order, fp32 [N, C], and their names; it is written whole or not at all.
    ``format``: "safetensors", which ``EmbeddingIndex.load`` reads, or "parquet" (pyarrow; columns name and embedding).
    ``workers`` processes decode (default: up to 4, one fewer than processors; 0: none beside this one).

    ``engine`` says who makes the shards, always the same files and one manifest: "local", this process; "torchrun", the
    processes that torchrun started, which all call this and each take the next shard; "ray", ``engine_workers`` actors of
    Ray Data (default: one for each GPU of the cluster, else for each node), which is called once and gets the model
    pickled; "auto": "torchrun" under torchrun, else "local". On several machines sources and ``folder`` are shared.

    The same call again, after whatever end, goes on with the first shard that is missing, and ends with the same files.
    Other weights, another tokenizer, or files that were added or written since are another job. An item that cannot be
    read is logged, listed in the shard's ``.skipped.jsonl`` and counted; where the system failed and not the item (a disk,
    too many open files, a permission), the same call tries it again and keeps all other rows. One that is reached again, as a file of a folder
    and of an index, is left out, and the log says so. Raises ConfigError for options that cannot be used, a package that
    is missing and a folder of another job, InputError for sources that are not there or where nothing could be used and
    for shared memory that is too small for the workers, CheckpointError where the folder cannot be written.
    """
    engine = _engine(engine, engine_workers)
    check_format(format)
    workers = _checked(model, output, processor, batch_size, shard_size, workers, engine)
    items = list_items(sources, kind)
    _check_texts(items, processor)
    try:
        target = Path(os.fsdecode(folder))
        # an empty one would be the working folder
        if not os.fspath(folder):
            raise TypeError
    except TypeError as error:
        raise ConfigError(f"folder must be a path, got {folder!r:.80}") from error
    width = _width(model, kind, output, processor)
    tokenizer = processor.tokenizer
    job = {
        "kind": kind,
        "output": output,
        "format": format,
        "model": type(model).__name__,
        "weights": _weights(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "processor": f"{processor.preset} {processor.image_size} {processor.max_length}",
        "tokenizer": None if kind == "image" or tokenizer is None else tokenizer.identity,
        "sources": digest_of(items),
        "items": len(items),
        "shard_size": shard_size,
    }
    sizes = (width, batch_size, shard_size, workers)
    work = Work(model, processor, items, target, kind, output, format, *sizes)

    def lead(make: Engine) -> EmbedReport:
        return _lead(work, job, progress, make)

    with telling_of_dead_workers():
        if engine == "torchrun":
            return Ranks().run(work, job, lead)
        return lead(make_local if engine == "local" else partial(make_with_ray, engine_workers))


def _lead(work: Work, job: dict[str, Any], progress: bool, make: Engine) -> EmbedReport:
    """The part of the one process that keeps the manifest: what is missing is made, then reported."""
    with held(work.folder):
        manifest = Manifest(work.folder, job)
        todo = [number for number in range(len(work)) if not manifest.is_done(number)]
        work = replace(work, again={n: rows for n in todo if (rows := manifest.rows_of(n))})
        waiting = sum(map(work.left, todo))
        resumed = len(work.items) - waiting
        bar = Progress(len(work.items), resumed, progress)
        with contextlib.closing(bar):
            make(work, todo, bar, manifest.add)
    shards = [manifest.shards[number] for number in range(len(work))]
    report = EmbedReport(
        tuple(work.folder / shard["file"] for shard in shards),
        sum(shard["rows"] for shard in shards),
        sum(shard["skipped"] for shard in shards),
        sum(shard["unread"] for shard in shards),
        resumed,
    )
    if not report.embedded:
        raise InputError(
            f"none of the {len(work.items)} items could be used; the .skipped.jsonl files in {str(work.folder)!r} say why"
        )
    return report


def _engine(engine: Any, engine_workers: Any) -> str:
    """The engine that "auto" stands for. Raises ConfigError for one that cannot be used here."""
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {list(ENGINES)}, got {engine!r}")
    if engine == "ray":
        check_ray()
    elif engine_workers is not None:
        raise ConfigError(
            f"engine_workers goes with engine='ray', got {engine_workers!r} and engine={engine!r}"
        )
    if engine_workers is not None and (type(engine_workers) is not int or engine_workers < 1):
        raise ConfigError(f"engine_workers must be a positive integer, got {engine_workers!r}")
    if engine == "torchrun" and not started_by_torchrun():
        raise ConfigError(
            "engine='torchrun' needs the processes of torchrun; start it with: torchrun --nproc-per-node 2 -m beit3_fast "
            "embed ..."
        )
    if engine == "auto":
        return "torchrun" if started_by_torchrun() else "local"
    return str(engine)


def _checked(
    model: Any,
    output: Any,
    processor: Any,
    batch_size: Any,
    shard_size: Any,
    workers: Any,
    engine: str,
) -> int:
    """The number of workers. Raises ConfigError for what cannot be used."""
    if not isinstance(model, Embeddings):
        raise ConfigError(
            f"embed_dataset takes a model of create_model, got {type(model).__name__}"
        )
    if model.training:  # type: ignore[attr-defined]
        raise ConfigError("in training mode embeddings depend on chance; call model.eval() first")
    if not isinstance(processor, Processor):
        raise ConfigError(
            f"processor must be a beit3_fast.Processor, got {type(processor).__name__}; make one with "
            "Processor.for_model(model, 'beit3.spm')"
        )
    if output not in OUTPUTS:
        raise ConfigError(f"output must be one of {list(OUTPUTS)}, got {output!r}")
    if workers is None:
        workers = _free_processors(engine, next(model.parameters()).is_cuda)  # type: ignore[attr-defined]
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("workers", workers, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    if workers > _MOST_WORKERS:
        raise ConfigError(f"workers must be at most {_MOST_WORKERS}, got {workers}")
    return int(workers)


def _free_processors(engine: str, on_gpu: bool) -> int:
    """How many processes decode for one that computes, at most 4. The actors of Ray share all processors already."""
    if engine == "ray" and not on_gpu:
        return 0
    own = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, own - 1))


def _check_texts(items: Sequence[Item], processor: Processor) -> None:
    if processor.tokenizer is None and any(isinstance(item.text, (Blob, str)) for item in items):
        raise ConfigError(
            "texts need a tokenizer; give the official beit3.spm (--tokenizer, or processor=Processor.for_model(model, "
            "'beit3.spm')), or index files of token ids"
        )


def _width(model: Any, kind: str, output: str, processor: Processor) -> int:
    """Values of a row, by a trial: a model that has no such embeddings says so before anything is written."""
    image = torch.zeros(1, 3, *processor.image_size)
    return encode(model, kind, output, image, [torch.tensor([0, 5, 7, 2])]).shape[1]


def _weights(model: Any) -> str:
    """A digest of what the rows are computed with; the same on every device, packed or not."""
    parts = (
        (name, weight.unpack(torch.float32) if isinstance(weight, PackedWeight) else weight)
        for name, weight in model.named_parameters()
    )
    # the weights do not tell how many heads share their width
    return digest_of_tensors(parts, f"{model.backbone.config.num_heads} heads")
