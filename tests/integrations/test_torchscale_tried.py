"""What ``accelerate`` tries before it trusts an encoder, and that it trusts nothing else later."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import inspect
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _compat import (
    fill,
    import_torchscale,
    torchscale_args,
    torchscale_beit3,
    torchscale_model,
)
from accelerate_cases import (
    CONFIG,
    accelerated_copy,
    assert_same,
    attention_class_changed,
    encoder_call,
    image,
    pair,
    reasons,
    text,
)

import beit3_fast
from beit3_fast.errors import ConfigError
from beit3_fast.integrations.torchscale import accelerate, accelerated_status

# Copies of torchscale with other code


@pytest.fixture(scope="module")
def vendored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """torchscale's BEiT3 from a copy of its source under another name, one line of it changed."""
    import_torchscale()
    import torchscale

    source = Path(inspect.getfile(torchscale)).parent

    def make(name: str, old: str = "", new: str = "", **settings: Any) -> Any:
        root = tmp_path_factory.mktemp(name)
        found = False
        for file in source.rglob("*.py"):
            code = file.read_text()
            found |= old in code
            code = code.replace("torchscale", name).replace(old or "\0", new)
            target = root / name / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(code)
        assert found, old
        sys.path.insert(0, str(root))
        try:
            module = importlib.import_module(f"{name}.model.BEiT3")
        finally:
            sys.path.remove(str(root))
        model = module.BEiT3(torchscale_args(CONFIG, **settings)).eval()
        fill(model)
        return model

    return make


def test_a_vendored_copy_is_recognised(vendored: Any, runs_fast: Any) -> None:
    model = accelerate(vendored("vendored_torchscale"))
    assert type(model).__module__ == "vendored_torchscale.model.BEiT3"
    assert runs_fast(model, pair())
    assert_same(model, torchscale_model("base"), pair())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "x = self.activation_fn(x.float()).type_as(x)",
            "x = F.gelu(x, approximate='tanh')",
        ),
        ("q *= self.scaling", "q *= self.scaling * 1.2"),
        ("return residual * self.alpha + x", "return residual + x * 0.9"),
        ("if key_padding_mask is not None:", "if False:"),
        ("attn_mask = attn_mask.unsqueeze(0)", "attn_mask = 0 * attn_mask.unsqueeze(0)"),
        ("x = self.layer_norm(x)", "x = self.layer_norm(x) + 0.01"),
        (
            "attn_weights = torch.bmm(q, k.transpose(1, 2))",
            "attn_weights = torch.bmm(q, k.transpose(1, 2)).tril(8)",
        ),
        ("torch.arange(2, x.size(1) + 2", "torch.arange(1, x.size(1) + 1"),
    ],
    ids=["activation", "scaling", "residual", "padding", "mask", "output", "window", "positions"],
)
@torch.no_grad()
def test_a_vendored_copy_that_computes_something_else_is_left_alone(
    old: str, new: str, vendored: Any, runs_fast: Any, request: pytest.FixtureRequest
) -> None:
    model = vendored(f"changed_{abs(hash(request.node.name))}", old, new)
    before = model(**pair())["encoder_out"]
    accelerate(model)
    same = "torch.arange" in old  # Position tables are called as modules, changes in them included.
    assert (accelerated_status(model)[0].obstacle is None) == same
    assert runs_fast(model, pair()) == same
    if not same:
        assert torch.equal(model(**pair())["encoder_out"], before)


def test_a_copy_with_another_signature_is_left_alone(vendored: Any) -> None:
    model = vendored(
        "another_signature",
        "        encoder_padding_mask=None,\n        attn_mask=None,\n        return_all_hiddens=False,",
        "        attn_mask=None,\n        encoder_padding_mask=None,\n        return_all_hiddens=False,",
    )
    accelerate(model)
    assert "signature" in str(accelerated_status(model)[0].obstacle)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x = self.fc2(x)", "x = self.fc2(x) * (0.5 if self.training else 1)"),
        (
            "return drop_path(x, self.drop_prob, self.training)",
            "return drop_path(x, self.drop_prob, self.training, False)",
        ),
        ("self.drop_prob", "self.p"),
    ],
    ids=["feed-forward", "drop path", "drop path's rate"],
)
def test_a_copy_that_differs_in_train_mode_only(
    old: str, new: str, vendored: Any, request: pytest.FixtureRequest
) -> None:
    name = f"trained_{abs(hash(request.node.name))}"
    model = vendored(name, old, new, drop_path_rate=0.5).train()
    outputs = []
    for one in (copy.deepcopy(model), accelerate(model)):
        torch.manual_seed(8)
        outputs.append(one(**pair())["encoder_out"])
    assert torch.equal(*outputs)
    obstacle = accelerated_status(model)[0].obstacle
    assert "train mode differs" in str(obstacle) or "no drop_prob" in str(obstacle)


def test_weights_without_values_are_tried_later(runs_fast: Any) -> None:
    theirs = torchscale_model("base")
    model = accelerate(copy.deepcopy(theirs).to("meta"))
    model.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert not runs_fast(model, pair())
    assert "on the meta device" in reasons(model)[0]
    assert runs_fast(accelerate(model), pair())
    assert_same(model, theirs, pair())


def test_a_trial_leaves_no_trace() -> None:
    model = torchscale_beit3(CONFIG, drop_path_rate=0.5, dropout=0.1)
    paths = [layer.drop_path.drop_prob for layer in model.encoder.layers]
    layers = list(model.encoder.layers)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    accelerate(model)
    assert torch.equal(torch.rand(4), expected)
    assert [layer.drop_path.drop_prob for layer in model.encoder.layers] == paths
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.1}
    assert list(model.encoder.layers) == layers
    assert model.encoder.num_layers == len(layers)


# Code that changes after the trial


def _patched(patch: pytest.MonkeyPatch, cls: type, name: str, in_place: bool) -> None:
    real = getattr(cls, name)

    @functools.wraps(real)
    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        if isinstance(out, tuple):
            return (2 * out[0], *out[1:])
        return {**out, "encoder_out": 2 * out["encoder_out"]} if isinstance(out, dict) else 2 * out

    if in_place:
        same = type(real)(real.__code__, real.__globals__)
        same.__defaults__ = real.__defaults__
        patch.setitem(real.__globals__, "before_the_change", same)
        changed = compile(
            f"def {name}(self, x): return 2 * before_the_change(self, x)", "<test>", "exec"
        )
        patch.setattr(real, "__code__", changed.co_consts[0])
    else:
        patch.setattr(cls, name, other)


@pytest.mark.parametrize(
    ("path", "name", "in_place"),
    [
        ("", "forward", False),
        ("layers.0", "forward", False),
        ("layers.0", "residual_connection", False),
        ("layers.0.self_attn", "forward", False),
        ("layers.0.self_attn", "__call__", False),
        ("layers.0.ffn", "forward", False),
        ("layers.0.ffn.A", "forward", False),
        ("layers.0.ffn.A", "forward", True),
        ("layers.0.ffn.A.fc1", "forward", False),
    ],
)
@torch.no_grad()
def test_a_class_patched_after_the_trial(
    path: str, name: str, in_place: bool, runs_fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patched code runs, and packed rows do again once it is gone."""
    model, theirs = accelerated_copy(), torchscale_beit3(CONFIG)
    cls = type(model.encoder.get_submodule(path))
    with monkeypatch.context() as patch:
        _patched(patch, cls, name, in_place)
        assert not runs_fast(model, pair())
        assert torch.equal(model(**pair())["encoder_out"], theirs(**pair())["encoder_out"])
        obstacle = str(accelerated_status(model)[0].obstacle)
        assert f"{cls.__name__}.{name}, which has changed" in obstacle
        assert not runs_fast(copy.deepcopy(model), pair())
        pickled = pickle.dumps(model)
        assert "differs" in str(accelerated_status(accelerate(copy.deepcopy(model)))[0].obstacle)
    assert runs_fast(model, pair())
    # It was pickled while nobody had tried what it then ran.
    assert not runs_fast(pickle.loads(pickled), pair())


@torch.no_grad()
def test_a_pickled_model_loaded_where_the_code_is_another(
    runs_fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = accelerated_copy()
    pickled = pickle.dumps(model)
    with monkeypatch.context() as patch:
        _patched(patch, type(model.encoder.layers[0].ffn.A), "forward", in_place=False)
        loaded = pickle.loads(pickled)
        assert not runs_fast(loaded, pair())
        assert "FeedForwardNetwork, a class that was not tried" in reasons(loaded)[0]
    assert runs_fast(accelerate(loaded), pair())
    assert runs_fast(pickle.loads(pickled), pair())


@torch.no_grad()
def test_what_was_not_tried_is_trusted_once_it_was(runs_fast: Any) -> None:
    """A class with torchscale's own results under another identity."""
    model = accelerated_copy()
    attention = model.encoder.layers[1].self_attn
    attention.__class__ = type("MultiheadAttention", (type(attention),), {})
    assert not runs_fast(model, pair())
    assert runs_fast(accelerate(model), pair())
    attention_class_changed(model)
    assert not runs_fast(model, pair())
    accelerate(model)
    assert "differs" in str(accelerated_status(model)[0].obstacle)


@torch.no_grad()
def test_a_hook_during_accelerate_delays_the_trial(runs_fast: Any) -> None:
    model = torchscale_beit3(CONFIG)
    handle = model.encoder.layers[0].register_forward_hook(lambda *_: None)
    accelerate(model)
    handle.remove()
    assert not runs_fast(model, pair())
    assert "not tried; accelerate the model again" in str(accelerated_status(model)[0].obstacle)
    assert runs_fast(accelerate(model), pair())


# The life of an encoder


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_a_model_is_freed_as_soon_as_nobody_holds_it(how: str) -> None:
    """By counting references: the collector may come late, and a GPU's memory be full by then."""
    model = accelerated_copy()
    gc.collect()
    gc.disable()
    try:
        if how != "itself":
            model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        for call in (pair(), image(), text()):
            with torch.no_grad():
                model(**call)
        model.train()(**pair())["encoder_out"].sum().backward()
        model.encoder(**encoder_call(), unknown=1)
        beit3_fast.explain(model, quiet=True)
        accelerate(model)
        weight = weakref.ref(model.encoder.layers[0].ffn.A.fc1.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_forward_without_its_encoder_says_so() -> None:
    forward = accelerated_copy().encoder.forward
    with pytest.raises(ConfigError, match="keep the model"):
        forward(**encoder_call())
