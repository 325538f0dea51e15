"""``beit3-fast embed``: a dataset to files of embeddings."""

from __future__ import annotations

import argparse
import os

from beit3_fast.cli.command import Command
from beit3_fast.cli.options import (
    TOKENIZER_HELP,
    add_model,
    add_num_classes,
    check_model_name,
    make_model,
    positive,
    show,
)
from beit3_fast.errors import ConfigError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folders, files, .tar shards in webdataset's layout, .jsonl indices in the official form",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="where the shards go, and beside each what was skipped and why: items that cannot be used are no error; those that the "
        "system did not give are tried again by the same call",
    )
    parser.add_argument(
        "--kind", default="image", help="image, text or pair (default: %(default)s)"
    )
    parser.add_argument("--output", default="pooled", help="pooled or cls (default: %(default)s)")
    parser.add_argument(
        "--shard-size",
        type=positive,
        default=2048,
        metavar="N",
        help="items of a file, which is what a stop can cost (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="decoding processes; default: up to 4"
    )
    parser.add_argument(
        "--format",
        default="safetensors",
        help="or parquet, which needs pyarrow (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        default="auto",
        help="local, torchrun (what auto takes under torchrun) or ray (default: %(default)s)",
    )
    parser.add_argument(
        "--engine-workers",
        type=positive,
        metavar="N",
        help="actors of --engine ray; default: one for each GPU of the cluster, else for each node",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--tokenizer", metavar="FILE", help=TOKENIZER_HELP)
    add_num_classes(parser)
    add_model(parser, "beit3_base_patch16_384_retrieval", tokenizer=False)


def _run(arguments: argparse.Namespace) -> int:
    from beit3_fast.data import Processor
    from beit3_fast.embed import ENGINES, FORMATS, KINDS, OUTPUTS, embed_dataset
    from beit3_fast.torchrun import rank_here

    check_model_name(arguments.model)
    # before the checkpoint is read, which takes longest
    for option, given, known in (
        ("--kind", arguments.kind, KINDS),
        ("--output", arguments.output, OUTPUTS),
        ("--format", arguments.format, FORMATS),
        ("--engine", arguments.engine, ENGINES),
    ):
        if given not in known:
            raise ConfigError(f"{option} must be one of {', '.join(known)}, got {given!r}")
    arguments.device = _device(arguments.device)
    model = make_model(arguments)
    done = embed_dataset(
        model,
        arguments.sources,
        arguments.out,
        arguments.kind,
        arguments.output,
        processor=Processor.for_model(model, arguments.tokenizer),
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        workers=arguments.workers,
        progress=not arguments.quiet,
        format=arguments.format,
        engine=arguments.engine,
        engine_workers=arguments.engine_workers,
    )
    if rank_here():
        return 0
    report = {
        "folder": arguments.out,
        "shards": len(done.shards),
        "embedded": done.embedded,
        "skipped": done.skipped,
        "unread": done.unread,
        "resumed": done.resumed,
    }
    line = f"{arguments.out}: {done.embedded} embeddings in {len(done.shards)} shards, {done.skipped} items skipped"
    if done.unread:
        line += f" ({done.unread} of them not read for an error of the system; the same call tries again)"
    if done.resumed:
        line += f", {done.resumed} done before"
    return show(arguments, [report], [line])


def _device(name: str) -> str:
    """Under torchrun every process has a GPU of its own, unless one is named."""
    from beit3_fast.torchrun import started_by_torchrun

    if name == "cuda" and started_by_torchrun():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


EMBED = Command(
    summary="Embed folders, tar shards and index files of images, texts or pairs; goes on where it stopped.",
    example="beit3-fast embed photos/ --out embeddings/ --model beit3_base_patch16_384_retrieval "
    "--checkpoint beit3_base_patch16_384_coco_retrieval.pth",
    arguments=_arguments,
    run=_run,
)
