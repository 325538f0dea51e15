"""Models with dtype="float8" by PyTorch's calls: their accuracy, what they keep, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from rounded_models import NAME, TASKS, inputs, models, outputs, weights

import beit3_fast
from beit3_fast.errors import ConfigError, KernelUnavailable, ShapeError
from beit3_fast.float8 import E4M3
from beit3_fast.model.float8 import absorb_norms
from beit3_fast.ops import dispatch, expert_linear
from beit3_fast.ops.expert_linear import _warn_of_unpacking
from beit3_fast.ops.packed_weight import quantize_float8


@pytest.mark.parametrize("task", TASKS)
def test_close_to_fp32(task: str) -> None:
    plain, rounded = models("float8", task)
    expected = outputs(plain, task)
    error = (outputs(rounded, task) - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.08
    assert len(weights(rounded)) == 2 * 6 * len(rounded.beit3.encoder.layers)
    assert all(w.is_float8 and w.dtype is torch.bfloat16 for w in weights(rounded))


def test_layer_norms_go_into_their_products() -> None:
    plain, _ = models("float8")
    same = copy.deepcopy(plain)
    for layer in same.beit3.encoder.layers:
        state = layer.state_dict()
        absorb_norms(state)
        layer.load_state_dict(state)
        assert (layer.final_layer_norm.A.weight == 1).all()
        assert (layer.self_attn.inner_attn_ln.B.bias == 0).all()
    torch.testing.assert_close(outputs(same), outputs(plain), rtol=1e-4, atol=1e-4)


def test_a_layer_norm_without_its_product_stays() -> None:
    plain, _ = models("float8")
    state = plain.beit3.encoder.layers[0].state_dict()
    del state["ffn.A.fc1.bias"]
    kept = state["final_layer_norm.A.weight"].clone()
    absorb_norms(state)
    assert torch.equal(state["final_layer_norm.A.weight"], kept)
    assert (state["final_layer_norm.B.weight"] == 1).all()


def test_the_weights_take_a_quarter_of_fp32() -> None:
    _, rounded = models("float8")
    for weight in weights(rounded):
        assert weight.packed.numel() == weight.numel() + 4 * weight.shape[0]


def test_training_is_refused_and_gradients_of_inputs_see_the_rounded_weights() -> None:
    plain, rounded = models("float8")
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
    _, rounded = models("float8")
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
    _, rounded = models("float8")
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
    _, rounded = models("float8")
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
