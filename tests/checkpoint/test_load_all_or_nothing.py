"""What a load does when it cannot: it says why, and the model is wholly as it was or wholly new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import SHAPES, Standin, model, same, snapshot, weights
from torch import Tensor, nn

from beit3_fast.checkpoint import (
    HEADS,
    CheckpointMismatch,
    check_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from beit3_fast.errors import CheckpointError
from beit3_fast.model import create_model


def test_models_that_cannot_be_written_to_are_refused_before_the_first_copy() -> None:
    state = weights({"a": (2, 2), "b": (2, 2)})
    expanded = Standin({"a": (2, 2), "b": (2, 2)})
    expanded.b = nn.Parameter(torch.ones(1, 2).expand(2, 2))
    with torch.inference_mode():
        frozen = Standin({"a": (2, 2), "b": (2, 2)})
    for module, message in ((expanded, "memory of its own"), (frozen, "inference_mode")):
        before = snapshot(module)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(module, state)
        assert snapshot(module) == before
    with torch.inference_mode():
        load_checkpoint(frozen, state)


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("where", ["", "beit3.encoder.layers.1"])
def test_a_model_whose_hook_fails_stays_as_it_was(where: str, when: str) -> None:
    target = model()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}

    def refuse(*_: Any) -> None:
        raise KeyError("planted")

    getattr(target.get_submodule(where), f"register_load_state_dict_{when}_hook")(refuse)
    with pytest.raises(CheckpointError, match=r"refused its weights.*planted"):
        load_checkpoint(target, weights(SHAPES))
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_interrupted_load_is_finished_first(monkeypatch: pytest.MonkeyPatch) -> None:
    target, state = model(), weights(SHAPES)
    copy, calls = Tensor.copy_, 0

    def interrupted(own: Tensor, other: Tensor, *rest: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == len(state) // 2:
            raise KeyboardInterrupt
        return copy(own, other, *rest)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(target, state)
    assert calls > len(state)
    assert same(target.state_dict(), state)


def test_tied_weights_have_one_value() -> None:
    state = weights({"a": (2, 2), "b": (2, 2)})
    tied = Standin({"a": (2, 2), "b": (2, 2)})
    tied.b = tied.a
    before = snapshot(tied)
    with pytest.raises(CheckpointMismatch, match="b: is the same tensor as a in the model"):
        load_checkpoint(tied, state)
    assert snapshot(tied) == before
    load_checkpoint(tied, {"a": state["a"], "b": state["a"].clone()})
    assert torch.equal(tied.a, state["a"])


@pytest.mark.parametrize("option", ["allow_missing", "allow_mismatched"])
@pytest.mark.parametrize("prefixes", [5, ["head", 5], None])
def test_prefixes_are_texts(option: str, prefixes: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"{option} must be a prefix of names"):
        load_checkpoint(model(), weights(SHAPES), **{option: prefixes})


@pytest.mark.parametrize("target", [None, {}, ["a"], nn.Module])
def test_only_models_are_loaded_into(target: Any) -> None:
    for call in (load_checkpoint, check_checkpoint):
        with pytest.raises(CheckpointError, match="a model is needed to load into"):
            call(target, weights(SHAPES))


@pytest.mark.parametrize("attribute", ["module", "_orig_mod"])
def test_a_wrapped_model_is_told_how_to_unwrap(attribute: str) -> None:
    wrapper = nn.Module()
    setattr(wrapper, attribute, model())
    with pytest.raises(
        CheckpointMismatch, match=f"is wrapped: load into its attribute {attribute}$"
    ):
        load_checkpoint(wrapper, weights(SHAPES))
    load_checkpoint(getattr(wrapper, attribute), wrapper.state_dict())


def test_a_dictionary_that_holds_itself() -> None:
    endless: dict[str, Any] = {"a": torch.ones(1)}
    endless["model"] = endless
    with pytest.raises(CheckpointError, match="more than 8 dictionaries"):
        load_checkpoint(model(), endless)


def test_another_name_is_remarked(tmp_path: Path) -> None:
    name = "beit3_tiny_patch16_32_{}"
    path = save_checkpoint(create_model(name.format("pretraining")), tmp_path / "x.pth")
    remarks = load_checkpoint(
        create_model(name.format("retrieval")), path, allow_missing=HEADS
    ).remarks
    assert any("saved from" in r and "pretraining; the model is" in r for r in remarks)
    own = load_checkpoint(create_model(name.format("pretraining")), path).remarks
    assert not any("saved from" in r for r in own)
