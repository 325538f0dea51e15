"""Model names: the official entrypoints, the plain backbones, pretraining models and tiny ones for tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from beit3_fast.checkpoint import load_checkpoint
from beit3_fast.config import SIZES, BEiT3Config
from beit3_fast.errors import ConfigError, KernelUnavailable
from beit3_fast.model.beit3 import BEiT3
from beit3_fast.model.captioning import BEiT3ForCaptioning
from beit3_fast.model.device import device_of
from beit3_fast.model.float8 import to_float8 as round_layers
from beit3_fast.model.pretraining import BEiT3ForPretraining
from beit3_fast.model.retrieval import BEiT3ForRetrieval
from beit3_fast.model.tasks import (
    BEiT3ForImageClassification,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
)
from beit3_fast.ops import dispatch, library
from beit3_fast.ops.packed_weight import keep_packed, pack, quantize

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
INT8, FLOAT8 = "int8", "float8"
Product = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Task:
    """A model class, what it fixes in the configuration, and the image preset that it was trained with."""

    make: type[nn.Module]
    normalize_output: bool
    has_classes: bool
    preset: str = "square"


TASKS = {
    "imageclassification": Task(BEiT3ForImageClassification, False, True, "imagenet"),
    "nlvr2": Task(BEiT3ForVisualReasoning, True, True),
    "vqav2": Task(BEiT3ForVisualQuestionAnswering, False, True),
    "captioning": Task(BEiT3ForCaptioning, True, False),
    "retrieval": Task(BEiT3ForRetrieval, True, False),
    "pretraining": Task(BEiT3ForPretraining, True, True),
}

_SIZES_AND_PIXELS = {
    "imageclassification": (("base", 224), ("large", 224)),
    "nlvr2": (("base", 224), ("large", 224)),
    "vqav2": (("base", 384), ("base", 480), ("large", 384), ("large", 480), ("large", 768)),
    "captioning": (("base", 224), ("base", 480), ("large", 224), ("large", 480)),
    "retrieval": (("base", 224), ("base", 384), ("large", 224), ("large", 384)),
    "pretraining": (("base", 224), ("large", 224), ("giant", 224)),
}


def _entrypoints() -> dict[str, tuple[str, int, str | None]]:
    names: dict[str, tuple[str, int, str | None]] = {}
    for task, variants in _SIZES_AND_PIXELS.items():
        for size, pixels in variants:
            patch = SIZES[size].patch_size
            names[f"beit3_{size}_patch{patch}_{pixels}_{task}"] = (size, pixels, task)
    for task in TASKS:
        names[f"beit3_tiny_patch16_32_{task}"] = ("tiny", 32, task)
    for size, pixels in (("tiny", 32), ("base", 224), ("large", 224), ("giant", 224)):
        names[f"beit3_{size}_patch{SIZES[size].patch_size}_{pixels}"] = (size, pixels, None)
    return names


_ENTRYPOINTS = _entrypoints()


def list_models() -> list[str]:
    """Every name that ``create_model`` knows, sorted."""
    return sorted(_ENTRYPOINTS)


def create_model(
    name: str,
    checkpoint: str | PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    impl: str = "auto",
    *,
    num_classes: int | None = None,
    inference_only: bool = False,
    **overrides: Any,
) -> Any:
    """Build a model by its official name, in evaluation mode.

    ``checkpoint`` is an official ``.pth`` or a ``.safetensors`` file, loaded strictly; positions are interpolated
    to this model's image size (as ``load_checkpoint`` says). ``overrides`` are fields of BEiT3Config (img_size,
    drop_path_rate, modalities, ...). ``inference_only`` gives parameters without gradients, and where the compiled CPU kernels run keeps
    the weights of the layers, of the patch projection and of the captioning head in their layout only: half the memory, no
    packing at the first call; state dict, saving and loading are the same. ``dtype="int8"`` is for inference on a CPU: the
    weights of the layers are rounded to int8 by output channel and the rows that meet them by row, all else is bfloat16
    (README: accuracy); its state dict holds the rounded weights in float32. ``dtype="float8"`` is the same in e4m3, for GPUs of compute
    capability 8.9 and newer (elsewhere, a CPU included, it shows the accuracy and is slow): rows are rounded by 128
    columns, and LayerNorm's weights go into those of the products.
    The model's ``name`` and ``preset`` (image preprocessing, the file's where it states one) are set. Raises
    ConfigError for an unknown name, field, dtype or impl, KernelUnavailable for int8 without the compiled library, and
    CheckpointError for a file that does not fit.
    """
    if not isinstance(name, str) or name not in _ENTRYPOINTS:
        raise ConfigError(f"unknown model {name!r}; beit3_fast.list_models() has {list_models()}")
    if impl not in ("auto", *dispatch.IMPLEMENTATIONS):
        raise ConfigError(
            f"impl must be 'auto' or one of {list(dispatch.IMPLEMENTATIONS)}, got {impl!r}"
        )
    size, pixels, task_name = _ENTRYPOINTS[name]
    task = None if task_name is None else TASKS[task_name]
    fields: dict[str, Any] = {"img_size": pixels, **overrides}
    if task is not None:
        fields.setdefault("normalize_output", task.normalize_output)
    config = SIZES[size].replace(**fields)
    make = BEiT3 if task is None else task.make
    options: dict[str, Any] = {"impl": impl}
    if num_classes is not None:
        if task is None or not task.has_classes:
            raise ConfigError(f"{name} has no classes whose number could be set")
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ConfigError(f"num_classes must be a positive integer, got {num_classes!r}")
        options["num_classes"] = num_classes
    place, preset = device_of(device), None
    int8 = dtype in (INT8, torch.int8)
    float8 = dtype in (FLOAT8, torch.float8_e4m3fn)
    if int8:
        _check_int8(place, impl)
    if float8:
        _check_float8(place, impl)
    wanted = torch.float32 if int8 or float8 else _dtype(dtype)
    if checkpoint is None:
        with place:
            model: Any = make(config, **options).to(wanted)
    else:
        # A strict load writes every tensor, so nothing needs initial values.
        with torch.device("meta"):
            model = make(config, **options).to(wanted)
        model.to_empty(device=place)
        model.name = name
        preset = load_checkpoint(model, checkpoint).preset
    model.name = name
    model.preset = preset or (task.preset if task else "square")
    if int8:
        return to_int8(model)
    if float8:
        return to_float8(model)
    return for_inference(model) if inference_only else model.eval()


def for_inference(model: Any) -> Any:
    """What ``inference_only=True`` makes of a model, in place."""
    model.eval().requires_grad_(False)
    if next(model.parameters()).device.type == "cpu":
        _pack(model, [*_layer_products(model), *_other_products(model)])
    return model


def to_int8(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What ``dtype="int8"`` makes of a model on the CPU, in place; ``dtype`` is that of all but its products."""
    model.eval().requires_grad_(False)
    for linear in _layer_products(model):
        keep_packed(linear, quantize(linear.weight, dtype))
    _pack(model.to(dtype), _other_products(model))
    return model


def to_float8(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What ``dtype="float8"`` makes of a model, in place; ``dtype`` is that of all but its products."""
    return round_layers(model, _backbone(model).encoder.layers, dtype)


def _backbone(model: Any) -> BEiT3:
    return model if isinstance(model, BEiT3) else model.beit3


def _layer_products(model: Any) -> list[nn.Linear]:
    layers = _backbone(model).encoder.layers
    return [module for module in layers.modules() if isinstance(module, nn.Linear)]


def _other_products(model: Any) -> list[Product]:
    """What the ops multiply beside the layers: patches, and the rows that become words of a caption."""
    backbone = _backbone(model)
    products: list[Product] = []
    if "vision" in backbone.config.modalities:
        products.append(backbone.vision_embed.proj)
    if isinstance(model, BEiT3ForCaptioning):
        products.append(model.mlm_head)
    return products


def _pack(model: Any, products: Sequence[Product]) -> None:
    """Keeps the weights of these packed only, where the CPU kernels are the ones that read them."""
    for product in products:
        at = dispatch.situation("expert_linear", [product.weight])
        if dispatch.choose(at, _backbone(model).impl).impl == "cpu":
            keep_packed(product, pack(product.weight))


def _asked(impl: str) -> str:
    return (os.environ.get("BEIT3_FAST_IMPL") or impl) if impl == "auto" else impl


def _check_float8(device: torch.device, impl: str) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"dtype='float8' runs on CUDA and on a CPU, got device {str(device)!r}; use 'bfloat16'"
        )
    asked = _asked(impl)
    if asked not in ("auto", "cuda", "composite", "reference"):
        raise ConfigError(
            f"dtype='float8' needs impl='auto', 'cuda', 'composite' or 'reference', got {asked!r}"
        )


def _check_int8(device: torch.device, impl: str) -> None:
    if device.type != "cpu":
        raise ConfigError(f"dtype='int8' runs on a CPU, got device {str(device)!r}; use 'bfloat16'")
    asked = _asked(impl)
    if asked not in ("auto", "cpu"):
        raise ConfigError(f"dtype='int8' needs impl='auto' or 'cpu', got {asked!r}")
    if not library.available():
        raise KernelUnavailable(
            f"dtype='int8' needs the compiled library, which {library.why_unavailable()}; use 'float32'"
        )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ConfigError(f"dtype must be one of {[*DTYPES, INT8, FLOAT8]}, got {dtype!r}")


def model_config(model: nn.Module) -> BEiT3Config:
    """The configuration of a model made here. Raises ConfigError for any other module."""
    config = getattr(model, "config", None)
    if not isinstance(config, BEiT3Config):
        raise ConfigError(f"expected a beit3_fast model, got {type(model).__name__}")
    return config
