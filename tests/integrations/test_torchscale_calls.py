"""Calls of accelerated torchscale models that run on packed rows, and the split position that modules keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _compat import (
    impls,
    torchscale_beit3,
    torchscale_model,
)
from accelerate_cases import (
    BATCH,
    CONFIG,
    TEXT,
    VISION,
    accelerated_copy,
    assert_same,
    encoder_call,
    image,
    pair,
    reasons,
    text,
)
from torch import Tensor

from beit3_fast.integrations.torchscale import accelerate
from beit3_fast.parity import assert_parity, model_parity

# Calls that torchscale's users make


@pytest.mark.parametrize(("impl", "dtype"), impls("fp32"))
@pytest.mark.parametrize("split", [None, -1, 0, 1, 2, VISION])
@pytest.mark.parametrize("hiddens", [False, True])
def test_the_encoder_called_directly(
    split: int | None, hiddens: bool, impl: str, dtype: str, runs_fast: Any
) -> None:
    model = accelerate(torchscale_beit3(CONFIG), impl)
    call = encoder_call(multiway_split_position=split, return_all_hiddens=hiddens)
    if split in (None, -1):
        call["token_embeddings"] = call["token_embeddings"][:, :VISION]
    if split == 2:
        call["token_embeddings"] = call["token_embeddings"][:, :3]
    assert runs_fast(model.encoder, call)
    assert_same(model.encoder, torchscale_beit3(CONFIG).encoder, call)


@pytest.mark.parametrize("split", [-1, 0])
@pytest.mark.parametrize("batch", [1, BATCH])
@torch.no_grad()
def test_positions_given_for_one_modality(split: int, batch: int, runs_fast: Any) -> None:
    model, theirs = accelerated_copy(), torchscale_model("base")
    positions = torch.randint(0, 12, (batch, VISION + TEXT))
    call = encoder_call(multiway_split_position=split, positions=positions)
    assert runs_fast(model.encoder, call)
    assert_same(model.encoder, theirs.encoder, call)


def test_positional_arguments() -> None:
    model, theirs = accelerated_copy(), torchscale_model("base")
    padding = torch.zeros(BATCH, VISION + TEXT, dtype=torch.bool)
    padding[1, -2:] = True
    call = encoder_call()
    args = (None, padding, None, True, call["token_embeddings"], VISION, False)
    mine, truth = model.encoder(*args), theirs.encoder(*args)
    assert len(mine["encoder_states"]) == 3
    assert_parity(model_parity(mine["encoder_out"][0].detach(), truth["encoder_out"][0].detach()))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "where", ["text", "vision", "both", "all text of one", "all vision of one"]
)
def test_padding_anywhere_in_any_dtype(where: str, dtype: torch.dtype, runs_fast: Any) -> None:
    """The encoder's mask covers image tokens too; forks pad there."""
    padding = torch.zeros(BATCH, VISION + TEXT, dtype=torch.bool)
    if where in ("text", "both"):
        padding[0, -3:] = padding[2, VISION + 1] = True
    if where in ("vision", "both"):
        padding[1, 2:5] = padding[2, VISION - 1] = True
    if where == "all text of one":
        padding[1, VISION:] = True
    if where == "all vision of one":
        padding[0, :VISION] = True
    model, theirs = accelerated_copy(), torchscale_model("base")
    call = encoder_call(encoder_padding_mask=padding.to(dtype), return_all_hiddens=True)
    assert runs_fast(model.encoder, call)
    assert_same(model.encoder, theirs.encoder, call)
    out = model.encoder(**call)
    assert out["encoder_padding_mask"] is call["encoder_padding_mask"]
    for states in (out["encoder_out"], *out["encoder_states"]):
        assert not states[padding].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["seq2seq", "causal", "arbitrary"])
@pytest.mark.parametrize("padded", [False, True])
def test_masks(kind: str, dtype: torch.dtype, padded: bool, runs_fast: Any) -> None:
    tokens = VISION + TEXT
    blocked = torch.ones(tokens, tokens)
    if kind == "causal":
        blocked = blocked.triu(1)
    elif kind == "seq2seq":
        blocked[:, :VISION] = 0
        blocked[VISION:, VISION:] = torch.ones(TEXT, TEXT).triu(1)
    else:
        blocked = (torch.rand(tokens, tokens) > 0.5).float().fill_diagonal_(0) * float("-inf")
        blocked = blocked.nan_to_num(0.0, neginf=-1e30)
        if dtype in (torch.int64, torch.int32):
            blocked = (blocked != 0).float()
    call = pair(attn_mask=blocked.to(dtype), **({} if padded else {"text_padding_position": None}))
    model = accelerated_copy()
    assert runs_fast(model, call)
    assert_same(model, torchscale_model("base"), call)


@pytest.mark.parametrize("impl", ["composite", "auto"])
def test_scaled_embeddings_output_projection_and_no_sublayer_norm(
    impl: str, runs_fast: Any
) -> None:
    theirs = torchscale_beit3(
        CONFIG, no_scale_embedding=False, subln=False, no_output_layer=False, vocab_size=120
    )
    model = accelerated_copy(theirs, impl)
    assert model.encoder.output_projection is not None
    for call in (pair(), image(), text()):
        assert runs_fast(model, call)
        assert_same(model, theirs, call)
    call = encoder_call(features_only=True)
    assert model.encoder(**call)["encoder_out"].shape[-1] == CONFIG.embed_dim
    assert_same(model.encoder, theirs.encoder, call)


def test_gradients_reach_the_embeddings() -> None:
    """Prompt tuning: the token embeddings are what is learnt."""
    grads = []
    for model in (torchscale_model("base"), accelerated_copy()):
        call = encoder_call()
        call["token_embeddings"].requires_grad_()
        padding = torch.zeros(BATCH, VISION + TEXT, dtype=torch.bool)
        padding[1, -2:] = True
        model.encoder(**call, encoder_padding_mask=padding)["encoder_out"][:, :3].sum().backward()
        grads.append(call["token_embeddings"].grad)
    assert_parity(model_parity(grads[1], grads[0], gradient=True))


def test_second_derivatives_by_the_reference() -> None:
    """A penalty on gradients: PyTorch's fused attention has no second derivative."""
    found = []
    for model in (torchscale_model("base"), accelerated_copy(impl="reference")):
        model.zero_grad()
        call = encoder_call()
        embeddings = call["token_embeddings"].requires_grad_()
        out = model.encoder(**call)["encoder_out"].square().sum()
        (first,) = torch.autograd.grad(out, embeddings, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), embeddings)
        found.append(second)
    assert_parity(model_parity(found[1], found[0], gradient=True))


def test_activation_checkpointing(monkeypatch: pytest.MonkeyPatch, runs_fast: Any) -> None:
    """fairscale's wrapper becomes PyTorch's: same gradients, and every layer is computed twice."""
    from beit3_fast.model import encoder

    theirs = torchscale_beit3(CONFIG, checkpoint_activations=True, drop_path_rate=0.3).train()
    models = [
        theirs,
        accelerate(torchscale_beit3(CONFIG, checkpoint_activations=True, drop_path_rate=0.3)),
    ]
    models[1].train()
    layers: list[Any] = []
    real = encoder.encoder_layer

    def count(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        layers.append(layer)
        return real(layer, *args, **kwargs)

    monkeypatch.setattr(encoder, "encoder_layer", count)
    grads = []
    for model in models:
        torch.manual_seed(4)
        model(**pair())["encoder_out"][:, 0].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert len(layers) == 2 * CONFIG.num_layers
    for name, grad in grads[0].items():
        if grad is not None and not name.endswith(("k_proj.A.bias", "k_proj.B.bias")):
            mine = grads[1][name]
            assert mine is not None
            assert_parity(model_parity(mine, grad, gradient=True), name)
    assert runs_fast(models[1], pair())
    assert not reasons(models[1])


def test_decoding_can_change_sides() -> None:
    """A cache filled on the fast path is good for torchscale's own code, and the other way round."""
    models = {"theirs": torchscale_model("base"), "ours": accelerated_copy()}
    outputs = []
    for turns in (
        ("theirs",) * 4,
        ("ours", "theirs", "ours", "ours"),
        ("theirs", "ours", "theirs", "ours"),
    ):
        state: dict[int, dict[str, Tensor]] = {i: {} for i in range(CONFIG.num_layers)}
        for step, turn in enumerate(turns):
            call = {"textual_tokens": pair()["textual_tokens"][:, [step, 5]]}
            if step == 0:
                call["visual_tokens"] = pair()["visual_tokens"]
            else:
                call["positions"] = torch.tensor([[step + 2, step + 3]])
            with torch.no_grad():
                out = models[turn](incremental_state=state, **call)["encoder_out"]
            for cache in state.values():
                for key in cache:
                    cache[key] = cache[key][:, :, :-1]
        outputs.append(out)
    for out in outputs[1:]:
        assert_parity(model_parity(out, outputs[0]))
    assert not reasons(models["ours"])


def test_decoding_with_padding_and_a_list_of_caches(runs_fast: Any) -> None:
    """Padding zeroes embeddings and masks nothing while decoding, as in torchscale."""
    model, theirs = accelerated_copy(), torchscale_model("base")
    padding = torch.zeros(BATCH, VISION + TEXT, dtype=torch.int64)
    padding[1, -2:] = 1
    outputs = []
    for one in (model, theirs):
        call = encoder_call(encoder_padding_mask=padding, return_all_hiddens=True)
        out = one.encoder(**call, incremental_state=[{} for _ in range(CONFIG.num_layers)])
        outputs.append([out["encoder_out"], *out["encoder_states"]])
    for mine, true in zip(*outputs, strict=True):
        assert_parity(model_parity(mine.detach(), true.detach()))


@pytest.mark.parametrize("kind", ["tuple", "empty", "short"])
def test_caches_in_another_form_are_left_to_torchscale(kind: str) -> None:
    outcomes = []
    for one in (accelerated_copy(), torchscale_model("base")):
        state: Any = {
            "tuple": tuple({} for _ in range(CONFIG.num_layers)),
            "empty": {},
            "short": [{}],
        }[kind]
        try:
            outcomes.append(one.encoder(**encoder_call(), incremental_state=state)["encoder_out"])
        except (KeyError, IndexError) as error:
            outcomes.append(repr(error))
    mine, true = outcomes
    assert torch.equal(mine, true) if isinstance(true, Tensor) else mine == true


# The split position that torchscale keeps in its modules


def set_split(model: Any, split: int) -> None:
    for module in model.modules():
        if hasattr(module, "split_position"):
            module.split_position = split


@pytest.mark.parametrize(
    "script", ["stored", "implied", "stored after", "fallback between", "then own"]
)
@torch.no_grad()
def test_no_split_argument_means_what_it_means_to_torchscale(script: str) -> None:
    outputs = []
    for model in (torchscale_beit3(CONFIG), accelerate(torchscale_beit3(CONFIG))):
        if script == "stored":
            set_split(model.encoder, 4)
        else:
            model.encoder(**encoder_call(multiway_split_position=4))
        if script == "stored after":
            set_split(model.encoder, 7)
        if script == "fallback between":
            tokens = VISION + TEXT
            model.encoder(
                **encoder_call(
                    multiway_split_position=9,
                    attn_mask=torch.zeros(tokens, tokens, dtype=torch.bool),
                )
            )
        call = encoder_call(multiway_split_position=None)
        if script == "then own":
            call["anything"] = 1
        outputs.append(model.encoder(**call)["encoder_out"])
    assert_parity(model_parity(outputs[1], outputs[0]))


def test_modules_that_disagree_on_the_split_run_torchscale() -> None:
    models = [torchscale_beit3(CONFIG), accelerate(torchscale_beit3(CONFIG))]
    for model in models:
        set_split(model.encoder, 4)
        model.encoder.layers[1].ffn.split_position = 9
    theirs, ours = (m.encoder(**encoder_call(multiway_split_position=None)) for m in models)
    assert torch.equal(ours["encoder_out"], theirs["encoder_out"])
    assert "different ones" in reasons(models[1])[0]


def test_explicit_splits_do_not_touch_the_modules() -> None:
    model = accelerate(torchscale_beit3(CONFIG))
    model(**pair())
    model(**text())
    assert {m.split_position for m in model.modules() if hasattr(m, "split_position")} == {-1}
