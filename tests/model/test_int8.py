"""Models with dtype="int8": their accuracy, what they keep, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import beit3_fast
from beit3_fast.errors import ConfigError, KernelUnavailable, ShapeError
from beit3_fast.model.registry import to_int8
from beit3_fast.ops import expert_linear, library
from beit3_fast.ops.expert_linear import _warn_of_unpacking
from beit3_fast.ops.packed_weight import PackedWeight, quantize

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the compiled library")
TASKS = ("vqav2", "nlvr2", "retrieval", "captioning", "imageclassification")
NAME = "beit3_tiny_patch16_32_vqav2"


def inputs(task: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(3, 3, 32, 32, generator=generator).to(dtype)
    text = torch.tensor([[0, 7, 9, 11, 2], [0, 5, 2, 1, 1], [0, 8, 6, 2, 1]])
    padding = (text == 1).long()
    if task == "imageclassification":
        return (image,)
    if task == "nlvr2":
        return image, image.flip(0), text, padding
    if task == "captioning":
        return image, text, padding, (text > 6).long()
    return image, text, padding


def flat(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([p.float().flatten() for p in parts if p is not None])


@torch.no_grad()
def outputs(model: Any, task: str = "vqav2") -> Tensor:
    dtype = next(model.parameters()).dtype
    options = {"only_infer": True} if task == "retrieval" else {}
    return flat(model(*inputs(task, dtype), **options))


def models(task: str = "vqav2", **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    plain = beit3_fast.create_model(f"beit3_tiny_patch16_32_{task}", **options)
    with torch.no_grad():
        for (
            parameter
        ) in plain.parameters():  # biases and LayerNorms that are not what they begin as
            parameter.add_(0.05 * torch.randn_like(parameter))
    rounded = beit3_fast.create_model(f"beit3_tiny_patch16_32_{task}", dtype="int8", **options)
    rounded.load_state_dict(plain.state_dict())
    return plain, rounded


def weights(model: Any) -> list[PackedWeight]:
    return [p for p in model.parameters() if isinstance(p, PackedWeight)]


@pytest.mark.parametrize("task", TASKS)
def test_close_to_fp32(task: str) -> None:
    plain, rounded = models(task)
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
    plain, rounded = models(embed_dim=48, num_heads=4, ffn_dim=100)
    expected = outputs(plain)
    assert (outputs(rounded) - expected).norm() / expected.norm() < 0.03


def test_a_checkpoint_is_rounded_from_its_own_precision(tmp_path: Path) -> None:
    plain, rounded = models()
    beit3_fast.save_checkpoint(plain, tmp_path / "x.safetensors")
    loaded = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype="int8")
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
    again = beit3_fast.create_model(NAME, dtype="int8")
    again.load_state_dict(state)
    assert torch.equal(outputs(again), expected)
    beit3_fast.save_checkpoint(rounded, tmp_path / "x.safetensors")
    again = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype="int8")
    assert torch.equal(outputs(again), expected)
    again = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype="bfloat16")
    assert (outputs(again) - expected).norm() / expected.norm() < 0.03


def test_the_weights_take_a_quarter_of_fp32() -> None:
    _, rounded = models(embed_dim=192, num_heads=4, ffn_dim=768)
    for weight in weights(rounded):
        assert weight.packed.numel() <= weight.numel() * 1.02 + 8 * weight.shape[0] + 64


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
    found = outputs(to_int8(copy.deepcopy(plain), torch.float32))
    assert 0 < (found - expected).norm() / expected.norm() < 0.02


def test_gradients_of_inputs_see_the_rounded_weights() -> None:
    plain, rounded = models()
    grads = []
    for model in (plain, rounded):
        image, *rest = inputs("vqav2", next(model.parameters()).dtype)
        image.requires_grad_()
        model(image, *rest).float().sum().backward()
        grads.append(image.grad.float())
    assert (grads[1] - grads[0]).norm() / grads[0].norm() < 0.1


def test_a_call_that_unpacks_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _, rounded = models()
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
    _, rounded = models()
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
