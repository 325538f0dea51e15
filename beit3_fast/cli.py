"""The command ``beit3-fast``: one entry in ``COMMANDS`` for each subcommand.

Exit codes: 0 done, 1 it could not be done (one line on stderr says why and how to mend it), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from beit3_fast.errors import Beit3FastError, ConfigError


@dataclass(frozen=True)
class Command:
    """A subcommand: ``arguments`` adds its options to a parser, ``run`` does the work and returns the exit code."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code; usage errors and ``--help`` leave through SystemExit."""
    arguments = _parser().parse_args(argv)
    try:
        code = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
        return code
    except Beit3FastError as error:
        print(f"beit3-fast {arguments.command}: {_one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"beit3-fast {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output has seen enough; without this Python complains once more while it shuts down
        sys.stdout = None
        return 1


def _one_line(message: str) -> str:
    """A message of several lines as one; the listing of a file that fits nowhere is cut, its first words are kept."""
    parts = [part.strip() for part in message.splitlines()]
    room = 160 if len(message) > 1200 else len(message)
    return "; ".join(part if len(part) <= room else part[:room] + " ..." for part in parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beit3-fast",
        description="BEiT-3, fast: what this machine can do, and checkpoint files.",
        epilog="beit3-fast COMMAND --help shows the options of a command and an example.",
    )
    parser.add_argument("--version", action="version", version=_version("beit3-fast") or "unknown")
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


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _info(arguments: argparse.Namespace) -> int:
    report = environment()
    if arguments.json:
        import json

        print(json.dumps(report, indent=2))
        return 0
    for heading, value in report.items():
        if isinstance(value, dict):
            print(f"{heading}:")
            for key, item in value.items():
                print(f"  {key}: {'not installed' if item is None else item}")
        elif isinstance(value, list):
            print(f"{heading}: {', '.join(value) or 'none known'}")
        else:
            print(f"{heading}: {value}")
    return 0


_PACKAGES = (
    "beit3-fast",
    "torch",
    "numpy",
    "safetensors",
    "sentencepiece",
    "pillow",
    "triton",
    "torchscale",
    "timm",
)


def environment() -> dict[str, Any]:
    """What decides how fast and on what this installation runs. A probe that fails becomes its message."""
    import platform

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _probe(partial(_version, name)) for name in _PACKAGES},
        "cpu_features": _probe(_cpu_features),
        "compiled_ops": _probe(_library_status),
        "cpu_level": _probe(_cpu_level),
        "auto": _probe(_choices),
        "gpu": _probe(_gpu),
    }


def _probe(question: Callable[[], Any]) -> Any:
    # a broken installation is what people run `info` for: whatever goes wrong is part of the answer
    try:
        return question()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_features() -> list[str]:
    from beit3_fast.ops import library

    return [name for name, present in library.cpu_features().items() if present]


def _library_status() -> str:
    from beit3_fast.ops import library

    return library.load().describe()


def _cpu_level() -> str:
    from beit3_fast.ops import library

    return library.cpu_isa()


def _choices() -> dict[str, str]:
    import torch

    from beit3_fast.ops import dispatch

    choices = {}
    for op in dispatch.OPS:
        for dtype in (torch.float32, torch.bfloat16):
            at = dispatch.Situation(op, "cpu", dtype, False, False, False, False)
            choices[f"{op} on cpu in {str(dtype)[6:]}"] = dispatch.choose(at, "auto").impl
    return choices


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="IN", help="a .pth file under any name, or a .safetensors file"
    )
    parser.add_argument(
        "target",
        metavar="OUT",
        help="the file to write: .safetensors, or .pth in the official form",
    )
    parser.add_argument(
        "--name",
        metavar="MODEL",
        help="check that the weights fit this model, such as beit3_base_patch16_384_retrieval, "
        "and keep its name and configuration in the file",
    )
    parser.add_argument(
        "--preset",
        metavar="PRESET",
        help="keep how images are prepared in the file: square or imagenet",
    )
    parser.add_argument(
        "--key",
        help="the entry of IN that holds the weights, such as model_ema; found by itself without it",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _convert(arguments: argparse.Namespace) -> int:
    from beit3_fast.checkpoint import convert_checkpoint

    preset = None
    if arguments.preset is not None:
        from beit3_fast.data.presets import ImagePreset

        preset = ImagePreset.get(arguments.preset)
    model = None if arguments.name is None else _empty_model(arguments.name)
    done = convert_checkpoint(
        arguments.source,
        arguments.target,
        model=model,
        preset=preset,
        key=arguments.key,
        overwrite=arguments.force,
    )
    print(
        f"{done.target}: {done.tensors} tensors, {done.nbytes / 2**20:.1f} MiB, read back and equal"
    )
    if done.left_out:
        print(f"left out, since they are no weights: {', '.join(done.left_out)}")
    for remark in done.remarks:
        print(f"{done.source}: {remark}")
    return 0


def _empty_model(name: str) -> Any:
    """The model without memory: names, shapes and configuration are all that is needed."""
    import torch

    from beit3_fast.model import create_model, list_models

    if name not in list_models():
        import difflib

        near = difflib.get_close_matches(name, list_models(), n=3)
        raise ConfigError(
            f"unknown model {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else "see beit3_fast.list_models()")
        )
    with torch.device("meta"):
        return create_model(name, device="meta")


COMMANDS = {
    "info": Command(
        summary="Show versions, processor features and which implementations are in use.",
        example="beit3-fast info --json",
        arguments=_info_arguments,
        run=_info,
    ),
    "convert": Command(
        summary="Convert a checkpoint between .pth and .safetensors, bit for bit.",
        example="beit3-fast convert beit3_base_patch16_384_coco_retrieval.pth retrieval.safetensors "
        "--name beit3_base_patch16_384_retrieval",
        arguments=_convert_arguments,
        run=_convert,
    ),
}
