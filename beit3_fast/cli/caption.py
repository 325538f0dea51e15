"""``beit3-fast caption``: sentences about images."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from beit3_fast.cli.command import Command, said_in_options
from beit3_fast.cli.options import (
    IMAGES_HELP,
    add_model,
    image_paths,
    load_model,
    of_each,
    positive,
    show,
)
from beit3_fast.errors import ConfigError

if TYPE_CHECKING:
    from beit3_fast.generate import Caption

_LENGTH_PENALTY = 0.6
# What the arguments of ``caption`` are called here.
_OPTIONS = {
    "num_beams": "--num-beams",
    "max_length": "--max-length",
    "length_penalty": "--length-penalty",
    "num_return_sequences": "--captions",
    "sample=True": "--sample",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "seed": "--seed",
    "compat=True": "--compat",
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=IMAGES_HELP)
    parser.add_argument("--num-beams", type=positive, metavar="N", help="default: 3; 1: greedy")
    parser.add_argument(
        "--max-length",
        type=positive,
        default=32,
        metavar="N",
        help="tokens at most, beginning and end included (default: %(default)s)",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help=f"from -10 to 10 (default: {_LENGTH_PENALTY})",
    )
    parser.add_argument(
        "--captions", type=positive, default=1, metavar="N", help="captions for each image"
    )
    parser.add_argument("--sample", action="store_true", help="draw words instead of searching")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X")
    parser.add_argument("--top-k", type=positive, metavar="N")
    parser.add_argument("--top-p", type=float, metavar="X")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="for --sample: draws the same words for the same images in the same order, --batch-size of them at a time",
    )
    parser.add_argument(
        "--compat", action="store_true", help="keep the habits of the released search"
    )
    parser.add_argument(
        "--stream", action="store_true", help="print the words of one image as they come"
    )
    add_model(parser, "beit3_base_patch16_480_captioning", tokenizer=True)


def _run(arguments: argparse.Namespace) -> int:
    paths = image_paths(arguments.images)
    if arguments.stream:
        return _stream(arguments, paths)
    model, processor = load_model(arguments, "captioning", "caption")
    beams = arguments.num_beams or (1 if arguments.sample else 3)
    given = arguments.length_penalty
    penalty = _LENGTH_PENALTY if given is None else given

    def call(own: list[str], first: int) -> list[list[Caption]]:
        # One seed for all batches would draw the same numbers in each.
        seed = arguments.seed
        if seed is not None and first:
            seed = (seed + first) % 2**63
        with said_in_options(_OPTIONS):
            return model.caption(
                own,
                beams,
                arguments.max_length,
                penalty,
                arguments.captions,
                processor=processor,
                **_choice_of_words(arguments),
                seed=seed,
                compat=arguments.compat,
                batch_size=arguments.batch_size,
            )

    found = of_each(arguments, paths, call)
    report = [
        {"image": path, "captions": [asdict(caption) for caption in own]} for path, own in found
    ]
    lines = [f"{path}: {caption.text}" for path, own in found for caption in own]
    return show(arguments, report, lines, len(paths) - len(found))


def _choice_of_words(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("sample", "temperature", "top_k", "top_p")
    return {name: getattr(arguments, name) for name in names}


def _stream(arguments: argparse.Namespace, paths: list[str]) -> int:
    unused = {
        "--num-beams": arguments.num_beams not in (None, 1),
        "--captions": arguments.captions != 1,
        "--length-penalty": arguments.length_penalty is not None,
        "--compat": arguments.compat,
        "--json": arguments.json,
    }
    wrong = [name for name, given in unused.items() if given]
    if wrong or len(paths) != 1:
        raise ConfigError(
            f"--stream writes one caption of one image word by word; leave out {', '.join(wrong)}"
            if wrong
            else f"--stream takes one image, got {len(paths)}"
        )
    model, processor = load_model(arguments, "captioning", "caption")
    with said_in_options(_OPTIONS):
        steps = model.stream_caption(
            paths[0],
            arguments.max_length,
            processor=processor,
            **_choice_of_words(arguments),
            seed=arguments.seed,
        )
    for step in steps:
        print(step.text, end="", flush=True)
    print()
    return 0


CAPTION = Command(
    summary="Describe images in a sentence each.",
    example="beit3-fast caption photo.jpg --model beit3_base_patch16_480_captioning "
    "--checkpoint beit3_base_patch16_480_coco_captioning.pth --tokenizer beit3.spm",
    arguments=_arguments,
    run=_run,
)
