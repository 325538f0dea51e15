"""``accelerate`` on unmodified torchscale models: what it changes, and what it recognises."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _compat import (
    official_task,
    torchscale_beit3,
    torchscale_model,
)
from accelerate_cases import (
    CONFIG,
    accelerated_copy,
    assert_same,
    encoder_call,
    image,
    own_forward,
    pair,
    reasons,
)
from torch import nn

from beit3_fast import derived
from beit3_fast.config import SIZES
from beit3_fast.errors import ConfigError, KernelUnavailable
from beit3_fast.integrations.torchscale import accelerate, accelerated_status, restore
from beit3_fast.model import BEiT3
from beit3_fast.parity import assert_parity, model_parity

# What stays as it was


def test_nothing_but_one_forward_changes() -> None:
    model = torchscale_beit3(CONFIG)
    state, names = model.state_dict(), [name for name, _ in model.named_parameters()]
    parameters, modules = list(model.parameters()), dict(model.named_modules())
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    assert accelerate(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert dict(model.named_modules()) == modules
    changed = {n: set(vars(m)) ^ attributes[n] for n, m in model.named_modules()}
    assert {name: change for name, change in changed.items() if change} == {"encoder": {"forward"}}
    assert inspect.signature(model.encoder.forward) == inspect.signature(
        type(model.encoder).forward.__get__(model.encoder)
    )
    model.load_state_dict(state, strict=True)


def test_restore_leaves_no_trace() -> None:
    model = torchscale_beit3(CONFIG)
    before = dict(vars(model.encoder))
    assert restore(model) is model
    accelerate(model)
    model(**pair())
    assert restore(model) is model
    assert vars(model.encoder) == before
    assert not any(parameter in derived._store for parameter in model.parameters())
    assert torch.equal(
        model(**pair())["encoder_out"], torchscale_model("base")(**pair())["encoder_out"]
    )


def test_twice_is_once(runs_fast: Any) -> None:
    model = accelerated_copy()
    forward = model.encoder.forward
    assert accelerate(model, impl="reference") is model
    assert model.encoder.forward is forward
    assert accelerated_status(model)[0].impl == "reference"
    assert runs_fast(model, pair())
    restore(model)
    assert "forward" not in vars(model.encoder)


def test_modes_and_split_positions_survive_the_trial() -> None:
    model = torchscale_beit3(CONFIG)
    model.encoder.layers[0].train()
    model.encoder.layers[1].ffn.split_position = 3
    modes = [module.training for module in model.modules()]
    accelerate(model)
    assert [module.training for module in model.modules()] == modes
    assert model.encoder.layers[1].ffn.split_position == 3
    assert model.encoder.layers[0].ffn.split_position == -1


def test_optimizer_groups_see_the_same_parameters_and_updates() -> None:
    """Two steps of AdamW with layer decay give the same weights."""

    def groups(model: Any) -> list[dict[str, Any]]:
        decay: dict[int, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            layer = int(name.split("layers.")[1].split(".")[0]) + 1 if "layers." in name else 0
            decay.setdefault(layer, []).append(parameter)
        return [{"params": p, "lr": 1e-3 * 0.7 ** (3 - n)} for n, p in sorted(decay.items())]

    models = [torchscale_beit3(CONFIG), accelerate(torchscale_beit3(CONFIG))]
    for model in models:
        optimizer = torch.optim.AdamW(groups(model.train()), betas=(0.9, 0.98), eps=1e-4)
        for call in (pair(), image()):
            optimizer.zero_grad()
            model(**call)["encoder_out"][:, 0].pow(2).sum().backward()
            optimizer.step()
    theirs, ours = (dict(model.named_parameters()) for model in models)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-5)
    assert not reasons(models[1])


@pytest.mark.parametrize("impl", ["composite", "auto"])
@torch.no_grad()
def test_weights_changed_in_place_are_seen(impl: str) -> None:
    """Nothing derived from old weights may be used: load_state_dict, an optimizer's step, a new dtype."""
    model, theirs = accelerated_copy(impl=impl), copy.deepcopy(torchscale_model("base"))
    assert_same(model, theirs, pair())
    smaller = {name: 0.9 * tensor for name, tensor in theirs.state_dict().items()}
    for one in (model, theirs):
        one.load_state_dict(smaller)
    assert_same(model, theirs, pair())
    for one in (model, theirs):
        for parameter in one.parameters():
            parameter.add_(0.01)
    assert_same(model, theirs, pair())
    model.double().float()
    assert_same(model, theirs, pair())


@torch.no_grad()
def test_float64() -> None:
    """torchscale's softmax and GELU stay in fp32 then, so it is no closer than that."""
    theirs = torchscale_model("base")
    model = accelerate(copy.deepcopy(theirs).double())
    call = {**pair(), "visual_tokens": pair()["visual_tokens"].double()}
    out, truth = model(**call)["encoder_out"], theirs(**pair())["encoder_out"]
    assert out.dtype is torch.float64
    assert_parity(model_parity(out[0].float(), truth[0]))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_independent(how: str, runs_fast: Any) -> None:
    model = accelerated_copy()
    model(**pair())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = model(**pair())["encoder_out"]
        for parameter in model.parameters():
            parameter.zero_()
    assert runs_fast(other, pair())
    assert_parity(model_parity(other(**pair())["encoder_out"].detach(), expected), how)
    # Its own modules are watched, not those of the model that it was copied from.
    other.encoder.layers[0].ffn.A.fc1.register_forward_hook(lambda *_: None)
    assert not runs_fast(other, pair())
    assert runs_fast(model, pair())
    other = copy.deepcopy(model)
    own_forward(other)
    assert not runs_fast(other, pair())
    assert runs_fast(model, pair())
    restore(other)
    assert "forward" in vars(model.encoder)
    assert "forward" not in vars(other.encoder)


# What is recognised


@pytest.mark.parametrize("task", ["imageclassification", "vqav2", "captioning"])
def test_a_wrapper_that_holds_a_beit3(task: str) -> None:
    model = accelerate(official_task(task, CONFIG))
    assert [(s.name, s.obstacle) for s in accelerated_status(model)] == [("beit3.encoder", None)]


def test_several_models_in_one_and_an_encoder_alone(runs_fast: Any) -> None:
    towers = nn.ModuleDict({n: torchscale_beit3(CONFIG) for n in ("student", "teacher")})
    accelerate(towers)
    names = [status.name for status in accelerated_status(towers)]
    assert names == ["student.encoder", "teacher.encoder"]
    assert runs_fast(towers["teacher"], pair())
    encoder = accelerate(torchscale_beit3(CONFIG).encoder)
    assert accelerated_status(encoder)[0].name == ""
    assert runs_fast(encoder, encoder_call())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 3),
        lambda: BEiT3(SIZES["tiny"]),
        lambda: nn.TransformerEncoderLayer(8, 2),
    ],
    ids=["linear", "our own", "torch's"],
)
def test_nothing_to_accelerate(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ConfigError, match="Encoder"):
        accelerate(make())


def test_unknown_and_unavailable_implementations() -> None:
    model = torchscale_beit3(CONFIG)
    with pytest.raises(ConfigError, match="'fastest'"):
        accelerate(model, impl="fastest")
    with pytest.raises(KernelUnavailable, match="cuda"):
        accelerate(model, impl="cuda")
    assert "forward" not in vars(model.encoder)


def test_a_forward_put_there_by_others_is_not_overwritten() -> None:
    model = torchscale_beit3(CONFIG)
    model.encoder.forward = lambda **_: {}
    for act in (accelerate, restore):
        with pytest.raises(ConfigError, match="other code"):
            act(model)
