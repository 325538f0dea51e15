"""``beit3-fast info``: what this installation runs on, and which models it knows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from beit3_fast.cli.command import Command, print_json, version_of


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _info(arguments: argparse.Namespace) -> int:
    report = environment() | {"models": _probe(_models)}
    if arguments.json:
        print_json(report)
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
        "packages": {name: _probe(partial(version_of, name)) for name in _PACKAGES},
        "cpu_features": _probe(_cpu_features),
        "compiled_ops": _probe(_library_status),
        "cpu_level": _probe(_cpu_level),
        "cuda_kernels": _probe(_cuda_kernels),
        "auto": _probe(_choices),
        "gpu": _probe(_gpu),
    }


def _probe(question: Callable[[], Any]) -> Any:
    # a broken installation is what people run `info` for: whatever goes wrong is part of the answer
    try:
        return question()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _cpu_features() -> list[str]:
    from beit3_fast.ops import library

    return [name for name, present in library.cpu_features().items() if present]


def _library_status() -> str:
    from beit3_fast.ops import library

    return library.load().describe()


def _cpu_level() -> str:
    from beit3_fast.ops import library

    return library.cpu_isa()


def _cuda_kernels() -> str:
    from beit3_fast.ops import cuda_kernels, library

    built = library.cuda_architectures()
    if not built:
        return f"none: the library {library.why_without_cuda()}"
    names = ", ".join(f"sm_{arch}" for arch in built)
    reason = cuda_kernels.why_unavailable("cuda")
    return f"for {names}" if reason is None else f"for {names}; not in use, for each {reason}"


def _choices() -> dict[str, str]:
    import torch

    from beit3_fast.ops import dispatch

    choices = {}
    for op in dispatch.OPS:
        for dtype in (torch.float32, torch.bfloat16):
            at = dispatch.Situation(op, "cpu", dtype, False, False, False, False)
            choices[f"{op} on cpu in {str(dtype)[6:]}"] = dispatch.choose(at, "auto").impl
    return choices


def _models() -> list[str]:
    from beit3_fast.model import list_models

    return list_models()


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


INFO = Command(
    summary="Show versions, processor features, which implementations are in use, and the names of the models.",
    example="beit3-fast info --json",
    arguments=_info_arguments,
    run=_info,
)
