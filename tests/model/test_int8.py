"""Models with dtype="int8": their accuracy, what they keep, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from rounded_models import NAME, TASKS, inputs, models, outputs, weights

import beit3_fast
from beit3_fast.errors import ConfigError, KernelUnavailable, ShapeError
from beit3_fast.ops import expert_linear, library
from beit3_fast.ops.expert_linear import _warn_of_unpacking
from beit3_fast.ops.packed_weight import quantize

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the compiled library")


@pytest.mark.parametrize("task", TASKS)
def test_close_to_fp32(task: str) -> None:
    plain, rounded = models("int8", task)
    expected = outputs(plain, task)
    error = (outputs(rounded, task) - expected).norm() / expected.norm()
    assert 0 < error < 0.03
    assert len(weights(rounded)) == 2 * 6 * len(rounded.beit3.encoder.layers)
    assert all(w.is_int8 and w.dtype is torch.bfloat16 for w in weights(rounded))


def test_parts_whose_panels_are_not_whole() -> None:
    """Query, key and value of a width of 48 are packed together, and as exactly as they are apart."""
    generator = torch.Generator().manual_seed(0)
    parts = [quantize(torch.randn(48, 48, generator=generator), torch.float32) for _ in range(3)]
    x = torch.randn(20, 48, generator=generator)
    together = expert_linear(x, [tuple(parts)], bounds=(0, 20))
    apart = torch.cat([expert_linear(x, [part], bounds=(0, 20)) for part in parts], 1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    plain, rounded = models("int8", embed_dim=48, num_heads=4, ffn_dim=100)
    expected = outputs(plain)
    assert (outputs(rounded) - expected).norm() / expected.norm() < 0.03


def test_the_weights_take_a_quarter_of_fp32() -> None:
    _, rounded = models("int8", embed_dim=192, num_heads=4, ffn_dim=768)
    for weight in weights(rounded):
        assert weight.packed.numel() <= weight.numel() * 1.02 + 8 * weight.shape[0] + 64


def test_gradients_of_inputs_see_the_rounded_weights() -> None:
    plain, rounded = models("int8")
    grads = []
    for model in (plain, rounded):
        image, *rest = inputs("vqav2", next(model.parameters()).dtype)
        image.requires_grad_()
        model(image, *rest).float().sum().backward()
        grads.append(image.grad.float())
    assert (grads[1] - grads[0]).norm() / grads[0].norm() < 0.1


def test_a_call_that_unpacks_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _, rounded = models("int8")
    _warn_of_unpacking.cache_clear()
    outputs(rounded)
    assert not caplog.records
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs(rounded)
    assert not caplog.records
    image, *rest = inputs("vqav2", torch.bfloat16)
    rounded(image.requires_grad_(), *rest)
    assert [r.message for r in caplog.records if "unpacked for a call" in r.message]


def test_some_parts_in_int8_are_refused() -> None:
    whole, other = torch.randn(64, 32), quantize(torch.randn(64, 32), torch.float32)
    for parts in ((whole, other), (other, whole)):
        with pytest.raises(ShapeError, match="all together or not at all"):
            expert_linear(torch.randn(4, 32), [parts], bounds=(0, 4))


def test_explain_names_the_cpu_kernels() -> None:
    _, rounded = models("int8")
    chosen = {e.op: e.impl for e in beit3_fast.explain(rounded, quiet=True)}
    assert chosen["expert_linear (inference)"] == "cpu"


def test_what_int8_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="runs on a CPU, got device 'meta'"):
        beit3_fast.create_model(NAME, device="meta", dtype="int8")
    with pytest.raises(ConfigError, match="impl='auto' or 'cpu', got 'composite'"):
        beit3_fast.create_model(NAME, impl="composite", dtype="int8")
    with pytest.raises(ConfigError, match="'float8'], got 'int4'"):
        beit3_fast.create_model(NAME, dtype="int4")
    with monkeypatch.context() as patch:
        patch.setenv("BEIT3_FAST_IMPL", "composite")
        with pytest.raises(ConfigError, match="impl='auto' or 'cpu', got 'composite'"):
            beit3_fast.create_model(NAME, dtype=torch.int8)
    monkeypatch.setattr(library, "available", lambda: False)
    monkeypatch.setattr(library, "why_unavailable", lambda: "is not built")
    with pytest.raises(KernelUnavailable, match="needs the compiled library, which is not built"):
        beit3_fast.create_model(NAME, dtype="int8")
