"""The runtimes that are compared: one entry of RUNTIMES each.

A runtime is something that a user could run instead. One that cannot run here, or that runs only where
asked, stays in the report as a named row with the reason. Every runtime gets the same random weights in
the official layout, and takes the official forward arguments.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import beit3_fast
from beit3_fast.errors import ConfigError
from beit3_fast.model.registry import for_inference, to_float8, to_int8
from beit3_fast.ops import cuda_kernels, library
from bench import baselines_onnxruntime, baselines_openvino, baselines_torch
from bench.conversion import load, load_torchscale
from bench.runtime import Build, Runtime, Weights, float8_parity, int8_parity
from bench.torchscale_heads import MODELS, import_torchscale
from bench.workloads import Workload

OURS = "beit3_fast"
REFERENCE = "torchscale"


def build_reference(workload: Workload) -> nn.Module:
    """torchscale's model of the workload in fp32, with the benchmark's random weights."""
    model: nn.Module = MODELS[workload.task.model](workload.config)
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, each from a seed of its own name, so that the order of the parameters is no matter.

    Trained models have attention that chooses, LayerNorms that are not the identity and biases that are
    not zero, and so have these; the official initialisation would leave mistakes in all three unseen.
    """
    for name, parameter in model.named_parameters():
        seed = zlib.crc32(name.removeprefix("beit3.").encode())
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("logit_scale"):
            parameter.fill_(2.6593)
        elif parameter.ndim == 1:
            centre = 1.0 if name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.1 * noise)
        elif "embed" in name and "proj" not in name:
            parameter.copy_(0.5 * noise)
        else:
            gain = 1.4 if "q_proj" in name or "k_proj" in name else 0.6
            parameter.copy_(noise * (gain / parameter[0].numel() ** 0.5))


def our_entrypoint(workload: Workload) -> str:
    """The name under which `beit3_fast.create_model` knows the workload's model, at any resolution.

    Raises:
        ConfigError: there is no such model.
    """
    task = workload.task.model
    ending = "" if task == "backbone" else f"_{task}"
    start = f"beit3_{workload.size}_patch{workload.config.patch_size}_"
    middles = [str(workload.pixels), "224", "384", "480", "768", "32"]
    known = set(beit3_fast.list_models())
    for name in (f"{start}{middle}{ending}" for middle in middles):
        if name in known:
            return name
    raise ConfigError(f"beit3_fast has no model for {workload.name}; it has {sorted(known)}")


def _build_ours(impl: str, rounds: Callable[..., Any] | None = None) -> Build:
    def build(
        workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        name = our_entrypoint(workload)
        model = load(
            lambda: beit3_fast.create_model(
                name, device=torch.empty(0).device, impl=impl, img_size=workload.pixels
            ),
            weights,
            dtype,
            device,
        )
        if rounds is not None:
            return rounds(model, dtype)
        return model if workload.task.train else for_inference(model)

    return build


def torchscale_obstacle() -> str | None:
    """Why torchscale cannot run here, or None."""
    if find_spec("torchscale") is None:
        return "not installed (pip install --no-deps torchscale==0.3.0 fairscale timm torchvision)"
    try:
        import_torchscale()
    except Exception as error:
        return f"does not import here: {error}"
    return None


def _impl_of_ours(model: nn.Module) -> str:
    """What the two ops take on this machine: one name, or those of expert_linear/shared_attention."""
    mode = "training" if model.training else "inference"
    chosen = [e.impl for e in beit3_fast.explain(model, quiet=True) if e.op.endswith(f"({mode})")]
    return "/".join(dict.fromkeys(chosen))


def _int8_obstacle(workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
    if workload.task.train:
        return "runs inference only"
    if device.type != "cpu":
        return "runs on a CPU only"
    if not library.available():
        return f"needs the compiled library, which {library.why_unavailable()}"
    return None


def _float8_obstacle(workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
    if workload.task.train:
        return "runs inference only"
    if device.type == "cuda" and dtype is torch.bfloat16:
        return cuda_kernels.obstacle("float8_linear", "cuda", dtype, False)
    return "has kernels for CUDA, beside bfloat16 (bench/accuracy.py shows its accuracy on a CPU)"


RUNTIMES: dict[str, Runtime] = {
    OURS: Runtime("this package, impl=auto", _build_ours("auto"), _impl_of_ours),
    f"{OURS}-composite": Runtime(
        "this package, impl=composite", _build_ours("composite"), _impl_of_ours, default=False
    ),
    f"{OURS}-cpu": Runtime(
        "this package, impl=cpu", _build_ours("cpu"), _impl_of_ours, default=False
    ),
    f"{OURS}-int8": Runtime(
        "this package, dtype=int8; activations between products in the dtype of the row",
        _build_ours("auto", to_int8),
        _impl_of_ours,
        _int8_obstacle,
        default=False,
        judge=int8_parity,
        products="int8",
    ),
    f"{OURS}-float8": Runtime(
        "this package, dtype=float8",
        _build_ours("auto", to_float8),
        _impl_of_ours,
        _float8_obstacle,
        default=False,
        judge=float8_parity,
        products="float8",
    ),
    f"{OURS}-triton": Runtime(
        "this package, impl=triton", _build_ours("triton"), _impl_of_ours, default=False
    ),
    f"{OURS}-cuda": Runtime(
        "this package, impl=cuda", _build_ours("cuda"), _impl_of_ours, default=False
    ),
    f"{OURS}-reference": Runtime(
        "this package, impl=reference", _build_ours("reference"), _impl_of_ours, default=False
    ),
    REFERENCE: Runtime(
        "torchscale 0.3.0, eager",
        load_torchscale,
        lambda model: "eager",
        lambda workload, dtype, device: torchscale_obstacle(),
    ),
    **baselines_torch.RUNTIMES,
    **baselines_openvino.RUNTIMES,
    **baselines_onnxruntime.RUNTIMES,
}


def parse_runtimes(names: list[str] | None) -> list[str]:
    """The named runtimes, or the default ones. Raises ConfigError, with the list, for an unknown name."""
    if not names:
        return [name for name, runtime in RUNTIMES.items() if runtime.default]
    for name in names:
        if name not in RUNTIMES:
            raise ConfigError(f"unknown runtime {name!r}; there are: {', '.join(RUNTIMES)}")
    return list(dict.fromkeys(names))
