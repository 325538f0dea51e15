"""``beit3-fast train-tokenizer``: a visual tokenizer as a recipe says, and ``beit3-fast tokenize-images``: codes by one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from beit3_fast.cli.command import Command
from beit3_fast.cli.options import on_processes, positive, run_options, show_run

if TYPE_CHECKING:
    from beit3_fast.train.processes import Processes


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    run_options(parser, "examples/tokenizer_world.toml", _options)


def _options() -> str:
    from beit3_fast.model.visual_tokenizer import VisualTokenizerConfig
    from beit3_fast.train.option_text import option_text
    from beit3_fast.train.tokenizer_recipe import SECTIONS, TokenizerRecipe

    return option_text(TokenizerRecipe, VisualTokenizerConfig, SECTIONS)


def _train_tokenizer(arguments: argparse.Namespace, processes: Processes) -> int:
    from beit3_fast.train import train
    from beit3_fast.train.parallel import read_again
    from beit3_fast.train.report import run_facts, write_report
    from beit3_fast.train.tokenizer_recipe import read_tokenizer_recipe
    from beit3_fast.train.tokenizer_score import score_tokenizer

    recipe, out = read_tokenizer_recipe(arguments.config), Path(arguments.out)
    teacher = recipe.make_teacher()
    tokenizer = recipe.make_tokenizer(teacher)
    data, held_out = recipe.make_data(tokenizer), recipe.make_held_out(tokenizer)
    done = train(
        tokenizer,
        data,
        recipe.make_objective(teacher),
        recipe.train,
        out,
        start=processes.lead(recipe.start),
        progress=not arguments.quiet,
    )
    if not processes.leads:
        return 0
    tokenizer = read_again(tokenizer, lambda: recipe.make_tokenizer(teacher), out, done, processes)
    report = run_facts(out, done)
    lines = [f"{out}: {done.said}"]
    if not done.complete:
        lines[0] += f" of {recipe.train.steps}; the same call goes on"
    elif held_out is not None and recipe.held_out is not None:
        score = score_tokenizer(tokenizer, teacher, held_out, recipe.held_out.batches)
        report["held_out"] = score._asdict()
        lines.append(
            f"held out: cosine to the teacher {score.cosine:.3f} (its mean alone: {score.mean_cosine:.3f}), "
            f"{score.used:.1%} of the codes used, perplexity {score.perplexity:.1f}"
        )
    if done.complete:
        write_report(out, report)
    return show_run(arguments, report, lines)


def _tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="images, folders of them, .jsonl indices in the official form",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a pretraining recipe: its images, [codes] tokenizer and cache, where no others are named",
    )
    parser.add_argument("--out", metavar="FILE", help="such as codes.safetensors")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="a published vqkd_....pth, or model.safetensors of train-tokenizer",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="its published name; default: as the file says"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="images at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode images"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _what_to_tokenize(arguments: argparse.Namespace) -> tuple[list[str | Path], Path, Path]:
    """Sources, checkpoint and output of the command line, or of the recipe. Raises ConfigError where one is in neither."""
    from beit3_fast.errors import ConfigError

    sources: list[str | Path] = list(arguments.sources)
    checkpoint, out = arguments.checkpoint, arguments.out
    if arguments.config is not None:
        from beit3_fast.train import read_recipe

        recipe = read_recipe(arguments.config)
        own, folder = recipe.data.under(recipe.folder), recipe.folder
        sources = sources or [*own["image"], *own["pair"]]
        if checkpoint is None and recipe.codes.tokenizer is not None:
            checkpoint = folder / recipe.codes.tokenizer
        if out is None and recipe.codes.cache is not None:
            out = folder / recipe.codes.cache
    for what, value in (
        ("SOURCE ([data] image or pair of a recipe)", sources),
        ("--checkpoint ([codes] tokenizer)", checkpoint),
        ("--out ([codes] cache)", out),
    ):
        if not value:
            raise ConfigError(f"expected {what}, or a --config that names it; got neither")
    return sources, Path(checkpoint), Path(out)


def _tokenize(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from beit3_fast.model.visual_tokenizer import create_visual_tokenizer
    from beit3_fast.train.tokenize_images import tokenize_images

    sources, checkpoint, out = _what_to_tokenize(arguments)
    tokenizer = create_visual_tokenizer(arguments.model, checkpoint, arguments.device)
    done = tokenize_images(
        tokenizer,
        sources,
        out,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    report = {"file": str(out), **asdict(done), "num_codes": tokenizer.config.num_codes}
    line = (
        f"{out}: codes of {done.images} images, {done.skipped} skipped; "
        f"{done.used} of {tokenizer.config.num_codes} codes used"
    )
    if done.resumed:
        line += f"; {done.resumed} done before"
    return show_run(arguments, report, [line])


TRAIN_TOKENIZER = Command(
    summary="Train a visual tokenizer (VQ-KD) against a teacher; goes on where it stopped.",
    example="beit3-fast train-tokenizer --config examples/tokenizer_world.toml --out tokenizer/",
    arguments=_train_arguments,
    run=on_processes(_train_tokenizer),
)

TOKENIZE_IMAGES = Command(
    summary="Write the visual tokens of images into one file, for pretraining; goes on where it stopped.",
    example="beit3-fast tokenize-images photos/ --out codes.safetensors "
    "--checkpoint vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth",
    arguments=_tokenize_arguments,
    run=_tokenize,
)
