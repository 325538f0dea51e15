"""Options that the commands with a model share: which model, where it runs, which images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from beit3_fast.cli.command import complain, print_json
from beit3_fast.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from beit3_fast.train.processes import Processes

_MOST = 2**31 - 1
TOKENIZER_HELP = "the official beit3.spm; texts are cut behind 64 tokens"


def add_model(parser: argparse.ArgumentParser, example: str, *, tokenizer: bool) -> None:
    """--model, --checkpoint, --tokenizer, --batch-size, and those of ``add_runtime``."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="NAME", help=f"such as {example}")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="an official .pth, or .safetensors",
    )
    if tokenizer:
        group.add_argument(
            "--tokenizer",
            required=True,
            metavar="FILE",
            help=TOKENIZER_HELP,
        )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="inputs at a time (default: %(default)s)",
    )
    add_runtime(group)


def run_options(parser: argparse.ArgumentParser, example: str, options: Callable[[], str]) -> None:
    """--config, --out, --quiet, --json and --options, what ``options`` says: what the commands that train share."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help=f"the recipe, see {example}"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="where the run goes on, if it was begun there",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print one JSON document")

    class Show(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
            print(options())
            parser.exit()

    parser.add_argument(
        "--options", action=Show, nargs=0, help="every option of a recipe and its default"
    )


def on_processes(
    work: Callable[[argparse.Namespace, Processes], int],
) -> Callable[[argparse.Namespace], int]:
    """A command that torchrun may start on several processes."""

    def run(arguments: argparse.Namespace) -> int:
        from beit3_fast.train.processes import joined

        with joined() as processes:
            return work(arguments, processes)

    return run


def add_num_classes(parser: argparse.ArgumentParser) -> None:
    """--num-classes."""
    parser.add_argument(
        "--num-classes",
        type=positive,
        metavar="N",
        help="of the head, where they are not the released ones",
    )


def add_runtime(group: argparse._ActionsContainer) -> None:
    """--device, --dtype, --impl, --json."""
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    group.add_argument(
        "--dtype", default="float32", help="or bfloat16, float16, int8 (CPU), float8"
    )
    group.add_argument("--impl", default="auto", help="or composite, cpu, triton, cuda, reference")
    group.add_argument("--json", action="store_true", help="print one JSON document")


def load_model(arguments: argparse.Namespace, needs: str, use: str) -> tuple[Any, Any]:
    """The model and its processor. Raises ConfigError unless the model has the method or attribute ``needs``."""
    from beit3_fast.data import Processor

    check_model_name(arguments.model)
    kind = arguments.model.rpartition("_")[2]
    if kind != needs:
        raise ConfigError(
            f"{use} needs a model whose name ends in _{needs}, got {arguments.model}; beit3-fast info lists them"
        )
    model = make_model(arguments)
    return model, Processor.for_model(model, getattr(arguments, "tokenizer", None))


def make_model(arguments: argparse.Namespace) -> Any:
    """The model that the options name, for inference."""
    from beit3_fast.checkpoint import CheckpointMismatch
    from beit3_fast.model import create_model

    classes = _classes(arguments)
    try:
        return create_model(
            arguments.model,
            arguments.checkpoint,
            arguments.device,
            arguments.dtype,
            arguments.impl,
            inference_only=True,
            **classes,
        )
    except CheckpointMismatch as error:
        if getattr(arguments, "names", None) is None or not error.is_of_heads:
            raise
        raise CheckpointError(
            f"{error.what}; the label file names {classes['num_classes']} classes: is it the one that the model was trained with?"
        ) from error


def _classes(arguments: argparse.Namespace) -> dict[str, int]:
    """The number of classes, where a label file or --num-classes says that it is not the released one."""
    names, count = (getattr(arguments, name, None) for name in ("names", "num_classes"))
    if names is not None:
        count = len(names)
    return {} if count is None else {"num_classes": count}


def check_model_name(name: str) -> None:
    """Raises ConfigError, with the nearest names, for a model that does not exist."""
    from beit3_fast.model import list_models

    if name not in list_models():
        import difflib

        near = difflib.get_close_matches(name, list_models(), n=3)
        raise ConfigError(
            f"unknown model {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else "beit3-fast info lists them")
        )


def image_paths(arguments: Sequence[str]) -> list[str]:
    """The files that are named, and the image files of folders, sorted. Raises InputError for an empty folder."""
    from beit3_fast.data.image_files import images_of_folder

    paths: list[str] = []
    for argument in arguments:
        paths += images_of_folder(argument) if os.path.isdir(argument) else [argument]
    return paths


# For a command whose images are read by ``of_each``.
IMAGES_HELP = "files, or folders of images; one that cannot be used is named and left out, and the exit code is 1"


def of_each(
    arguments: argparse.Namespace,
    paths: list[str],
    call: Callable[[list[str], int], Sequence[Any]],
) -> list[tuple[str, Any]]:
    """Each path and what ``call`` makes of it, --batch-size of them at a time; the second argument is the first one's number.

    Images that cannot be used are named on stderr and left out.
    """
    found: list[tuple[str, Any]] = []
    for start in range(0, len(paths), arguments.batch_size):
        own = paths[start : start + arguments.batch_size]
        try:
            found += zip(own, call(own, start), strict=True)
        except InputError:
            for place, path in enumerate(own, start):
                try:
                    found += zip([path], call([path], place), strict=True)
                except InputError as error:
                    complain(arguments.command, f"skipped {path}: {error}")
    return found


def positive(text: str) -> int:
    """A positive integer that any tensor's size may be, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to {_MOST}, got {text!r:.40}")
    return value


def show(
    arguments: argparse.Namespace,
    report: list[dict[str, Any]],
    lines: list[str],
    missing: int = 0,
) -> int:
    """Print one JSON document or the lines for people, and return the exit code, 1 where ``missing`` images are not in it.

    Nothing is printed where all are missing.
    """
    if missing and not report:
        return 1
    if arguments.json:
        print_json(report)
    else:
        print("\n".join(lines))
    return 1 if missing else 0


def show_run(arguments: argparse.Namespace, report: dict[str, Any], lines: list[str]) -> int:
    """Print what a run did as one line of JSON or the lines for people, and return 0."""
    if arguments.json:
        print_json(report, indent=None)
    else:
        print("\n".join(lines))
    return 0


def guesses(found: Sequence[Any]) -> list[dict[str, Any]]:
    """Guesses as JSON objects."""
    return [guess._asdict() for guess in found]


def guess_lines(found: Sequence[Any]) -> list[str]:
    """Guesses for people, one a line."""
    return [
        f"  {guess.score:.3f}  {guess.class_id if guess.label is None else guess.label}"
        for guess in found
    ]
