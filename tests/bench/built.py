"""A runtime on the reference's weights, as the benchmark builds it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bench.baselines import REFERENCE, RUNTIMES, build_reference
from bench.conversion import Converted, Engine, TensorModel
from bench.workloads import Workload

CPU = torch.device("cpu")


def get(runtime: str, workload: Workload, dtype: str) -> nn.Module:
    """The runtime's model for a workload; the reference itself in fp32."""
    reference = build_reference(workload)
    if (runtime, dtype) == (REFERENCE, "float32"):
        return reference
    return RUNTIMES[runtime].build(workload, reference.state_dict(), getattr(torch, dtype), CPU)


class Uncompiled(Converted):
    """Runs the model as it was handed over for conversion."""

    def _convert(self, model: TensorModel, inputs: Mapping[str, Tensor]) -> Engine:
        return lambda tensors: model(*tensors)
