"""torchscale's models where torchvision, which torchscale imports through timm, was built for another PyTorch.

Nothing of torchvision's compiled part is used here, so the two operator schemas that its Python part asks for are
declared and it is imported again. A user's own torchvision is left to the user: the package does none of this.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from beit3_fast.integrations import torchscale_models
from bench.torchscale_pretraining import Pretraining

_SHIM: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """torchvision's Python part, whatever PyTorch it was built for. Raises ImportError where it is not installed."""
    try:
        return import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SHIM.append(library)
        return import_module("torchvision")


@cache
def import_torchscale() -> tuple[Any, Any]:
    """torchscale's (EncoderConfig, BEiT3). Raises ConfigError where it does not import all the same."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        import_torchvision()
    return torchscale_models.import_torchscale()


_MADE_OF_TORCHSCALE = {**torchscale_models.MODELS, "pretraining": Pretraining}


def _make(task: str, *arguments: Any) -> nn.Module:
    import_torchscale()
    model: nn.Module = _MADE_OF_TORCHSCALE[task](*arguments)
    return model


MODELS: dict[str, Any] = {task: partial(_make, task) for task in _MADE_OF_TORCHSCALE}
"""The model that each of `bench.tasks.TASKS` runs on, by the official task names."""
