"""The runtimes of others: conversion keeps the model, settings are the stated ones, absences have names.

The libraries are stand-ins here, so that no test needs them; test_baselines_in_reports runs the real ones that are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from built import CPU, Uncompiled, get
from torch import Tensor, nn

from bench import baselines_onnxruntime, baselines_openvino, baselines_torch, runtime
from bench.baselines import RUNTIMES, build_reference
from bench.conversion import Engine, TensorModel, load_torchscale, use_sdpa
from bench.inputs import PAD
from bench.measure import Case, check_parity
from bench.runtime import Runtime, float8_parity, int8_parity
from bench.workloads import TASKS, Workload, parse_workload, step

INFERENCE = [name for name, task in TASKS.items() if not task.train]
OTHERS = ("torchscale-compiled", "timm", "openvino", "openvino-int8", "onnxruntime")


def uncompiled(workload: Workload, weights: Any, dtype: torch.dtype, device: torch.device) -> Any:
    return Uncompiled(workload, use_sdpa(load_torchscale(workload, weights, dtype, device)))


@pytest.mark.parametrize("task", INFERENCE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_converted_is_torchscales_model(
    monkeypatch: pytest.MonkeyPatch, task: str, dtype: str
) -> None:
    monkeypatch.setitem(RUNTIMES, "other", Runtime("", uncompiled, lambda model: "-"))
    verdict = check_parity(Case(parse_workload(f"{task}/tiny/32"), dtype, 4), ["other"], get, CPU)
    assert verdict["other"].passed, verdict["other"].reason


def test_each_set_of_shapes_is_converted_once() -> None:
    workload = parse_workload("pair/tiny/32")
    made: list[tuple[int, ...]] = []

    class Counted(Uncompiled):
        def _convert(self, model: TensorModel, inputs: Mapping[str, Tensor]) -> Engine:
            made.append(tuple(inputs["visual_tokens"].shape))
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            return super()._convert(model, inputs)

    model = Counted(workload, use_sdpa(build_reference(workload)))
    for batch in (2, 3, 2):
        step(model, workload, workload.inputs(batch))
    step(model, parse_workload("image/tiny/32"), parse_workload("image/tiny/32").inputs(2))
    assert [shape[0] for shape in made] == [2, 3, 2]
    own = sum(p.nbytes for p in model.parameters())
    assert model.converted_bytes == 3 * own


def test_timms_tower_is_the_image_branch() -> None:
    workload = parse_workload("image/tiny/32")
    reference = build_reference(workload)
    tower = baselines_torch.image_tower(workload, reference.state_dict()).eval()
    inputs = workload.inputs(3)
    found = step(tower, workload, inputs)
    expected = step(reference, workload, inputs)["encoder_out"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchscale-compiled", "timm"])
def test_compilation_sees_frozen_weights_and_fixed_shapes(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import torch._inductor.config

    seen: list[dict[str, Any]] = []

    def compile_(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
        def first(*tensors: Tensor) -> Tensor:
            config = torch._inductor.config
            seen.append(
                {
                    **options,
                    "freezing": config.freezing,
                    "max_autotune": config.max_autotune,
                    "gradients": torch.is_grad_enabled(),
                }
            )
            result: Tensor = model(*tensors)
            return result

        return first

    monkeypatch.setattr(torch, "compile", compile_)
    verdict = check_parity(Case(parse_workload("image/tiny/32"), "float32", 2), [name], get, CPU)
    assert verdict[name].passed, verdict[name].reason
    settings = {"freezing": True, "max_autotune": True}
    assert seen[0] == {"dynamic": False, "gradients": False, **settings}
    assert torch._inductor.config.freezing is False


class FakeOpenVINO(ModuleType):
    """Converts nothing, runs the module it was given, and keeps what it was asked for."""

    def __init__(self, can: Sequence[str] = ("FP32",)) -> None:
        super().__init__("openvino")
        self.asked: list[Any] = []
        self.can = can

    def convert_model(self, model: nn.Module, example_input: Any, input: Any) -> nn.Module:
        assert [tuple(t.shape) for t in example_input] == input
        return model

    def Core(self) -> Any:
        def compile_model(model: nn.Module, device: str, settings: dict[str, object]) -> Any:
            self.asked.append((device, settings))

            def infer(arrays: list[Any], share_inputs: bool) -> Any:
                tensors = [torch.from_numpy(a) for a in arrays]
                assert {a.dtype for a in arrays} <= {np.dtype(t) for t in ("f4", "i8", "?")}
                return [model(*tensors).numpy()]

            return SimpleNamespace(create_infer_request=lambda: SimpleNamespace(infer=infer))

        return SimpleNamespace(compile_model=compile_model, get_property=lambda *_: self.can)


@pytest.fixture
def openvino(monkeypatch: pytest.MonkeyPatch) -> FakeOpenVINO:
    fake = FakeOpenVINO()
    monkeypatch.setitem(sys.modules, "openvino", fake)
    monkeypatch.setattr(runtime, "find_spec", lambda name: object())
    return fake


def test_openvino_gets_fixed_shapes_and_the_threads_of_the_run(openvino: FakeOpenVINO) -> None:
    case = Case(parse_workload("pair/tiny/32"), "float32", 2)
    verdict = check_parity(case, ["openvino"], get, CPU)["openvino"]
    assert verdict.passed, verdict.reason
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    assert openvino.asked[0] == ("CPU", settings)
    half = Case(case.workload, "bfloat16", 2)
    assert check_parity(half, ["openvino"], get, CPU)["openvino"].passed
    assert openvino.asked[-1][1]["INFERENCE_PRECISION_HINT"] == "bf16"


def test_int8_is_calibrated_on_photographs_of_the_same_shapes(
    openvino: FakeOpenVINO, monkeypatch: pytest.MonkeyPatch
) -> None:
    nncf = ModuleType("nncf")
    asked: dict[str, Any] = {}

    def quantize(model: nn.Module, samples: list[Any], **options: Any) -> nn.Module:
        asked.update(options, samples=samples)
        return model

    monkeypatch.setitem(nncf.__dict__, "Dataset", list)
    monkeypatch.setitem(nncf.__dict__, "ModelType", SimpleNamespace(TRANSFORMER="transformer"))
    monkeypatch.setitem(nncf.__dict__, "quantize", quantize)
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    # The backbone of one task is used for the other.
    model = get("openvino-int8", parse_workload("image/tiny/32"), "float32")
    workload = parse_workload("pair/tiny/32")
    inputs = workload.inputs(8)
    step(model, workload, inputs)
    assert asked["model_type"] == "transformer"
    samples = asked["samples"]
    assert sum(len(sample[0]) for sample in samples) == baselines_openvino.CALIBRATION_SAMPLES
    for sample in samples:
        assert [s.shape for s in sample] == [tuple(t.shape) for t in inputs.values()]
        assert not np.array_equal(sample[0], inputs["visual_tokens"].numpy())


def test_texts_are_cut_or_padded_to_the_calibrated_length() -> None:
    workload = parse_workload("pair/tiny/32")
    sample = workload.inputs(2)
    length = sample["textual_tokens"].shape[1]
    for wanted in (length - 3, length + 3):
        like = {**sample, "textual_tokens": torch.zeros(2, wanted, dtype=torch.int64)}
        like["text_padding_position"] = torch.zeros(2, wanted, dtype=torch.bool)
        image, ids, padding = baselines_openvino.fit(sample, like)
        assert torch.equal(image, sample["visual_tokens"])
        assert ids.shape == padding.shape == (2, wanted)
        assert padding.dtype == torch.bool
        assert torch.equal(ids == PAD, padding)


def test_onnx_runtime_gets_every_optimisation_and_the_threads_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[nn.Module] = []
    options = SimpleNamespace(entries={})
    options.add_session_config_entry = options.entries.__setitem__

    class Session:
        def __init__(self, path: str, options: Any, providers: list[str]) -> None:
            assert providers == ["CPUExecutionProvider"]
            assert Path(path).parent.is_dir()

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name="x")]

        def run(self, _: None, arrays: dict[str, Any]) -> list[Any]:
            return [exported[-1](torch.from_numpy(arrays["x"])).numpy()]

    fake = ModuleType("onnxruntime")
    fake.__dict__.update(
        SessionOptions=lambda: options,
        GraphOptimizationLevel=SimpleNamespace(ORT_ENABLE_ALL="all"),
        ExecutionMode=SimpleNamespace(ORT_SEQUENTIAL="sequential"),
        InferenceSession=Session,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(
        baselines_onnxruntime, "_export", lambda model, example, path: exported.append(model)
    )
    case = Case(parse_workload("image/tiny/32"), "float32", 2)
    verdict = check_parity(case, ["onnxruntime"], get, CPU)["onnxruntime"]
    assert verdict.passed, verdict.reason
    assert options.graph_optimization_level == "all"
    assert options.intra_op_num_threads == torch.get_num_threads()
    assert options.entries == {"session.force_spinning_stop": "1"}


def test_obstacles_say_why(openvino: FakeOpenVINO, monkeypatch: pytest.MonkeyPatch) -> None:
    image, pair, train = (parse_workload(f"{t}/tiny/32") for t in ("image", "pair", "train"))

    def why(name: str, workload: Workload, dtype: torch.dtype, device: str = "cpu") -> str | None:
        return RUNTIMES[name].obstacle(workload, dtype, torch.device(device))

    for name in OTHERS:
        assert why(name, image, torch.float32) is None
        assert why(name, train, torch.float32) == "runs inference only"
    assert why("timm", pair, torch.float32) == "runs images only"
    assert "no bfloat16 matrix products" in str(why("onnxruntime", image, torch.bfloat16))
    assert "would compute bf16 in f32" in str(why("openvino", image, torch.bfloat16))
    openvino.can = ("FP32", "BF16")
    assert why("openvino", image, torch.bfloat16) is None
    assert "CPUs only" in str(why("openvino", image, torch.float32, "cuda"))
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    for name, package in (("openvino", "openvino"), ("onnxruntime", "onnxruntime, onnx")):
        assert f"not installed: {package}" in str(why(name, image, torch.float32))
        assert "make bench-baselines" in str(why(name, image, torch.float32))


def test_int8_has_a_rule_of_its_own() -> None:
    torch.manual_seed(0)
    truth = torch.randn(64, 64)
    near, far = (truth + e * torch.randn(64, 64) for e in (0.03, 0.07))
    assert int8_parity(near, truth, truth).passed
    assert int8_parity(near, truth, truth).rel_rms == pytest.approx(0.03, rel=0.1)
    assert "the rule for int8" in int8_parity(far, truth, truth).reason
    assert float8_parity(truth * 1.15, truth, truth).passed
    assert not int8_parity(truth * 1.15, truth, truth).passed
    assert "the rule for float8" in float8_parity(truth * 1.25, truth, truth).reason
    near[3, 3] = torch.nan
    assert not int8_parity(near, truth, truth).passed
    assert not int8_parity(truth[:5], truth, truth).passed
