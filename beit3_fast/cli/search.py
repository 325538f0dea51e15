"""``beit3-fast search``: an index of images, and texts or images to search it with."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from beit3_fast.cli.command import Command
from beit3_fast.cli.options import (
    TOKENIZER_HELP,
    add_model,
    image_paths,
    load_model,
    of_each,
    positive,
    show,
)
from beit3_fast.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from beit3_fast.retrieval import EmbeddingIndex


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "index",
        metavar="INDEX",
        help="an index file, which --build makes or replaces, or a folder that beit3-fast embed made",
    )
    parser.add_argument("queries", nargs="*", metavar="TEXT", help="what to search for")
    parser.add_argument(
        "--build",
        nargs="+",
        metavar="IMAGE",
        help="first make the index of these files or folders of images",
    )
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="search for what is like this image"
    )
    parser.add_argument(
        "--top-k", type=positive, default=10, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help=TOKENIZER_HELP)
    add_model(parser, "beit3_base_patch16_384_retrieval", tokenizer=False)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from beit3_fast.retrieval import EmbeddingIndex
    from beit3_fast.retrieval.origin import origin_of

    images = arguments.image or []
    if not arguments.index:
        raise ConfigError("INDEX must be the name of a file or folder, got ''")
    if not (arguments.build or arguments.queries or images):
        raise ConfigError("nothing to do; give a text, --image FILE, or --build IMAGE...")
    if arguments.queries and not arguments.tokenizer:
        raise ConfigError("texts need --tokenizer beit3.spm")
    for path in arguments.build or ():
        if not os.path.lexists(path):
            raise ConfigError(
                f"--build names {path!r}, which does not exist; texts to search for stand in front of --build"
            )
    paths = _once(image_paths(arguments.build)) if arguments.build else []
    index = None if paths else _index(arguments.index)
    if paths:
        # before the images are embedded, which takes longest
        _check_target(arguments.index)
    model, processor = load_model(arguments, "retrieval", "search")
    options = {"processor": processor, "batch_size": arguments.batch_size}
    missing = 0
    if index is None:
        rows = of_each(arguments, paths, lambda own, _: list(model.encode_image(own, **options)))
        if not rows:
            return 1
        missing = len(paths) - len(rows)
        embeddings, names = torch.stack([row for _, row in rows]), [path for path, _ in rows]
        index = EmbeddingIndex(embeddings, names, origin=origin_of(model, "pooled image"))
        index.save(arguments.index)
        if not (arguments.queries or images):
            made = [{"index": arguments.index, "images": len(index)}]
            return show(arguments, made, [f"{arguments.index}: {len(index)} images"], missing)
    index.check_model(model)
    found = []
    if arguments.queries:
        found += index.search(model.encode_text(arguments.queries, **options), arguments.top_k)
    if images:
        found += index.search(model.encode_image(images, **options), arguments.top_k)
    report, lines = [], []
    for query, hits in zip([*arguments.queries, *images], found, strict=True):
        report.append({"query": query, "hits": [hit._asdict() for hit in hits]})
        lines += [query, *(f"  {hit.score:.3f}  {hit.name}" for hit in hits)]
    return show(arguments, report, lines, missing)


def _index(path: str) -> EmbeddingIndex:
    """An index file, or a folder of embeddings. Raises CheckpointError."""
    from beit3_fast.embed import load_embeddings
    from beit3_fast.retrieval import EmbeddingIndex

    return load_embeddings(path) if os.path.isdir(path) else EmbeddingIndex.load(path)


def _once(paths: list[str]) -> list[str]:
    """Every file under the first of its names, as when a folder and a file in it are given."""
    named: dict[str, str] = {}
    for path in paths:
        named.setdefault(os.path.abspath(path), path)
    return list(named.values())


def _check_target(path: str) -> None:
    """Raises ConfigError where no index can be written, or where there is something that is none."""
    from beit3_fast.retrieval import EmbeddingIndex

    if os.path.isdir(path):
        raise ConfigError(
            f"{path!r} is a folder, is no index and is not replaced; give another name for the index file"
        )
    if not os.path.isdir(Path(path).absolute().parent):
        raise ConfigError(f"the folder of {path!r} does not exist; make it first")
    if not os.path.lexists(path):
        return
    try:
        EmbeddingIndex.load(path)
    except CheckpointError as error:
        raise ConfigError(
            f"{path!r} is no index and is not replaced ({error}); give another name, or remove it first"
        ) from error


SEARCH = Command(
    summary="Find images by a text or an image, in an index that it also makes, or in embeddings of embed.",
    example='beit3-fast search photos.index "a red cup" --build photos --model beit3_base_patch16_384_retrieval '
    "--checkpoint beit3_base_patch16_384_coco_retrieval.pth --tokenizer beit3.spm",
    arguments=_arguments,
    run=_run,
)
