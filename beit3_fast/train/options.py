"""TrainOptions: how long, how fast and how carefully a model is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from beit3_fast.errors import ConfigError

PRECISIONS = ("float32", "bfloat16")
PARALLEL = ("ddp", "fsdp2")
RECOMPUTED = ("none", "ffn", "layer")

# Integers of TOML end below it; PyTorch has seeds up to twice that.
_SEEDS = 2**63

# What may differ between a run and its continuation: it changes no weight, or only by the order in which numbers are added.
_FREE = (
    "save_every",
    "keep",
    "log_every",
    "workers",
    "tensorboard",
    "peak_tflops",
    "parallel",
    "checkpoint_activations",
)


@dataclass(frozen=True)
class TrainOptions:
    """Defaults are the paper's, for its 6,144 samples a step.

    ``steps``: optimizer steps in all. ``lr`` is reached after ``warmup_steps``, linearly, and falls to ``min_lr`` by a cosine.
    ``weight_decay``, ``betas``, ``eps``: of AdamW; vectors do not decay. ``seed``: of first weights, order of samples and masks.
    ``layer_decay``: factor of the rate from each layer to the one below (1: none); ``head_lr_scale``: factor of the rate of
    what is named ``head`` (the official 20 of question answering; there it needs a layer_decay of 1). ``clip_grad``: largest
    norm of the gradient, None (in TOML inf) for any. ``accumulation``: micro-batches of a step, of which each process under
    torchrun takes its share. ``ema_decay``: of a second set of weights, averaged over steps; None for none. ``precision``:
    "bfloat16" runs the model under autocast (with "fsdp2": in bfloat16). ``max_skipped``: so many steps in a row may be skipped
    because a loss or gradient is not finite. ``save_every``: steps between checkpoints, of which the last ``keep``
    stay. ``log_every``: steps between lines of the log; ``tensorboard``: the same for TensorBoard, in the folder's
    ``tensorboard``. ``peak_tflops``: what a device can do at most, for the MFU; None measures matrix products.
    ``workers``: processes that prepare batches, 0 for none.
    ``parallel``: how processes under torchrun share the work: "ddp" keeps all weights in each, "fsdp2" a part in each.
    ``checkpoint_activations``: what the backward pass computes again to save memory: "none", the "ffn" of each layer, each
    "layer", or every n-th layer; "none" leaves it to the model's config.
    Raises ConfigError for values that make no sense.
    """

    steps: int = 1_000_000
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_steps: int = 10_000
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    layer_decay: float = 1.0
    head_lr_scale: float = 1.0
    clip_grad: float | None = 3.0
    accumulation: int = 1
    ema_decay: float | None = None
    precision: str = "float32"
    seed: int = 0
    max_skipped: int = 10
    save_every: int = 1000
    keep: int = 2
    log_every: int = 1
    tensorboard: bool = False
    peak_tflops: float | None = None
    workers: int = 0
    parallel: str = "ddp"
    checkpoint_activations: str | int = "none"

    def __post_init__(self) -> None:
        least = {"warmup_steps": 0, "workers": 0, "max_skipped": 0, "seed": 0}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < least.get(name, 1)):
                raise ConfigError(
                    f"{name} must be an integer of at least {least.get(name, 1)}, got {value!r}"
                )
            if field.type == "float" and not _is_number(value):
                raise ConfigError(f"{name} must be a number of at least 0, got {value!r}")
        if self.seed >= _SEEDS:
            raise ConfigError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed}")
        if (
            not isinstance(self.betas, (list, tuple))
            or len(self.betas) != 2
            or not all(_is_number(b) and b < 1 for b in self.betas)
        ):
            raise ConfigError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("clip_grad", "ema_decay", "peak_tflops"):
            value = getattr(self, name)
            free = value is None or (name == "clip_grad" and value == math.inf)
            if not free and not (_is_number(value) and value > 0):
                raise ConfigError(f"{name} must be None or a positive number, got {value!r}")
        if self.ema_decay is not None and self.ema_decay >= 1:
            raise ConfigError(f"ema_decay must be below 1, got {self.ema_decay!r}")
        if not isinstance(self.tensorboard, bool):
            raise ConfigError(f"tensorboard must be true or false, got {self.tensorboard!r}")
        for name, known in (("precision", PRECISIONS), ("parallel", PARALLEL)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        again = self.checkpoint_activations
        if again not in RECOMPUTED and (type(again) is not int or again < 1):
            raise ConfigError(
                f"checkpoint_activations must be one of {RECOMPUTED} or an integer of at least 1, got {again!r}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        left = max(1, self.steps - self.warmup_steps)
        turn = math.pi * min(1.0, (step - self.warmup_steps) / left)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(turn)) / 2

    def fixed(self) -> dict[str, Any]:
        """What a continuation must share, for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in _FREE
        }


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value < float("inf")
    )
