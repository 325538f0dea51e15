"""Weights of 8 bits, whichever: loading, saving and copying."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from rounded_models import NAME, models, outputs, weights
from torch import Tensor

import beit3_fast
from beit3_fast.model.registry import to_float8, to_int8
from beit3_fast.ops import library

needs_library = pytest.mark.skipif(not library.available(), reason="needs the compiled library")
pytestmark = pytest.mark.parametrize("dtype", [pytest.param("int8", marks=needs_library), "float8"])
# Relative rms error of a tiny model's outputs.
ERRORS = {"int8": 0.03, "float8": 0.08}


def test_a_checkpoint_is_rounded_from_its_own_precision(dtype: str, tmp_path: Path) -> None:
    plain, rounded = models(dtype)
    beit3_fast.save_checkpoint(plain, tmp_path / "x.safetensors")
    loaded = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype=dtype)
    for ours, theirs in zip(weights(loaded), weights(rounded), strict=True):
        assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(outputs(loaded), outputs(rounded))


def test_the_state_dict_holds_what_is_multiplied(dtype: str, tmp_path: Path) -> None:
    plain, rounded = models(dtype)
    state = rounded.state_dict()
    assert list(state) == list(plain.state_dict())
    assert {(type(t), t.dtype) for t in state.values()} == {
        (Tensor, torch.bfloat16),
        (Tensor, torch.float32),
    }
    expected = outputs(rounded)
    again = beit3_fast.create_model(NAME, dtype=dtype)
    again.load_state_dict(state)
    assert torch.equal(outputs(again), expected)
    beit3_fast.save_checkpoint(rounded, tmp_path / "x.safetensors")
    again = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype=dtype)
    assert torch.equal(outputs(again), expected)
    again = beit3_fast.create_model(NAME, tmp_path / "x.safetensors", dtype="bfloat16")
    assert (outputs(again) - expected).norm() / expected.norm() < ERRORS[dtype]


def test_copies_are_the_same_bits(dtype: str) -> None:
    _, rounded = models(dtype)
    before = outputs(rounded)
    for other in (copy.deepcopy(rounded), pickle.loads(pickle.dumps(rounded))):
        assert torch.equal(outputs(other), before)
        with torch.no_grad():
            weights(other)[0].copy_(torch.zeros(weights(other)[0].shape))
        assert not torch.equal(outputs(other), before)
    assert torch.equal(outputs(rounded), before)


def test_activations_in_fp32(dtype: str) -> None:
    plain, _ = models(dtype)
    expected = outputs(plain)
    round_weights, bound = {"int8": (to_int8, 0.02), "float8": (to_float8, 0.08)}[dtype]
    found = outputs(round_weights(copy.deepcopy(plain), torch.float32))
    assert 0 < (found - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("inference", [False, True])
def test_moving_to_where_it_is_changes_nothing(dtype: str, inference: bool) -> None:
    _, rounded = models(dtype)
    before = outputs(rounded)
    with torch.inference_mode(inference):
        rounded.to("cpu").to("cpu:0").to(torch.bfloat16).to("cpu", torch.bfloat16)
        for weight in weights(rounded):
            weight.data = weight.to(torch.bfloat16, copy=True)
    assert weights(rounded)
    assert torch.equal(outputs(rounded), before)


def test_made_within_inference_mode(dtype: str) -> None:
    made = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            torch.manual_seed(1)
            made.append(beit3_fast.create_model(NAME, dtype=dtype))
    for ours, theirs in zip(weights(made[0]), weights(made[1]), strict=True):
        assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(*map(outputs, made))
