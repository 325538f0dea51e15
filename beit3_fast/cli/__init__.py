"""The command ``beit3-fast``: one entry in ``COMMANDS`` for each subcommand.

Exit codes: 0 done, 1 it could not be done (one line on stderr says why and how to mend it) or not for all images (a line
for each of the others), 2 wrong usage (one line too), 3 what ``verify`` compared is not the same.
"""

from __future__ import annotations

import argparse
import codecs
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from beit3_fast.cli.answer import ANSWER, REASON
from beit3_fast.cli.bench import BENCH
from beit3_fast.cli.caption import CAPTION
from beit3_fast.cli.classify import CLASSIFY
from beit3_fast.cli.command import Command, complain, said_by, version_of
from beit3_fast.cli.convert import CONVERT
from beit3_fast.cli.embed import EMBED
from beit3_fast.cli.finetune import FINETUNE, REPORT
from beit3_fast.cli.info import INFO, environment
from beit3_fast.cli.pretrain import PRETRAIN, WORLD
from beit3_fast.cli.search import SEARCH
from beit3_fast.cli.tokenizer import TOKENIZE_IMAGES, TRAIN_TOKENIZER
from beit3_fast.cli.verify import VERIFY
from beit3_fast.errors import Beit3FastError

__all__ = ["COMMANDS", "Command", "environment", "main"]

COMMANDS = {
    "info": INFO,
    "bench": BENCH,
    "convert": CONVERT,
    "verify": VERIFY,
    "caption": CAPTION,
    "answer": ANSWER,
    "reason": REASON,
    "classify": CLASSIFY,
    "search": SEARCH,
    "embed": EMBED,
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "report": REPORT,
    "world": WORLD,
    "train-tokenizer": TRAIN_TOKENIZER,
    "tokenize-images": TOKENIZE_IMAGES,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code; usage errors and ``--help`` leave through SystemExit."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        named = f"{parser.prog} {arguments.command}"
        wrong = [own for own in unknown if own.startswith("-")]
        why = "no such option" if wrong else "too many arguments, or not in one place"
        parser.exit(2, f"{named}: {why}: {' '.join(wrong or unknown)}; see {named} --help\n")
    _escape_what_cannot_be_printed()
    try:
        code = COMMANDS[arguments.command].run(arguments)
        print(end="", flush=True)
        return code
    except Beit3FastError as error:
        return _failed(arguments, said_by(error, arguments))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _failed(
            arguments,
            "there is not enough memory for this; lower --batch-size, or take a smaller model",
        )
    except KeyboardInterrupt:
        complain(arguments.command, "interrupted")
        return 130
    except BrokenPipeError:
        # whoever read our output has seen enough; without this Python complains once more while it shuts down
        sys.stdout = None
        return 1
    except OSError as error:
        return _failed(arguments, _of_the_system(error))


def _failed(arguments: argparse.Namespace, why: str) -> int:
    complain(arguments.command, why)
    return 1


def _of_the_system(error: OSError) -> str:
    """What went wrong with which file, and how to go on; output that cannot be written is given up."""
    from beit3_fast.checkpoint.atomic import mend

    try:
        print(end="", flush=True)
    except OSError:
        # as for a closed pipe
        sys.stdout = None
    name = "" if error.filename is None else f": {error.filename!r}"
    return f"{error.strerror or error}{name}{mend(error)}"


def _escape_what_cannot_be_printed() -> None:
    """Letters that the encoding of stdout has not are no error; file names in UTF-8 stay byte for byte, where they do."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        return
    escapes = (
        {"strict"} if codecs.lookup(out.encoding).name == "utf-8" else {"strict", "surrogateescape"}
    )
    if out.errors in escapes:
        out.reconfigure(errors="backslashreplace")


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch says it by class on a GPU, and by its words on a CPU."""
    words = ("allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(own in str(error) for own in words)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="beit3-fast",
        description="BEiT-3, fast: captions, answers, classes, search and embeddings; pretraining; checkpoint files; what this machine can do.",
        epilog="beit3-fast COMMAND --help shows the options of a command and an example.",
    )
    parser.add_argument(
        "--version", action="version", version=version_of("beit3-fast") or "unknown"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(subparser)
    return parser
