"""embed_dataset: all embeddings of a dataset, shard by shard."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from beit3_fast.checkpoint.lock import held
from beit3_fast.data import Processor
from beit3_fast.embed.decode import Chunk, Chunks, Decoder
from beit3_fast.embed.manifest import Manifest, write
from beit3_fast.embed.sources import Blob, Item, digest_of, list_items
from beit3_fast.errors import CheckpointError, ConfigError, InputError
from beit3_fast.model.embeddings import Embeddings
from beit3_fast.progress import Progress
from beit3_fast.retrieval import EmbeddingIndex

logger = logging.getLogger("beit3_fast")

OUTPUTS = ("pooled", "cls")
_TEXTS_AT_ONCE = 256
_PROBED = 16


@dataclass(frozen=True)
class EmbedReport:
    """What a folder holds when the job is done.

    ``shards`` are its files in order, each of which ``EmbeddingIndex.load`` reads; ``embedded`` rows, ``skipped`` items
    that could not be used, ``resumed`` items that an earlier call had done.
    """

    shards: tuple[Path, ...]
    embedded: int
    skipped: int
    resumed: int


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
) -> EmbedReport:
    """Embed every image, text or pair of ``sources`` into safetensors files in ``folder``.

    ``sources``: folders, image or text files, ``.tar`` shards in webdataset's layout, ``.jsonl`` indices in the official
    form. ``kind``: "image", "text" or "pair". ``output``: "pooled" or "cls", as for ``encode_image``. A shard holds the
    rows of ``shard_size`` items in their order, fp32 [N, C], and their names; it is written whole or not at all.
    ``workers`` processes decode (default: up to 4, one fewer than processors; 0: none beside this one).

    The same call again, after whatever end, goes on with the first shard that is missing, and ends with the same files.
    An item that cannot be read is logged, listed in the shard's ``.skipped.jsonl`` and counted. Raises ConfigError for
    options that cannot be used and for a folder of another job, InputError for sources that are not there or where
    nothing could be used, CheckpointError where the folder cannot be written.
    """
    workers = _checked(model, output, processor, batch_size, shard_size, workers)
    items = list_items(sources, kind)
    _check_texts(items, processor)
    try:
        target = Path(os.fsdecode(folder))
    except TypeError as error:
        raise ConfigError(f"folder must be a path, got {folder!r:.80}") from error
    probe = _probe(model, kind, output, processor)
    job = {
        "kind": kind,
        "output": output,
        "model": type(model).__name__,
        "width": probe.numel(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "processor": f"{processor.preset} {processor.image_size} {processor.max_length}",
        "tokenizer": None if kind == "image" else _tokenized(processor),
        "sources": digest_of(items),
        "items": len(items),
        "shard_size": shard_size,
    }
    with held(target):
        manifest = Manifest(target, job, probe[:_PROBED].tolist())
        ranges = [
            range(first, min(first + shard_size, len(items)))
            for first in range(0, len(items), shard_size)
        ]
        todo = [number for number in range(len(ranges)) if not manifest.is_done(number)]
        waiting = sum(len(ranges[number]) for number in todo)
        bar = Progress(len(items), len(items) - waiting, progress)
        chunks = Chunks([ranges[n] for n in todo], _TEXTS_AT_ONCE if kind == "text" else batch_size)
        decoded = _decoded(items, model, processor, chunks, workers)
        with contextlib.closing(bar):
            for number in todo:
                own = itertools.islice(decoded, chunks.count(ranges[number]))
                rows, places, skipped = _rows(
                    model, kind, output, own, batch_size, items, probe.numel(), bar
                )
                names = [items[place].name for place in places]
                reasons = [
                    {"name": items[place].name, "reason": reason} for place, reason in skipped
                ]
                manifest.add(number, _write_shard(target, number, rows, names, reasons))
    shards = [manifest.shards[number] for number in range(len(ranges))]
    report = EmbedReport(
        tuple(target / shard["file"] for shard in shards),
        sum(shard["rows"] for shard in shards),
        sum(shard["skipped"] for shard in shards),
        len(items) - waiting,
    )
    if not report.embedded:
        raise InputError(
            f"none of the {len(items)} items could be used; the .skipped.jsonl files in {str(target)!r} say why"
        )
    return report


def _checked(
    model: Any, output: Any, processor: Any, batch_size: Any, shard_size: Any, workers: Any
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
        workers = max(1, min(4, (os.cpu_count() or 1) - 1))
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("workers", workers, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(workers)


def _check_texts(items: Sequence[Item], processor: Processor) -> None:
    if processor.tokenizer is None and any(isinstance(item.text, (Blob, str)) for item in items):
        raise ConfigError(
            "texts need a tokenizer; pass processor=Processor.for_model(model, 'beit3.spm'), or index files of token ids"
        )


def _tokenized(processor: Processor) -> list[int] | None:
    """What a tokenizer is known by."""
    tokenizer = processor.tokenizer
    return None if tokenizer is None else tokenizer.encode("A red cup, and 2 cats.")


def _probe(model: Any, kind: str, output: str, processor: Processor) -> Tensor:
    """The embedding, fp32 [C], of an input that is always the same: by it other weights are noticed."""
    height, width = processor.image_size
    image = torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)
    text = [torch.tensor([0, 5, 7, 2])]
    return _encode(model, kind, output, image, text)[0]


def _encode(
    model: Any, kind: str, output: str, images: Tensor | None, texts: list[Tensor]
) -> Tensor:
    """Rows, fp32 [B, C] on the CPU."""
    if kind == "image":
        rows = model.encode_image(images, output, batch_size=1 if images is None else len(images))
    elif kind == "text":
        rows = model.encode_text(texts, output, batch_size=len(texts))
    else:
        rows = model.encode_pair(images, texts, output, batch_size=len(texts))
    return rows.to("cpu", torch.float32)


def _decoded(
    items: Sequence[Item], model: Any, processor: Processor, chunks: Chunks, workers: int
) -> Iterator[Chunk]:
    decoder = Decoder(items, processor, model.backbone.config.vocab_size)
    loader = DataLoader(decoder, batch_sampler=chunks, num_workers=workers, collate_fn=_unchanged)
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise InputError(
            f"a decoding worker died ({str(error).splitlines()[0]}); the same call again goes on from the last shard, with "
            "fewer workers if memory was short"
        ) from error


def _unchanged(chunk: Any) -> Any:
    return chunk


def _rows(
    model: Any,
    kind: str,
    output: str,
    chunks: Iterator[Chunk],
    batch_size: int,
    items: Sequence[Item],
    width: int,
    bar: Progress,
) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
    """Embeddings of the chunks of one shard with their places, in order, and what was skipped."""
    parts: list[Tensor] = []
    places: list[int] = []
    skipped: list[tuple[int, str]] = []
    texts: list[tuple[int, int, list[int]]] = []

    def skip(place: int, reason: str) -> None:
        bar.clear_line()
        logger.warning("skipped %s: %s", items[place].name, reason)
        skipped.append((place, reason))

    def embed(own: list[int], images: Tensor | None, tokens: list[list[int]]) -> None:
        rows = _encode(model, kind, output, images, [torch.tensor(ids) for ids in tokens])
        good = rows.isfinite().all(1).tolist()
        parts.append(rows[good])
        places.extend(place for place, is_good in zip(own, good, strict=True) if is_good)
        for place, is_good in zip(own, good, strict=True):
            if not is_good:
                skip(place, "its embedding is not finite; try another dtype")
        bar.add(len(own), good.count(False))

    for chunk in chunks:
        for place, reason in chunk.skipped:
            skip(place, reason)
        bar.add(len(chunk.skipped), len(chunk.skipped))
        if kind == "text":
            texts += [
                (len(ids), place, ids) for place, ids in zip(chunk.places, chunk.texts, strict=True)
            ]
        elif chunk.places:
            embed(chunk.places, chunk.images, chunk.texts)
    # texts of one length meet in one batch, where nothing waits for a long one
    texts.sort()
    for start in range(0, len(texts), batch_size):
        _, own, tokens = zip(*texts[start : start + batch_size], strict=True)
        embed(list(own), None, list(tokens))
    skipped.sort()
    order = sorted(range(len(places)), key=places.__getitem__)
    return (
        torch.cat([torch.empty(0, width), *parts])[order],
        [places[index] for index in order],
        skipped,
    )


def _write_shard(
    folder: Path, number: int, rows: Tensor, names: list[str], skipped: list[dict[str, str]]
) -> dict[str, Any]:
    """Write one shard and the list of what it lacks; what the manifest says of it."""
    path = folder / f"{number:06}.safetensors"
    listed = folder / f"{number:06}.skipped.jsonl"
    try:
        if skipped:
            write(listed, "".join(json.dumps(entry) + "\n" for entry in skipped))
        else:
            listed.unlink(missing_ok=True)
        EmbeddingIndex(rows, names, "torch").save(path)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    return {"file": path.name, "bytes": size, "rows": len(names), "skipped": len(skipped)}
