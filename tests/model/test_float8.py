"""Models with dtype="float8" by PyTorch's calls: their accuracy, what they keep, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_int8 import TASKS, inputs, outputs, weights
from torch import Tensor, nn

import beit3_fast
from beit3_fast.errors import ConfigError, KernelUnavailable, ShapeError
from beit3_fast.float8 import BLOCK, E4M3, dequantize, quantize
from beit3_fast.model.float8 import absorb_norms
from beit3_fast.model.registry import to_float8
from beit3_fast.ops import Norm, dispatch, expert_linear
from beit3_fast.ops.expert_linear import _warn_of_unpacking
from beit3_fast.ops.packed_weight import quantize_float8
from beit3_fast.parity import op_parity

NAME = "beit3_tiny_patch16_32_vqav2"


def models(task: str = "vqav2", **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    name = f"beit3_tiny_patch16_32_{task}"
    plain = beit3_fast.create_model(name, **options)
    with torch.no_grad():
        for parameter in plain.parameters():  # LayerNorms that are not what they begin as
            parameter.add_(0.05 * torch.randn_like(parameter))
    rounded = beit3_fast.create_model(name, dtype="float8", **options)
    rounded.load_state_dict(plain.state_dict())
    return plain, rounded


@pytest.mark.parametrize("task", TASKS)
def test_close_to_fp32(task: str) -> None:
    plain, rounded = models(task)
    expected = outputs(plain, task)
    error = (outputs(rounded, task) - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.08
    assert len(weights(rounded)) == 2 * 6 * len(rounded.beit3.encoder.layers)
    assert all(w.is_float8 and w.dtype is torch.bfloat16 for w in weights(rounded))


def test_numbers_are_within_half_a_step_and_stay_what_they_are() -> None:
    x = torch.randn(50, 300) * torch.logspace(-12, 12, 50)[:, None]
    found = dequantize(quantize(x))
    blocks = [part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(BLOCK, 1)]
    step = torch.maximum(x.abs() * 2.0**-4, torch.cat(blocks, 1) * 2.0**-17)
    assert ((found - x).abs() <= step).all()
    assert torch.equal(dequantize(quantize(found)), found)
    assert torch.equal(found.bfloat16().float(), found)


def test_zeros_and_numbers_that_are_not_finite() -> None:
    x = torch.ones(4, 200)
    x[0], x[1, 3], x[2, 150], x[3] = 0.0, torch.nan, torch.inf, 1e-25
    found = dequantize(quantize(x))
    assert torch.equal(found[0], x[0])
    assert found[1, :BLOCK].isnan().all()
    assert torch.equal(found[1, BLOCK:], x[1, BLOCK:])
    assert found[2, BLOCK:].isnan().all()
    assert (found[3] == 0).all()


@pytest.mark.parametrize("impl", ["composite", "reference"])
@pytest.mark.parametrize("case", range(8))
def test_the_op_by_every_implementation(impl: str, case: int) -> None:
    with_norm, gelu, named = (bool(case >> bit & 1) for bit in range(3))
    generator = torch.Generator().manual_seed(case)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x, residual = normal(9, 200), normal(9, 24)
    own = [quantize_float8(normal(24, 200) / 14) for _ in range(2)]
    biases = [normal(24) for _ in own]
    norm = Norm([normal(200) for _ in own], [normal(200) for _ in own]) if with_norm else None
    rows = torch.tensor([4, 0, 8, 2, 6, 1]) if named else None
    options: dict[str, Any] = {"bounds": (0, 2, 6) if named else (0, 2, 9), "norm": norm}
    options |= {"activation": "gelu" if gelu else None, "residual": residual, "rows": rows}
    found = expert_linear(x, own, biases, impl=impl, **options)
    expected = torch.zeros(9, 24, dtype=torch.float64)
    for e in range(2):
        first, last = options["bounds"][e : e + 2]
        places = torch.arange(9)[first:last] if rows is None else rows[first:last]
        part, weight = x[places].double(), own[e].unpack(torch.float64)
        scaled = part if norm is None else part * norm.weights[e].double()
        y = dequantize(quantize(scaled)).double() @ weight.T
        if norm is not None:
            mean = part.mean(1, keepdim=True) * (weight @ norm.weights[e].double())
            deviation = (part.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
            y = (y - mean) / deviation + weight @ norm.biases[e].double()
        y = y + biases[e].double()
        expected[places] = (nn.functional.gelu(y) if gelu else y) + residual[places].double()
    assert op_parity(found, expected.bfloat16(), expected).passed


def test_layer_norms_go_into_their_products() -> None:
    plain, _ = models()
    same = copy.deepcopy(plain)
    for layer in same.beit3.encoder.layers:
        state = layer.state_dict()
        absorb_norms(state)
        layer.load_state_dict(state)
        assert (layer.final_layer_norm.A.weight == 1).all()
        assert (layer.self_attn.inner_attn_ln.B.bias == 0).all()
    torch.testing.assert_close(outputs(same), outputs(plain), rtol=1e-4, atol=1e-4)


def test_a_layer_norm_without_its_product_stays() -> None:
    plain, _ = models()
    state = plain.beit3.encoder.layers[0].state_dict()
    del state["ffn.A.fc1.bias"]
    kept = state["final_layer_norm.A.weight"].clone()
    absorb_norms(state)
    assert torch.equal(state["final_layer_norm.A.weight"], kept)
    assert (state["final_layer_norm.B.weight"] == 1).all()


def test_a_checkpoint_is_rounded_from_its_own_precision(tmp_path: Path) -> None:
    plain, rounded = models()
    beit3_fast.save_checkpoint(plain, tmp_path / "x.safetensors")
    loaded = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype=E4M3)
    for ours, theirs in zip(weights(loaded), weights(rounded), strict=True):
        assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(outputs(loaded), outputs(rounded))


def test_the_state_dict_holds_what_is_multiplied(tmp_path: Path) -> None:
    plain, rounded = models()
    state = rounded.state_dict()
    assert list(state) == list(plain.state_dict())
    assert {(type(t), t.dtype) for t in state.values()} == {
        (Tensor, torch.bfloat16),
        (Tensor, torch.float32),
    }
    expected = outputs(rounded)
    again = beit3_fast.create_model(NAME, dtype="float8")
    again.load_state_dict(state)
    assert torch.equal(outputs(again), expected)
    beit3_fast.save_checkpoint(rounded, tmp_path / "x.safetensors")
    again = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype="float8")
    assert torch.equal(outputs(again), expected)
    again = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype="bfloat16")
    assert (outputs(again) - expected).norm() / expected.norm() < 0.08


def test_the_weights_take_a_quarter_of_fp32() -> None:
    _, rounded = models()
    for weight in weights(rounded):
        assert weight.packed.numel() == weight.numel() + 4 * weight.shape[0]


def test_copies_are_the_same_bits() -> None:
    _, rounded = models()
    before = outputs(rounded)
    for other in (copy.deepcopy(rounded), pickle.loads(pickle.dumps(rounded))):
        assert torch.equal(outputs(other), before)
        with torch.no_grad():
            weights(other)[0].copy_(torch.zeros(weights(other)[0].shape))
        assert not torch.equal(outputs(other), before)
    assert torch.equal(outputs(rounded), before)


def test_activations_in_fp32() -> None:
    plain, _ = models()
    expected = outputs(plain)
    found = outputs(to_float8(copy.deepcopy(plain), torch.float32))
    assert 0 < (found - expected).norm() / expected.norm() < 0.08


def test_training_is_refused_and_gradients_of_inputs_see_the_rounded_weights() -> None:
    plain, rounded = models()
    with pytest.raises(ConfigError, match=r"has no gradient.*dtype='float8'"):
        weights(rounded)[0].requires_grad_(True)
    grads = []
    for model in (plain, rounded):
        image, *rest = inputs("vqav2", next(model.parameters()).dtype)
        image.requires_grad_()
        model(image, *rest).float().sum().backward()
        grads.append(image.grad.float())
    assert (grads[1] - grads[0]).norm() / grads[0].norm() < 0.2


def test_a_call_that_unpacks_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _, rounded = models()
    _warn_of_unpacking.cache_clear()
    expected = outputs(rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(rounded)
    assert (found - expected).norm() / expected.norm() < 0.05
    assert not [r for r in caplog.records if "unpacked for a call" in r.message]
    image, *rest = inputs("vqav2", torch.bfloat16)
    rounded(image.requires_grad_(), *rest)
    assert [r for r in caplog.records if "rounded to float8 are unpacked" in r.message]


def test_some_weights_in_float8_are_refused() -> None:
    whole, other = torch.randn(64, 32), quantize_float8(torch.randn(64, 32), torch.float32)
    for parts in ((whole, other), (other, whole)):
        with pytest.raises(ShapeError, match="all together or not at all, got float8 and not"):
            expert_linear(torch.randn(4, 32), [parts], bounds=(0, 4))


def test_explain_says_why_it_is_slow_here() -> None:
    _, rounded = models()
    found = {e.op: e for e in beit3_fast.explain(rounded, quiet=True)}
    linear = found["expert_linear (inference)"]
    assert linear.impl == "composite"
    reasons = dict(linear.rejected)
    assert reasons["cpu"] == "has no float8 products"
    assert reasons["triton"] == "has no float8 products"
    assert "takes CUDA tensors" in reasons["cuda"]
    assert dict(found["shared_attention (inference)"].rejected).get("cpu", "") != reasons["cpu"]


@pytest.mark.full
def test_one_graph_under_torch_compile() -> None:
    _, rounded = models()
    expected = outputs(rounded)
    compiled = torch.compile(rounded, fullgraph=True, backend="aot_eager")
    found = outputs(compiled)
    assert (found - expected).norm() / expected.norm() < 0.05


def test_what_float8_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="runs on CUDA and on a CPU, got device 'meta'"):
        beit3_fast.create_model(NAME, device="meta", dtype="float8")
    with pytest.raises(ConfigError, match=r"needs impl='auto', .*, got 'triton'"):
        beit3_fast.create_model(NAME, impl="triton", dtype="float8")
    monkeypatch.setenv("BEIT3_FAST_IMPL", "cpu")
    with pytest.raises(ConfigError, match=r"needs impl='auto', .*, got 'cpu'"):
        beit3_fast.create_model(NAME, dtype=E4M3)
    monkeypatch.delenv("BEIT3_FAST_IMPL")
    dispatch.reset()
    own = [quantize_float8(torch.randn(16, 16))]
    with pytest.raises(KernelUnavailable, match="has no float8 products"):
        expert_linear(torch.randn(2, 16).bfloat16(), own, bounds=(0, 2), impl="cpu")
