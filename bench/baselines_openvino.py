"""Baselines on OpenVINO: torchscale's model with SDPA, converted with fixed shapes, in fp32, bf16 and int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.conversion import Converted, Engine, TensorModel, load_torchscale, use_sdpa
from bench.inputs import PAD
from bench.runtime import INT8_BOUND, Obstacle, Runtime, Weights, converted, int8_parity, missing
from bench.tasks import TASKS, Inputs
from bench.workloads import Workload

CALIBRATION_SAMPLES = 64
_PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_CAPABILITY = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}


def settings(dtype: torch.dtype, threads: int) -> dict[str, object]:
    """How the CPU plugin compiles: all threads work on one request, and no dtype but this one.

    LATENCY at every batch size, since a round is one call. THROUGHPUT, whose streams share the threads among several
    requests, has not been found better or worse: no run of it was quiet enough to tell.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
        "INFERENCE_NUM_THREADS": threads,
    }


class OpenVINO(Converted):
    """A compiled model for each set of shapes.

    A timed call in a 16-bit dtype includes what numpy, which has no bfloat16, makes necessary: images to fp32 and the
    result back.
    int8: whether NNCF quantizes the model first.
    """

    def __init__(
        self, workload: Workload, source: nn.Module, dtype: torch.dtype, int8: bool
    ) -> None:
        super().__init__(workload, source)
        self.dtype, self.int8 = dtype, int8

    def _convert(self, model: TensorModel, inputs: Mapping[str, Tensor]) -> Engine:
        import openvino as ov

        example = tuple(_plain(tensor) for tensor in inputs.values())
        converted = ov.convert_model(
            model, example_input=example, input=[tuple(tensor.shape) for tensor in example]
        )
        if self.int8:
            converted = self._quantize(converted, inputs)
        compiled = ov.Core().compile_model(
            converted, "CPU", settings(self.dtype, torch.get_num_threads())
        )
        request = compiled.create_infer_request()

        def run(tensors: Sequence[Tensor]) -> Tensor:
            arrays = [_plain(tensor).numpy() for tensor in tensors]
            found = request.infer(arrays, share_inputs=True)
            return torch.from_numpy(found[0]).to(self.dtype)

        return run

    def _quantize(self, converted: Any, inputs: Mapping[str, Tensor]) -> Any:
        import nncf

        batch, config = len(next(iter(inputs.values()))), self.workload.config
        # Several tasks share the backbone: the one that takes these arguments is meant.
        task = next(
            task
            for task in TASKS.values()
            if task.model == self.workload.task.model
            and task.inputs(config, [0]).keys() == inputs.keys()
        )
        # Photographs that the measured batch does not show in this cut.
        samples = [
            fit(task.inputs(config, list(range(i, i + batch))), inputs)
            for i in range(batch, batch + CALIBRATION_SAMPLES, batch)
        ]
        arrays = [[_plain(tensor).numpy() for tensor in sample] for sample in samples]
        return nncf.quantize(
            converted,
            nncf.Dataset(arrays),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(arrays),
        )


def fit(sample: Inputs, like: Mapping[str, Tensor]) -> list[Tensor]:
    """The sample's tensors under the names of `like`, texts cut or padded to its length."""
    fitted = []
    for name, model in like.items():
        tensor = sample[name]
        if tensor.ndim == 2:
            more = model.shape[1] - tensor.shape[1]
            value = float(PAD) if tensor.dtype == torch.int64 else float("padding" in name)
            tensor = torch.nn.functional.pad(tensor, (0, more), value=value)
        fitted.append(tensor)
    return fitted


def _plain(tensor: Tensor) -> Tensor:
    """What numpy and the converted model take: fp32 instead of a 16-bit dtype."""
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def _build(
    workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device, int8: bool
) -> nn.Module:
    source = use_sdpa(load_torchscale(workload, weights, torch.float32, device))
    return OpenVINO(workload, source, dtype, int8)


def build_openvino(
    workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """OpenVINO in the given dtype, from weights in fp32."""
    return _build(workload, weights, dtype, device, int8=False)


def build_openvino_int8(
    workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """OpenVINO with 8-bit products; what is not quantized is in the given dtype."""
    return _build(workload, weights, dtype, device, int8=True)


def _obstacle(*packages: str) -> Obstacle:
    def obstacle(workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "is measured on CPUs only"
        return missing(*packages) or _precision_obstacle(dtype)

    return obstacle


def _precision_obstacle(dtype: torch.dtype) -> str | None:
    import openvino as ov

    name = _PRECISION[dtype]
    can = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITY[name] in can:
        return None
    return f"OpenVINO would compute {name} in f32 on this CPU: it lacks the instructions"


_HOW = "torchscale with SDPA, fixed shapes, LATENCY hint, all threads for one request"
RUNTIMES: dict[str, Runtime] = {
    "openvino": converted(
        f"OpenVINO on {_HOW}, inference precision of the row",
        build_openvino,
        "CPU plugin",
        _obstacle("openvino"),
    ),
    "openvino-int8": converted(
        f"OpenVINO on {_HOW}, quantized by NNCF for transformers ({CALIBRATION_SAMPLES} photographs), the rest in "
        f"the precision of the row; judged by relative rms within {INT8_BOUND}",
        build_openvino_int8,
        "int8 by NNCF",
        _obstacle("openvino", "nncf"),
        judge=int8_parity,
        products="int8",
    ),
}
