"""``beit3-fast verify``: a checkpoint held against torchscale, and the GPU kernels against the formula."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from beit3_fast.cli.command import Command, print_json
from beit3_fast.cli.options import add_num_classes, add_runtime, check_model_name, positive

if TYPE_CHECKING:
    from beit3_fast.integrations.verification import Comparison, Verification


# 1 is that nothing could be compared, as for every command.
_DIFFERS = 3


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="run this file here and on torchscale, which must be installed, and compare the outputs",
    )
    what.add_argument(
        "--kernels",
        action="store_true",
        help="run every Triton and CUDA kernel on small shapes, hold it against the formula in fp64, and keep what came of it",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="of the checkpoint, such as beit3_base_patch16_384_retrieval; what save_checkpoint or convert --name wrote holds it",
    )
    add_num_classes(parser)
    parser.add_argument(
        "--samples",
        type=positive,
        default=4,
        metavar="N",
        help="images and texts of the comparison (default: %(default)s)",
    )
    add_runtime(parser)


def _verify(arguments: argparse.Namespace) -> int:
    return _kernels(arguments) if arguments.kernels else _checkpoint(arguments)


def _checkpoint(arguments: argparse.Namespace) -> int:
    from beit3_fast.integrations.verification import verify_checkpoint

    if arguments.model is not None:
        check_model_name(arguments.model)
    found = verify_checkpoint(
        arguments.checkpoint,
        arguments.model,
        arguments.device,
        arguments.dtype,
        arguments.impl,
        num_classes=arguments.num_classes,
        samples=arguments.samples,
    )
    if arguments.json:
        report = {
            "schema": 1,
            "passed": found.passed,
            "checkpoint": arguments.checkpoint,
            "model": found.model,
            "device": arguments.device,
            "dtype": arguments.dtype,
            "impl": arguments.impl,
            "torchscale": found.torchscale,
            "weights": {
                "compared": found.weights,
                "changed": list(found.changed),
                "interpolated": list(found.interpolated),
            },
            "outputs": [_row(own) for own in found.comparisons],
        }
        print_json(report)
    else:
        print("\n".join(_lines(arguments, found)))
    return 0 if found.passed else _DIFFERS


def _row(own: Comparison) -> dict[str, Any]:
    figures = {"max_abs_limit": own.max_limit, "rel_rms_limit": own.rms_limit, **asdict(own.parity)}
    return {"output": own.output, **figures}


def _lines(arguments: argparse.Namespace, found: Verification) -> list[str]:
    lines = [
        f"{found.model} in {arguments.dtype} on {arguments.device}, against torchscale {found.torchscale}",
        f"weights: {found.weights - len(found.changed)} of {found.weights} are those of the file, bit for bit",
    ]
    if found.changed:
        lines.append(f"  others: {', '.join(found.changed[:5])}")
    if found.interpolated:
        lines.append(f"  interpolated to this image size: {', '.join(found.interpolated)}")
    for own in found.comparisons:
        figures = own.parity
        line = f"{own.output}: largest error {figures.max_abs:.1e} (limit {own.max_limit:.1e})"
        if own.rms_limit is None:
            line += f", relative rms error {figures.rel_rms:.1e}"
        else:
            line += (
                f", relative rms error {figures.rel_rms:.1e} (limit {own.rms_limit:.1e}; torchscale's own "
                f"{figures.baseline_rel_rms:.1e})"
            )
        lines.append(line if figures.passed else f"{line}: WRONG: {figures.reason}")
    said = (
        "the same up to rounding"
        if found.passed
        else "NOT the same; please report the output with --json"
    )
    return [*lines, f"verdict: {said}"]


def _kernels(arguments: argparse.Namespace) -> int:
    import torch

    from beit3_fast.errors import KernelUnavailable
    from beit3_fast.ops import cuda_kernels, kernel_check, triton_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = {
        "Triton": triton_kernels.why_unavailable(device),
        "CUDA": cuda_kernels.why_unavailable(device),
    }
    if None not in reasons.values():
        each = "; ".join(f"{name}: each {reason}" for name, reason in reasons.items())
        raise KernelUnavailable(f"no kernel can be verified ({each})")
    outcomes = kernel_check.verify(device)
    passed = all(own.parity.passed for own in outcomes)
    if arguments.json:
        report: dict[str, Any] = {
            "schema": 1,
            "passed": passed,
            "device": device,
            "machine": kernel_check.identity(),
            "not_run": {name: reason for name, reason in reasons.items() if reason is not None},
            "checks": [
                {"kernel": own.kernel, "dtype": own.dtype, "seconds": own.seconds}
                | asdict(own.parity)
                for own in outcomes
            ],
        }
        print_json(report)
    else:
        for own in outcomes:
            said = "right" if own.parity.passed else f"WRONG: {own.parity.reason}"
            print(f"{own.kernel} in {own.dtype}: {said} ({own.seconds:.1f} s)")
        for name, reason in reasons.items():
            if reason is not None and device == "cuda":
                print(f"no {name} kernel was run: each {reason}")
        if device == "cpu":
            print("in Triton's interpreter, whose outcome is not kept: it says nothing of a GPU")
        elif not passed:
            print("'auto' does without what is wrong; please report the output with --json")
    return 0 if passed else _DIFFERS


VERIFY = Command(
    summary="Compare a checkpoint with torchscale on this machine, or with --kernels the GPU kernels with the formula; exit code 3 "
    "where they are not the same.",
    example="beit3-fast verify beit3_base_patch16_384_coco_retrieval.pth --model beit3_base_patch16_384_retrieval",
    arguments=_verify_arguments,
    run=_verify,
)
