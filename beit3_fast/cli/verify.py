"""``beit3-fast verify``: whether the kernels of this machine's GPU are right."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from beit3_fast.cli.command import Command


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernels",
        action="store_true",
        required=True,
        help="run every Triton kernel on small shapes, hold it against the formula in fp64, and keep what came of it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from beit3_fast.errors import KernelUnavailable
    from beit3_fast.ops import kernel_check, triton_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = triton_kernels.why_unavailable(device)
    if reason is not None:
        raise KernelUnavailable(f"no Triton kernel can be verified: each {reason}")
    outcomes = kernel_check.verify(device)
    passed = all(own.parity.passed for own in outcomes)
    if arguments.json:
        import json

        report: dict[str, Any] = {
            "schema": 1,
            "passed": passed,
            "device": device,
            "machine": kernel_check.identity(),
            "checks": [
                {"kernel": own.kernel, "dtype": own.dtype, "seconds": own.seconds}
                | _without_nan(asdict(own.parity))
                for own in outcomes
            ],
        }
        print(json.dumps(report, indent=2))
    else:
        for own in outcomes:
            said = "right" if own.parity.passed else f"WRONG: {own.parity.reason}"
            print(f"{own.kernel} in {own.dtype}: {said} ({own.seconds:.1f} s)")
        if device == "cpu":
            print("in Triton's interpreter, whose outcome is not kept: it says nothing of a GPU")
        elif not passed:
            print("'auto' does without what is wrong; please report the output with --json")
    return 0 if passed else 1


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {key: None if value != value else value for key, value in values.items()}


VERIFY = Command(
    summary="Check the GPU kernels against the formula on this machine, and remember the outcome.",
    example="beit3-fast verify --kernels --json",
    arguments=_verify_arguments,
    run=_verify,
)
