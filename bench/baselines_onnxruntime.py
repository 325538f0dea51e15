"""Baseline on ONNX Runtime: torchscale's model with SDPA, exported with fixed shapes, fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.conversion import Converted, Engine, TensorModel, load_torchscale, use_sdpa
from bench.runtime import Runtime, Weights, converted, missing
from bench.workloads import Workload


class OnnxRuntime(Converted):
    """A session for each set of shapes."""

    def _convert(self, model: TensorModel, inputs: Mapping[str, Tensor]) -> Engine:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its threads wait in a loop within a run, and must not do so while another runtime is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            _export(model, tuple(inputs.values()), path)
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        names = [node.name for node in session.get_inputs()]

        def run(tensors: Sequence[Tensor]) -> Tensor:
            arrays = {n: t.contiguous().numpy() for n, t in zip(names, tensors, strict=True)}
            return torch.from_numpy(session.run(None, arrays)[0])

        return run


def _export(model: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    torch.onnx.export(model, example, path, dynamo=True, external_data=True, verbose=False)


def build_onnxruntime(
    workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """ONNX Runtime with every graph optimisation."""
    return OnnxRuntime(workload, use_sdpa(load_torchscale(workload, weights, dtype, device)))


def _obstacle(workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "is measured on CPUs only"
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        return f"ONNX Runtime has no {name} matrix products for CPUs"
    return missing("onnxruntime", "onnx", "onnxscript")


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": converted(
        "ONNX Runtime on torchscale with SDPA, fixed shapes, every graph optimisation, all threads within an op",
        build_onnxruntime,
        "CPU provider",
        _obstacle,
    )
}
