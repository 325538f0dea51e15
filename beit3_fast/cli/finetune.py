"""``beit3-fast finetune``: a downstream task as a recipe says, and ``beit3-fast report``: a page about several runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit3_fast.cli.command import Command
from beit3_fast.cli.options import on_processes, run_options, show_run

if TYPE_CHECKING:
    from beit3_fast.train.processes import Processes


def _arguments(parser: argparse.ArgumentParser) -> None:
    run_options(parser, "examples/finetune_world_vqa.toml", _options)
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="without the recipe's checkpoint, to see what pretraining is worth",
    )


def _options() -> str:
    from beit3_fast.config import BEiT3Config
    from beit3_fast.train.downstream import DOWNSTREAM
    from beit3_fast.train.finetune import SECTIONS, FineTuning
    from beit3_fast.train.option_text import option_text

    losses = {f"loss, of _{name}": own.objective for name, own in DOWNSTREAM.items()}
    return option_text(FineTuning, BEiT3Config, {**SECTIONS, **losses})


def _finetune(arguments: argparse.Namespace, processes: Processes) -> int:
    from beit3_fast.train import read_finetuning, train
    from beit3_fast.train.parallel import read_again
    from beit3_fast.train.report import run_facts, write_report

    recipe, out = read_finetuning(arguments.config), Path(arguments.out)
    if arguments.from_scratch:
        recipe = recipe.from_scratch()
    model, loaded = recipe.make_model()
    begun = "from scratch"
    if loaded is not None:
        new = sorted({*loaded.missing, *loaded.mismatched})
        begun = f"from {loaded.source}; begins anew: {', '.join(new) or 'nothing'}"
    data, held_out = recipe.make_data(model), recipe.make_held_out(model)
    options = recipe.options(data)
    start, shown = processes.lead(recipe.start), not arguments.quiet
    done = train(model, data, recipe.loss, options, out, start=start, progress=shown)
    if not processes.leads:
        return 0
    model = read_again(model, lambda: recipe.make_model()[0], out, done, processes)
    report: dict[str, Any] = {**run_facts(out, done), "begun": begun}
    lines = [f"{out}: {done.said}, {begun}"]
    if not done.complete:
        lines[0] += f"; {options.steps} are to do, the same call goes on"
    else:
        examples = []
        if held_out is not None:
            report["held_out"] = recipe.task.score(model, held_out)
            examples = recipe.task.examples(model, held_out, recipe.labels())
            lines += [f"{name}: {value:.1%}" for name, value in report["held_out"].items()]
        write_report(out, report, examples)
    return show_run(arguments, report, lines)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="FOLDER", nargs="+", help="of pretrain and finetune")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, report.html")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _report(arguments: argparse.Namespace) -> int:
    from beit3_fast.train.report import write_page

    path = write_page(Path(arguments.out), [Path(run) for run in arguments.runs])
    report = {"page": str(path), "runs": arguments.runs}
    return show_run(arguments, report, [f"{path}: {len(arguments.runs)} runs"])


FINETUNE = Command(
    summary="Fine-tune for retrieval or question answering; goes on where it stopped.",
    example="beit3-fast finetune --config examples/finetune_world_vqa.toml --out vqa/",
    arguments=_arguments,
    run=on_processes(_finetune),
)

REPORT = Command(
    summary="One page about several runs: figures, learning curves, predictions as pictures.",
    example="beit3-fast report run/ vqa/ --out report.html",
    arguments=_report_arguments,
    run=_report,
)
