"""``beit3-fast convert``: checkpoints from one form to the other."""

from __future__ import annotations

import argparse
from typing import Any

from beit3_fast.cli.command import Command, said_in_options
from beit3_fast.cli.options import add_num_classes, check_model_name, show
from beit3_fast.errors import ConfigError


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
    add_num_classes(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _convert(arguments: argparse.Namespace) -> int:
    from beit3_fast.checkpoint import convert_checkpoint

    preset = None
    if arguments.preset is not None:
        from beit3_fast.data.presets import ImagePreset

        preset = ImagePreset.get(arguments.preset)
    if arguments.num_classes is not None and arguments.name is None:
        raise ConfigError("--num-classes goes with --name")
    model = None if arguments.name is None else _empty_model(arguments)
    with said_in_options({"overwrite=True": "--force"}):
        done = convert_checkpoint(
            arguments.source,
            arguments.target,
            model=model,
            preset=preset,
            key=arguments.key,
            overwrite=arguments.force,
        )
    report = {
        "target": str(done.target),
        "tensors": done.tensors,
        "bytes": done.nbytes,
        "left_out": list(done.left_out),
        "remarks": list(done.remarks),
    }
    lines = [
        f"{done.target}: {done.tensors} tensors, {done.nbytes / 2**20:.1f} MiB, read back and equal"
    ]
    if done.left_out:
        lines.append(f"left out, since they are no weights: {', '.join(done.left_out)}")
    lines += [f"{done.source}: {remark}" for remark in done.remarks]
    return show(arguments, [report], lines)


def _empty_model(arguments: argparse.Namespace) -> Any:
    """The model without memory: names, shapes and configuration are all that is needed."""
    import torch

    from beit3_fast.model import create_model

    check_model_name(arguments.name)
    with torch.device("meta"):
        return create_model(arguments.name, device="meta", num_classes=arguments.num_classes)


CONVERT = Command(
    summary="Convert a checkpoint between .pth and .safetensors, bit for bit.",
    example="beit3-fast convert beit3_base_patch16_384_coco_retrieval.pth retrieval.safetensors "
    "--name beit3_base_patch16_384_retrieval",
    arguments=_convert_arguments,
    run=_convert,
)
