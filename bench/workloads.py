"""What is measured: workloads named task/size/resolution, e.g. ``vqa/base/480``.

A new size or resolution needs nothing here; a new task is one entry of `bench.tasks.TASKS`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from beit3_fast.config import SIZES, BEiT3Config
from beit3_fast.errors import ConfigError
from beit3_fast.model.work import Work
from bench.tasks import TASKS, Inputs, Task


class Variants(NamedTuple):
    """The dtypes and batch sizes that a workload runs in when no option names others."""

    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    batches: tuple[int, ...] = (8,)


_HALF = Variants(dtypes=("bfloat16",))
_WIDE = Variants(batches=(8, 1))

QUICK: Mapping[str, Variants] = {
    "image/base/224": Variants(),
    "pair/base/224": Variants(),
    "vqa/base/480": _HALF,
}
DEFAULT: Mapping[str, Variants] = {
    "image/base/224": _WIDE,
    "pair/base/224": _WIDE,
    "vqa/base/480": _HALF,
    "nlvr2/base/224": _HALF,
    "retrieval-text/base/384": _HALF,
    "caption/base/480": _HALF,
}
FULL: Mapping[str, Variants] = {
    **dict.fromkeys(DEFAULT, _WIDE),
    "train/base/224": Variants(),
    "pretrain/base/224": Variants(batches=(2,)),
    "image/large/224": _WIDE,
    "pair/large/224": _WIDE,
}
"""What --quick, no option and --full run."""
# The paper's giant has no counterpart to compare with.
BENCH_SIZES = ("tiny", "base", "large")


@dataclass(frozen=True)
class Workload:
    """A task at one size and resolution, e.g. ``vqa/base/480``."""

    task_name: str
    size: str
    pixels: int

    @property
    def name(self) -> str:
        """task/size/resolution."""
        return f"{self.task_name}/{self.size}/{self.pixels}"

    @property
    def task(self) -> Task:
        """The entry of TASKS."""
        return TASKS[self.task_name]

    @property
    def config(self) -> BEiT3Config:
        """The backbone's configuration; heads without a final LayerNorm leave it out."""
        normalized = self.task.model not in ("imageclassification", "vqav2")
        return SIZES[self.size].replace(img_size=self.pixels, normalize_output=normalized)

    @property
    def model_key(self) -> tuple[str, str, int]:
        """Workloads with the same key run on the same model."""
        return self.task.model, self.size, self.pixels

    def inputs(self, batch: int, first: int = 0) -> Inputs:
        """Arguments of one forward on the samples `first` to `first + batch - 1`, fp32, on the CPU."""
        return self.task.inputs(self.config, list(range(first, first + batch)))

    def parity_batches(self, batch: int) -> int:
        """How many batches parity is judged over."""
        return math.ceil(64 / (self.task.values * batch))

    def flops(self, inputs: Inputs) -> float:
        """Floating-point operations that the answer to `inputs` needs."""
        return self.work(inputs).flops

    def work(self, inputs: Inputs) -> Work:
        """What the answer to `inputs` needs."""
        return self.task.work(self.config, inputs)


def move(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The inputs on a device, images in the given dtype."""
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }


def step(model: nn.Module, workload: Workload, inputs: Inputs) -> Any:
    """The call that is timed: one forward without gradients, or one training step."""
    task = workload.task
    if model.training != task.train:
        model.train(task.train)
    with torch.inference_mode(not task.train):
        return task.run(model, inputs)


def parse_workload(name: str, sizes: Collection[str] = BENCH_SIZES) -> Workload:
    """``task/size/resolution`` -> Workload. Raises ConfigError, with what there is, for anything else."""
    parts = name.split("/")
    if len(parts) == 3 and parts[0] in TASKS and parts[1] in sizes and parts[2].isdecimal():
        pixels, patch = int(parts[2]), SIZES[parts[1]].patch_size
        if pixels and pixels % patch == 0:
            return Workload(parts[0], parts[1], pixels)
        raise ConfigError(
            f"workload {name!r}: the resolution must be a multiple of the patch size {patch}"
        )
    raise ConfigError(
        f"unknown workload {name!r}; expected task/size/resolution with a task of {', '.join(TASKS)} "
        f"and a size of {', '.join(sizes)}, for instance one of: {', '.join(FULL)}"
    )
