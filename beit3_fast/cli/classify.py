"""``beit3-fast classify``: the classes that a model was trained for, or any that one names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from beit3_fast.cli.command import Command
from beit3_fast.cli.options import (
    IMAGES_HELP,
    add_model,
    guess_lines,
    guesses,
    image_paths,
    load_model,
    of_each,
    positive,
    show,
)
from beit3_fast.errors import ConfigError

if TYPE_CHECKING:
    from beit3_fast.model.guess import Guess


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=IMAGES_HELP)
    parser.add_argument(
        "--labels", metavar="FILE", help="the names of the classes, one a line in their order"
    )
    parser.add_argument(
        "--label",
        action="append",
        metavar="NAME",
        help="a class by its name, for a retrieval model; give it several times",
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="a sentence with {} for the name (default: 'a photo of a {}.')",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="the official beit3.spm, for --label")
    parser.add_argument(
        "--top-k", type=positive, default=5, metavar="N", help="default: %(default)s"
    )
    add_model(parser, "beit3_base_patch16_224_imageclassification", tokenizer=False)


def _run(arguments: argparse.Namespace) -> int:
    paths = image_paths(arguments.images)
    classify = _by_name(arguments) if arguments.label else _by_class(arguments)
    pairs = of_each(arguments, paths, lambda own, _: classify(own))
    report = [{"image": path, "classes": guesses(own)} for path, own in pairs]
    lines = [line for path, own in pairs for line in (f"{path}:", *guess_lines(own))]
    return show(arguments, report, lines, len(paths) - len(pairs))


def _by_class(arguments: argparse.Namespace) -> Callable[[list[str]], list[list[Guess]]]:
    from beit3_fast.data import read_labels

    if arguments.template or arguments.tokenizer:
        raise ConfigError("--template and --tokenizer go with --label; name the classes")
    if arguments.labels:
        arguments.names = read_labels(arguments.labels)
    model, processor = load_model(
        arguments, "imageclassification", "classify without --label (zero-shot)"
    )
    return partial(
        model.classify,
        top_k=arguments.top_k,
        labels=getattr(arguments, "names", None),
        processor=processor,
        batch_size=arguments.batch_size,
    )


def _by_name(arguments: argparse.Namespace) -> Callable[[list[str]], list[list[Guess]]]:
    from beit3_fast.retrieval import zero_shot_classifier
    from beit3_fast.retrieval.zero_shot import TEMPLATES

    if arguments.labels:
        raise ConfigError("--labels names the classes of a classifier, --label classes of your own")
    if not arguments.tokenizer:
        raise ConfigError("--label needs --tokenizer beit3.spm")
    model, processor = load_model(arguments, "retrieval", "classify with --label")
    classify = zero_shot_classifier(
        model, arguments.label, arguments.template or TEMPLATES, processor=processor
    )
    return partial(classify, top_k=arguments.top_k, batch_size=arguments.batch_size)


CLASSIFY = Command(
    summary="Name the classes of images: those of a classifier, or with --label any of your own.",
    example="beit3-fast classify photo.jpg --label cat --label dog --model beit3_base_patch16_224_retrieval "
    "--checkpoint beit3_base_itc_patch16_224.pth --tokenizer beit3.spm",
    arguments=_arguments,
    run=_run,
)
