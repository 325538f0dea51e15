"""``beit3-fast pretrain``: masked data modelling as a recipe says, and ``beit3-fast world``: something to learn from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from beit3_fast.cli.command import Command
from beit3_fast.cli.options import on_processes, positive, run_options, show_run

if TYPE_CHECKING:
    from beit3_fast.train.processes import Processes


def _arguments(parser: argparse.ArgumentParser) -> None:
    run_options(parser, "examples/pretrain_world.toml", _options)


def _options() -> str:
    from beit3_fast.config import BEiT3Config
    from beit3_fast.train.option_text import option_text
    from beit3_fast.train.recipe import SECTIONS, Recipe

    return option_text(Recipe, BEiT3Config, SECTIONS)


def _pretrain(arguments: argparse.Namespace, processes: Processes) -> int:
    from beit3_fast.train import evaluate, read_recipe, train
    from beit3_fast.train.examples import filled_in
    from beit3_fast.train.parallel import read_again
    from beit3_fast.train.report import run_facts, write_report

    recipe, out = read_recipe(arguments.config), Path(arguments.out)
    model = recipe.make_model()
    data = processes.lead_first(lambda: recipe.make_data(model, out))
    held_out = recipe.make_held_out(model, data)
    start, shown = processes.lead(recipe.start), not arguments.quiet
    done = train(model, data, recipe.loss, recipe.train, out, start=start, progress=shown)
    if not processes.leads:
        return 0
    model = read_again(model, recipe.make_model, out, done, processes)
    report = run_facts(out, done)
    lines = [f"{out}: {done.said}"]
    if not done.complete:
        lines[0] += f" of {recipe.train.steps}; the same call goes on"
    elif held_out is not None and recipe.held_out is not None:
        scores = evaluate(model, held_out, recipe.held_out.batches)
        report["held_out"] = {term: own._asdict() for term, own in scores.items()}
        lines += [
            f"{term}: {own.accuracy:.1%} of {own.predictions} right; the commonest token alone: {own.unigram:.1%}"
            for term, own in scores.items()
        ]
    if done.complete:
        write_report(out, report, [] if held_out is None else filled_in(model, held_out))
    return show_run(arguments, report, lines)


def _world_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--scenes", type=positive, default=2000, metavar="N", help="for training")
    parser.add_argument(
        "--held-out",
        type=positive,
        default=200,
        metavar="N",
        help="for validation, and for the test",
    )
    parser.add_argument(
        "--labelled",
        type=positive,
        metavar="N",
        help="so many scenes for training have captions and questions, the others only what pretraining needs (all)",
    )
    parser.add_argument("--texts", type=positive, default=4000, metavar="N")
    parser.add_argument("--pixels", type=positive, default=64, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--digits",
        action="store_true",
        help="scikit-learn's handwritten digits, too: real images with captions",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _draw(arguments: argparse.Namespace) -> int:
    from beit3_fast.data.world import WorldSize, write_digits, write_world

    size = WorldSize(
        train=arguments.scenes,
        val=arguments.held_out,
        test=arguments.held_out,
        texts=arguments.texts,
        pixels=arguments.pixels,
        labelled=arguments.labelled,
    )
    folder = write_world(arguments.folder, size, arguments.seed)
    scenes = size.train + size.val + size.test
    report = {"folder": str(folder), "scenes": scenes, "texts": size.texts}
    said = f"{folder}: {scenes} scenes"
    if arguments.digits:
        report["digits"] = write_digits(folder, size.pixels, arguments.seed)
        said += f", {report['digits']} handwritten digits"
    return show_run(arguments, report, [said])


PRETRAIN = Command(
    summary="Pretrain by masked data modelling on images, texts and pairs; goes on where it stopped.",
    example="beit3-fast pretrain --config examples/pretrain_world.toml --out run/",
    arguments=_arguments,
    run=on_processes(_pretrain),
)

WORLD = Command(
    summary="Draw a world of small scenes with captions, questions, statements, boxes and masks.",
    example="beit3-fast world world/ --scenes 2000",
    arguments=_world_arguments,
    run=_draw,
)
