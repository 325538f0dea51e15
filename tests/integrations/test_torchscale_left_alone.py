"""What ``accelerate`` leaves to torchscale, and what it says of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _compat import (
    import_torchscale,
    torchscale_args,
    torchscale_beit3,
    torchscale_model,
)
from accelerate_cases import (
    BATCH,
    CONFIG,
    TEXT,
    VISION,
    accelerated_copy,
    adapter,
    assert_same,
    attention_class_changed,
    bias_removed,
    class_changed,
    doubled_dropout,
    encoder_call,
    encoder_class_changed,
    eps_changed,
    ffn_relu,
    hook,
    identity_norm,
    image,
    lora,
    own_embedding,
    own_forward,
    own_residual,
    own_xpos,
    pair,
    parametrized,
    reasons,
    rescaled,
    set_on_layers,
    text,
    wrapped_layer,
)
from torch import Tensor, nn

import beit3_fast
from beit3_fast.errors import ConfigError
from beit3_fast.integrations.torchscale import accelerate, accelerated_status, restore

CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a replaced class": (lora, "LoraLinear"),
    "a class changed in place": (class_changed, "Half"),
    "another eps": (eps_changed("self_attn_layer_norm.A"), "differ in eps, 0.5 and"),
    "another eps in attention": (eps_changed("self_attn.inner_attn_ln.B"), "differ in eps"),
    "another eps in an expert": (eps_changed("ffn.B.ffn_layernorm"), "differ in eps"),
    "a replaced dropout": (doubled_dropout, "dropout_module is a Doubled"),
    "an embedding of its own": (own_embedding, "forward_embedding of its own"),
    "a residual of its own": (own_residual, "residual_connection of its own"),
    "another encoder class": (encoder_class_changed, "not tried|differ"),
    "another class of the same name": (attention_class_changed, "not tried|differ"),
    "an xpos of its own": (own_xpos, "xPos"),
    "a removed bias": (bias_removed, "fc1 has no bias"),
    "a layer's own forward": (own_forward, "forward of its own"),
    "a parametrization": (parametrized, "unknown part|Parametrized"),
    "an adapter": (adapter, "adapter|forward"),
    "a wrapped layer": (wrapped_layer, "Wrapped"),
    "another output norm": (identity_norm, "Identity"),
    "a forward hook": (hook("forward", "layers.1.ffn.B.fc2"), "hook on layers.1.ffn.B.fc2"),
    "a pre-hook": (hook("pre", "layers.0.self_attn.k_proj.A"), "hook"),
    "a backward hook": (hook("backward", "layers.0.final_layer_norm.A"), "hook"),
    "a backward pre-hook": (hook("backward pre", "layers.1.ffn.A.fc1"), "hook"),
    "a hook on the output norm": (hook("forward", "layer_norm.A"), "hook on layer_norm.A"),
    "a hook on a position table": (hook("forward", "embed_positions.B"), "hook on embed_positions"),
    "relu": (ffn_relu, "activation"),
    "alpha": (set_on_layers("alpha", 1.3), "DeepNorm"),
    "post-norm": (set_on_layers("normalize_before", False), "normalize_before"),
    "another scale": (rescaled, "scaled by"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_encoder_runs_its_own_code(change: str, when: str, runs_fast: Any) -> None:
    """Whether it was changed before or after accelerate, and fast again once the change is gone."""
    make, reason = CHANGES[change]
    theirs, model = torchscale_beit3(CONFIG), torchscale_beit3(CONFIG)
    make(theirs)
    if when == "before":
        make(model)
        accelerate(model)
    else:
        accelerate(model)
        assert runs_fast(model, pair())
        make(model)
    assert not runs_fast(model, pair())
    assert torch.equal(model(**pair())["encoder_out"], theirs(**pair())["encoder_out"])
    (status,) = accelerated_status(model)
    pattern = pytest.importorskip("re").compile(reason)
    assert pattern.search(status.fallback_reasons[0]), status
    assert status.obstacle is not None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"deepnorm": True, "subln": False}, "DeepNorm"),
        ({"encoder_normalize_before": False, "subln": False}, "normalize_before"),
        ({"rel_pos_buckets": 8, "max_rel_pos": 16}, "relative_position"),
        ({"xpos_rel_pos": True}, "xpos|xPos"),
        ({"layernorm_embedding": True}, "layernorm_embedding"),
        ({"activation_fn": "relu"}, "activation"),
    ],
)
@torch.no_grad()
def test_settings_that_are_not_those_of_beit3(
    settings: dict[str, Any], reason: str, runs_fast: Any
) -> None:
    theirs = torchscale_beit3(CONFIG, **settings)
    model = accelerated_copy(theirs)
    assert not runs_fast(model, pair())
    assert torch.equal(model(**pair())["encoder_out"], theirs(**pair())["encoder_out"])
    assert pytest.importorskip("re").search(reason, reasons(model)[0])


@torch.no_grad()
def test_an_encoder_that_is_not_multiway_is_left_alone() -> None:
    import_torchscale()
    from torchscale.architecture.encoder import Encoder

    table = nn.Embedding(20, CONFIG.embed_dim)
    encoder = Encoder(torchscale_args(CONFIG, multiway=False), embed_tokens=table).eval()
    tokens = torch.randint(0, 20, (2, 5))
    before = encoder(tokens)["encoder_out"]
    accelerate(encoder)
    assert torch.equal(encoder(tokens)["encoder_out"], before)
    assert "MultiwayNetwork" in reasons(encoder)[0]


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_runs_torchscale_in_training_only(name: str, runs_fast: Any) -> None:
    theirs = torchscale_beit3(CONFIG, **{name: 0.1})
    model = accelerated_copy(theirs)
    assert runs_fast(model, pair())
    assert_same(model, theirs, pair())
    model.train(), theirs.train()
    assert not runs_fast(model, pair())
    outputs = []
    for one in (model, theirs):
        torch.manual_seed(8)
        outputs.append(one(**pair())["encoder_out"])
    assert torch.equal(*outputs)
    assert reasons(model) == ("dropout of 0.1 in train mode",)
    assert runs_fast(model.eval(), pair())


@pytest.mark.parametrize("kind", ["always dropped", "not rescaled"])
def test_drop_path_of_another_kind_runs_torchscale_in_training_only(
    kind: str, runs_fast: Any
) -> None:
    theirs = torchscale_beit3(CONFIG, drop_path_rate=1.0 if kind == "always dropped" else 0.5)
    if kind == "not rescaled":
        from timm.layers import DropPath

        for layer in theirs.encoder.layers:
            layer.drop_path = DropPath(0.5, scale_by_keep=False).eval()
    model = accelerated_copy(theirs)
    assert runs_fast(model, pair())
    assert_same(model, theirs, pair())
    outputs = []
    for one in (model.train(), theirs.train()):
        torch.manual_seed(8)
        outputs.append(one(**pair())["encoder_out"])
    assert torch.equal(*outputs)
    assert "drop path" in reasons(model)[0]


SEES_NOTHING = torch.zeros(VISION + TEXT, VISION + TEXT, dtype=torch.int64)
SEES_NOTHING[3] = 1
SEES_PADDING = torch.ones(VISION + TEXT, VISION + TEXT, dtype=torch.int64).fill_diagonal_(0)
SEES_PADDING[0] = 1
SEES_PADDING[0, -1] = 0
LAST_PADDED = torch.zeros(BATCH, VISION + TEXT, dtype=torch.bool)
LAST_PADDED[1, -1] = True
VISION_PADDED = LAST_PADDED.roll(-TEXT, dims=1)
ARBITRARY = SEES_PADDING.clone()
ARBITRARY[:, :2] = 0
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "a bool mask": ({"attn_mask": ARBITRARY.bool()}, "torch.bool"),
    "a query without keys": ({"attn_mask": SEES_NOTHING}, "every key"),
    "a query that sees padding only": (
        {"attn_mask": SEES_PADDING, "encoder_padding_mask": LAST_PADDED},
        "every key",
    ),
    "a mask over padded image tokens": (
        {"attn_mask": ARBITRARY, "encoder_padding_mask": VISION_PADDED},
        "padded image tokens",
    ),
    "soft padding": (
        {"encoder_padding_mask": LAST_PADDED.float() * 0.5},
        "other than 0 and 1",
    ),
    "unknown arguments": ({"relative_position": None}, "relative_position"),
    "a split at the end": (
        {"multiway_split_position": 4, "token_embeddings": torch.ones(BATCH, 4, CONFIG.embed_dim)},
        "split position",
    ),
}


@pytest.mark.parametrize("kind", CALLS)
@torch.no_grad()
def test_a_call_that_only_torchscale_can_do(
    kind: str, runs_fast: Any, caplog: pytest.LogCaptureFixture
) -> None:
    changes, reason = CALLS[kind]
    call = encoder_call(**changes)
    model, theirs = accelerated_copy(), torchscale_beit3(CONFIG)
    with caplog.at_level(logging.WARNING, "beit3_fast"):
        for _ in range(3):
            assert not runs_fast(model.encoder, call)
    assert torch.equal(model.encoder(**call)["encoder_out"], theirs.encoder(**call)["encoder_out"])
    assert len(reasons(model)) == 1
    assert reason in reasons(model)[0]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "one line a reason"
    assert reason in said[0]
    assert runs_fast(model.encoder, encoder_call())


@torch.no_grad()
def test_positions_for_a_pair_and_errors_are_torchscales() -> None:
    model, theirs = accelerated_copy(), torchscale_beit3(CONFIG)
    for call in (
        {"src_tokens": None},
        encoder_call(positions=torch.arange(2, 18)[None]),
        encoder_call(attn_mask=torch.zeros(3, 4)),
        encoder_call(attn_mask=torch.zeros(16, 16, dtype=torch.float16).fill_diagonal_(1)),
        encoder_call(encoder_padding_mask=torch.zeros(BATCH, 3)),
        encoder_call(multiway_split_position=-2),
        encoder_call(multiway_split_position=99),
    ):
        errors = []
        for one in (model, theirs):
            try:
                one.encoder(**call)
                errors.append(None)
            except Exception as error:
                errors.append((type(error), str(error)))
        assert errors[1] is not None
        assert errors[0] == errors[1]


@torch.no_grad()
def test_decoding_calls_that_only_torchscale_can_do(runs_fast: Any) -> None:
    tokens = VISION + TEXT
    nothing = torch.zeros(tokens, tokens, dtype=torch.int64)
    nothing[2] = 1
    for changes, reason in (
        ({"attn_mask": nothing}, "every key"),
        ({"attn_mask": torch.zeros(1, tokens)}, "attn_mask of shape"),
    ):
        model, theirs = accelerated_copy(), torchscale_beit3(CONFIG)
        outputs = []
        for one in (model, theirs):
            state: dict[int, dict[str, Tensor]] = {i: {} for i in range(CONFIG.num_layers)}
            out = one.encoder(**encoder_call(**changes), incremental_state=state)
            outputs.append(out["encoder_out"])
        assert torch.equal(*outputs)
        assert reason in reasons(model)[0]
    theirs = torchscale_beit3(CONFIG, drop_path_rate=0.5)
    model = accelerated_copy(theirs).train()
    state = {i: {} for i in range(CONFIG.num_layers)}
    assert not runs_fast(model.encoder, encoder_call(incremental_state=state))
    assert "drop path" in reasons(model)[0]


def test_a_hook_on_all_modules(runs_fast: Any) -> None:
    model = accelerated_copy()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not runs_fast(model, pair())
    finally:
        handle.remove()
    assert runs_fast(model, pair())
    assert "all modules" in reasons(model)[0]


def test_hooks_outside_and_on_the_encoder_still_work(runs_fast: Any) -> None:
    model, seen = accelerated_copy(), []
    for name in ("encoder", "text_embed", "vision_embed"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    assert runs_fast(model, pair())
    assert seen == ["vision_embed", "text_embed", "encoder"]


def test_explain_names_the_implementation_and_the_reasons(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = accelerated_copy(torchscale_beit3(CONFIG, dropout=0.1), impl="reference")
    choices = {item.op: item for item in beit3_fast.explain(model)}
    assert choices["expert_linear (inference)"].impl == "reference"
    assert choices["encoder encoder"].impl == "beit3_fast"
    model.train()(**pair())
    beit3_fast.explain(model)
    assert "dropout of 0.1 in train mode" in capsys.readouterr().out
    restore(model)
    with pytest.raises(ConfigError, match="neither a beit3_fast model nor accelerated"):
        beit3_fast.explain(model, quiet=True)


@pytest.mark.full
def test_torch_compile_keeps_the_result() -> None:
    model = torch.compile(accelerated_copy(), backend="eager")
    for call in (pair(), image()):
        assert_same(model, torchscale_model("base"), call)


@pytest.mark.parametrize("padded", [True, False])
def test_training_and_inference_in_many_threads(padded: bool) -> None:
    """Eight threads, three modes, one model: torchscale's own split position would race here."""
    model = accelerated_copy()
    calls = [image(), text(), pair()] if padded else [image(), pair(text_padding_position=None)]
    with torch.no_grad():
        alone = [model(**call)["encoder_out"] for call in calls]
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for step in range(12):
            index = (thread + step) % len(calls)
            with torch.set_grad_enabled(thread % 2 == 0):
                out = model(**calls[index])["encoder_out"]
            torch.testing.assert_close(out.detach(), alone[index], rtol=0, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, thread) for thread in range(8)]:
            future.result()


def test_the_check_of_each_call_is_cheap_in_calls() -> None:
    """It looks at the structure once, and again only after a change."""
    from beit3_fast.integrations import _encoder_forward

    model = accelerated_copy()
    looks: list[Any] = []

    class Counted(_encoder_forward.Structure):
        def __init__(self, encoder: Any) -> None:
            looks.append(encoder)
            super().__init__(encoder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_encoder_forward, "Structure", Counted)
        for _ in range(3):
            model(**pair())
        assert not looks
        handle = model.encoder.layers[0].register_forward_hook(lambda *_: None)
        for _ in range(3):
            model(**pair())
        assert len(looks) == 1
        handle.remove()
        model(**pair())
        assert len(looks) == 2
