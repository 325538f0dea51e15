"""Baselines under torch.compile: torchscale's model with SDPA, and timm's image tower."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.conversion import Converted, Engine, TensorModel, load_torchscale, use_sdpa
from bench.runtime import Runtime, Weights, converted, missing
from bench.torchscale_heads import import_torchscale
from bench.workloads import Workload

SETTINGS = {"freezing": True, "max_autotune": True}
"""Inductor's settings. Freezing packs the weights for oneDNN at compile time; max_autotune tries Inductor's own
products, with the operations around them fused in, against oneDNN's, and keeps the faster for each shape."""


class Compiled(Converted):
    """A module under torch.compile, one graph for each set of shapes."""

    def _convert(self, model: TensorModel, inputs: Mapping[str, Tensor]) -> Engine:
        import torch._dynamo.config
        import torch._inductor.config

        compiled = torch.compile(model, dynamic=False)

        def run(tensors: Sequence[Tensor]) -> Tensor:
            result: Tensor = compiled(*tensors)
            return result

        # Not torch.compile's options: Dynamo, which must treat the weights as constants, does not see those.
        # Every set of shapes is a graph of the same code; beyond the limit PyTorch would run it uncompiled.
        inductor = torch._inductor.config.patch(SETTINGS)
        dynamo = torch._dynamo.config.patch(recompile_limit=256)
        with inductor, dynamo, torch.inference_mode():
            run(list(inputs.values()))
        return run


def build_compiled(
    workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """torchscale with SDPA under torch.compile."""
    return Compiled(workload, use_sdpa(load_torchscale(workload, weights, dtype, device)))


def build_compiled_training(
    workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """torchscale with SDPA, forward and backward compiled; gradients stay with the official names."""
    model = use_sdpa(load_torchscale(workload, weights, dtype, device))
    # Graphs own the memory of gradients, which the step sets to None.
    model.compile(dynamic=False, mode="max-autotune-no-cudagraphs")
    return model


def build_timm(
    workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """timm's image tower under torch.compile."""
    return Compiled(workload, image_tower(workload, weights).to(device, dtype).eval())


class _ImagesOnly(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, visual_tokens: Tensor) -> Tensor:
        return self.tower(visual_tokens)


def image_tower(workload: Workload, weights: Weights) -> nn.Module:
    """timm's vision-only BEiT-3 with the image branch of these weights, in fp32, under torchscale's argument."""
    # timm needs torchvision, which the import of torchscale makes importable.
    import_torchscale()
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    config = workload.config
    tower: Any = timm.create_model(
        "beit3_base_patch16_224",
        img_size=config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.ffn_dim / config.embed_dim,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        num_classes=0,
        global_pool="",
    )
    # timm recognises BEiT-3 by this prefix; its classifiers have no final LayerNorm, so it has no name for it.
    official = {f"beit3.{name}": value.float() for name, value in weights.items()}
    renamed = checkpoint_filter_fn(official, tower)
    tower.load_state_dict({re.sub(r"^layer_norm\.", "norm.", k): v for k, v in renamed.items()})
    return _ImagesOnly(tower)


def _timm_obstacle(workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
    return missing("timm") if workload.task_name == "image" else "runs images only"


_HOW = "torch.compile (Inductor with freezing and max_autotune, fixed shapes)"
RUNTIMES: dict[str, Runtime] = {
    "torchscale-compiled": converted(
        f"torchscale with scaled_dot_product_attention under {_HOW}",
        build_compiled,
        "SDPA, inductor",
        lambda workload, dtype, device: None,
    ),
    "torchscale-compiled-training": Runtime(
        "torchscale with scaled_dot_product_attention under torch.compile, max-autotune, training steps",
        build_compiled_training,
        lambda model: "SDPA, inductor",
        lambda workload, dtype, device: None if workload.task.train else "runs training only",
        default=False,
        costly=True,
        gate=False,
    ),
    "timm": converted(
        f"timm's vision-only BEiT-3 under {_HOW}", build_timm, "inductor", _timm_obstacle
    ),
}
