"""Train mode: gradients, activation checkpointing, and weights that change between evaluations."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from model_cases import FORMS, TINY, backbone, images, need, padding, randomize, texts
from torch import Tensor, nn

import beit3_fast
from beit3_fast import derived
from beit3_fast.errors import ConfigError
from beit3_fast.model import BEiT3, create_model
from beit3_fast.model.stack import set_recompute
from beit3_fast.parity import assert_parity, model_parity

Nv = TINY.num_vision_tokens


def mixed(model: BEiT3, **options: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    picture, words = images(3, model.config).to(dtype), texts(3, 5, model.config)
    return model.forward_packed(
        [picture[0], None, picture[1], picture[2]],
        [words[0], words[1, :2], None, words[2, :3]],
        **options,
    ).rows


def gradients(model: BEiT3, **options: Any) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    rows = mixed(model, **options)
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    (rows * weights.to(rows.dtype)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@cache
def truth_of(form: str, reads: tuple[str, str]) -> dict[str, Tensor | None]:
    """Gradients of the readable formula in fp64."""
    model = backbone(FORMS[form], "reference").double()
    return gradients(model, read_vision=reads[0], read_text=reads[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["composite fp64", "composite fp32", "cpu fp32", "auto fp32"])
@pytest.mark.parametrize("reads", [("all", "all"), ("first", "first")])
def test_gradients_against_the_formula(form: str, kind: str, reads: tuple[str, str]) -> None:
    impl, dtype = kind.split()
    need(impl)
    truth = truth_of(form, reads)
    model = backbone(FORMS[form], impl).to(torch.float64 if dtype == "fp64" else torch.float32)
    ours = gradients(model, read_vision=reads[0], read_text=reads[1])
    for name, expected in truth.items():
        own = ours[name]
        assert (own is None) is (expected is None), name
        if own is None or expected is None:
            continue
        if name.endswith("k_proj.bias"):
            # One bias for all keys shifts all scores of a query alike: no effect, and what is left is rounding.
            weight = truth[name.replace("bias", "weight")]
            assert own.abs().max() <= 1e-5 * weight.abs().max()
            continue
        assert_parity(model_parity(own, expected, gradient=True), name)


def test_only_what_was_used_has_a_gradient() -> None:
    model = backbone()
    model(visual_tokens=images(2))["encoder_out"].sum().backward()
    for name, parameter in model.named_parameters():
        of_text = ".B." in name or name.startswith("text_embed")
        unused = of_text or name == "vision_embed.mask_token"
        assert (parameter.grad is None) is unused, name


def test_gradients_of_images_and_other_sizes() -> None:
    model = backbone()
    picture = torch.randn(2, 3, 48, 16, requires_grad=True)
    model(texts(2, 3), picture)["encoder_out"].sum().backward()
    assert picture.grad is not None
    assert picture.grad.abs().min() > 0
    table = model.encoder.embed_positions.A.weight.grad
    assert not table[:2].any()
    assert table[2:].abs().amax(1).min() > 0


@pytest.mark.parametrize("what", ["layer", "ffn", 2])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_activation_checkpointing_changes_nothing(form: str, what: str | int) -> None:
    config = FORMS[form].replace(drop_path_rate=0.4)
    plain = backbone(config).train()
    saving = BEiT3(config.replace(checkpoint_activations=what == "layer")).train()
    if what != "layer":
        set_recompute(saving, what)
    saving.load_state_dict(plain.state_dict())
    torch.manual_seed(7)
    expected = gradients(plain)
    torch.manual_seed(7)
    ours = gradients(saving)
    for name, gradient in expected.items():
        if gradient is None:
            assert ours[name] is None
        else:
            assert torch.equal(ours[name], gradient), name


def test_activation_checkpointing_keeps_less() -> None:
    model = randomize(BEiT3(TINY.replace(num_layers=4))).train()
    kept: dict[str | int, int] = {}
    for what in ("none", 2, "ffn", "layer"):
        set_recompute(model, what)
        sizes: list[int] = []

        def pack(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            mixed(model)
        kept[what] = sum(sizes)
    assert kept["layer"] < 0.5 * kept["none"]
    assert kept["layer"] < kept["ffn"] < 0.8 * kept["none"]
    assert kept["layer"] < kept[2] < 0.8 * kept["none"]


def test_layers_that_are_recomputed() -> None:
    encoder = BEiT3(TINY.replace(num_layers=5)).encoder
    assert encoder.recompute == ()
    set_recompute(encoder, 2)
    assert encoder.recompute == ("none", "layer", "none", "layer", "none")
    with pytest.raises(ConfigError, match="every 6th layer cannot be recomputed: the model has 5"):
        set_recompute(encoder, 6)


def test_training_reduces_the_loss_as_plain_pytorch_does() -> None:
    losses: dict[str, list[float]] = {}
    for impl in ("reference", "composite", "cpu", "auto"):
        if impl == "cpu":
            from beit3_fast.ops import library

            if not library.available():
                continue
        model = backbone(TINY, impl).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        target = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
        losses[impl] = []
        for _ in range(8):
            out = model(texts(4, 5), images(4), padding([5, 2, 3, 1], 5))["encoder_out"][:, 0]
            loss = (out - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
        assert losses[impl][-1] < 0.7 * losses[impl][0]
        assert losses[impl] == pytest.approx(losses["reference"], rel=1e-3)


# Every way of changing weights between two evaluations.


def step(model: nn.Module, **options: Any) -> None:
    model.train()
    mixed(model).square().mean().backward()  # type: ignore[arg-type]
    torch.optim.AdamW(model.parameters(), lr=0.05, **options).step()
    model.eval()


def load(model: nn.Module) -> None:
    model.load_state_dict(randomize(copy.deepcopy(model), seed=11).state_dict())


def assign(model: nn.Module) -> None:
    model.load_state_dict(randomize(copy.deepcopy(model), seed=12).state_dict(), assign=True)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def one_query(model: Any) -> None:
    with torch.no_grad():
        model.encoder.layers[1].self_attn.v_proj.B.weight.add_(0.2)


def one_patch(model: Any) -> None:
    with torch.no_grad():
        model.vision_embed.proj.weight.add_(0.2)


def positions(model: Any) -> None:
    with torch.no_grad():
        model.encoder.embed_positions.A.weight.mul_(1.5)


def replaced(model: Any) -> None:
    own = model.encoder.layers[0].ffn.A.fc1
    own.weight = nn.Parameter(torch.randn_like(own.weight))


def converted(model: nn.Module) -> None:
    model.bfloat16().float()


CHANGES: dict[str, Callable[[Any], None]] = {
    "step": step,
    "fused step": lambda model: step(model, fused=True),
    "foreach step": lambda model: step(model, foreach=True),
    "load_state_dict": load,
    "load_state_dict(assign)": assign,
    "in place": in_place,
    "one value projection": one_query,
    "patch projection": one_patch,
    "positions": positions,
    "replaced": replaced,
    "bf16 and back": converted,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["cpu fp32", "cpu bf16", "composite fp32", "composite bf16"])
def test_evaluation_follows_every_change_of_the_weights(change: str, kind: str) -> None:
    impl, dtype = kind.split()
    need(impl)
    if dtype == "bf16" and "bf16" in change:
        pytest.skip("nothing changes: the weights are bf16 already")
    narrow = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = backbone(TINY, impl).to(narrow)

    def evaluate(model: BEiT3) -> list[Tensor]:
        picture = torch.randn(2, 3, 48, 16, generator=torch.Generator().manual_seed(4)).to(narrow)
        with torch.no_grad():
            return [
                model(texts(2, 4), picture)["encoder_out"],
                model(texts(2, 4))["encoder_out"],
                model(visual_tokens=images(2).to(narrow))["encoder_out"],
            ]

    before = evaluate(model)
    if dtype == "bf16" and "step" in change:
        model.train()
        out = model(texts(2, 4), images(2).to(narrow))["encoder_out"]
        out.square().mean().backward()
        options = {"fused": True} if "fused" in change else {"foreach": "foreach" in change}
        torch.optim.AdamW(model.parameters(), lr=0.05, **options).step()
        model.eval()
    else:
        CHANGES[change](model)
    after = evaluate(model)
    fresh = BEiT3(TINY, impl).to(narrow).eval()
    fresh.load_state_dict(model.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for ours, expected in zip(after, evaluate(fresh), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("impl", ["cpu", "composite"])
def test_writes_through_data_need_a_refresh(impl: str) -> None:
    need(impl)
    model = backbone(TINY, impl).bfloat16()
    with torch.no_grad():
        model(texts(2, 4), images(2).bfloat16())
        for parameter in model.parameters():
            parameter.data.mul_(1.25)
        beit3_fast.refresh(model)
        ours = model(texts(2, 4), images(2).bfloat16())["encoder_out"]
    fresh = BEiT3(TINY, impl).bfloat16().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(ours, fresh(texts(2, 4), images(2).bfloat16())["encoder_out"])


def test_a_copy_goes_its_own_way() -> None:
    model = backbone()
    with torch.no_grad():
        expected = mixed(model)
        other = copy.deepcopy(model)
        in_place(other)
        assert not torch.equal(mixed(other), expected)
        assert torch.equal(mixed(model), expected)


def test_freezing_weights_changes_nothing() -> None:
    model = backbone()
    with torch.no_grad():
        expected = mixed(model)
        model.requires_grad_(False)
        assert torch.equal(mixed(model), expected)
    torch.testing.assert_close(mixed(model), expected)
    model.requires_grad_(True)
    assert mixed(model).requires_grad


@pytest.mark.parametrize("impl", ["composite", "cpu"])
def test_a_model_made_in_inference_mode(impl: str) -> None:
    need(impl)
    with torch.inference_mode():
        model = backbone(TINY, impl)
        expected = mixed(backbone(TINY, "reference"))
        torch.testing.assert_close(mixed(model), expected, rtol=1e-4, atol=1e-4)
        in_place(model)
        changed = mixed(model)
        assert not torch.allclose(changed, expected, atol=1e-3)
        other = backbone(TINY, "reference")
        in_place(other)
        torch.testing.assert_close(changed, mixed(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["composite", "cpu"])
def test_a_model_that_is_dropped_leaves_nothing(impl: str, dtype: str) -> None:
    need(impl)
    gc.collect()
    before = len(derived._store)
    model = create_model("beit3_tiny_patch16_32", impl=impl, dtype=dtype)
    narrow = getattr(torch, dtype)
    with torch.no_grad():
        model(texts(2, 4), torch.randn(2, 3, 48, 16).to(narrow))
    weights = [weakref.ref(p) for p in model.parameters()]
    assert len(derived._store) > before
    del model
    gc.collect()
    assert not any(ref() is not None for ref in weights)
    assert len(derived._store) <= before


def test_the_state_is_the_official_one_before_and_after() -> None:
    model = backbone()
    names = list(model.state_dict())
    with torch.no_grad():
        mixed(model)
    mixed(model.train()).sum().backward()
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_buffers()] == []
