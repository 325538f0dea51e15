"""All layers of an encoder in one call: which, with what behind them, and who is asked all the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_cases import TINY, backbone, images, texts
from one_call_cases import both, in_form, watched
from torch import Tensor, nn

from beit3_fast.model import encoder
from beit3_fast.ops import library, whole_layer

if not library.available():
    pytest.skip(f"the library {library.why_unavailable()}", allow_module_level=True)


@pytest.mark.parametrize("width", [TINY.embed_dim, 192])
@pytest.mark.parametrize("form", ["fp32", "bf16", "packed, bf16", "int8, bf16"])
def test_all_layers_are_one_call(form: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that have nothing in common, the last one for some of the rows only."""
    heads = width // 64 or 1
    model = in_form(backbone(TINY.replace(embed_dim=width, num_heads=heads, num_layers=3)), form)
    for index, layer in enumerate(model.encoder.layers):
        for expert in "AB":
            getattr(layer.self_attn_layer_norm, expert).eps = 0.1 * index
            getattr(layer.ffn, expert).ffn_layernorm.eps = 0.3 * index
    calls: list[int] = []
    real = whole_layer.encoder_layers
    dtype = model.text_embed.weight.dtype

    def count(x: Tensor, layers: Any, *given: Any, **options: Any) -> Tensor | None:
        calls.append(len(layers))
        return real(x, layers, *given, **options)

    pictures = images(3, model.config).to(dtype)
    for read, expected in (("all", [3]), ("first", [2, 1])):
        run = lambda read=read: model.encode(pictures, texts(3, 7), read_text=read).rows  # noqa: E731
        with torch.no_grad():
            whole, apart = both(monkeypatch, run, layers=3)
            assert torch.equal(whole, apart)
            with monkeypatch.context() as patch:
                patch.setattr(whole_layer, "encoder_layers", count)
                run()
        assert calls == expected
        calls.clear()


def test_the_last_norm_is_part_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone()
    for expert, eps in (("A", 0.1), ("B", 0.3)):
        norm = getattr(model.encoder.layer_norm, expert)
        norm.eps = eps
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    own = {"visual_tokens": images(2), "textual_tokens": texts(2, 4)}
    run = lambda: model(**own)["encoder_out"]  # noqa: E731
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(encoder, "layer_norm", None)
        patch.setattr(model, "impl", "cpu")
        whole = run()
    with torch.no_grad():
        model.impl = "composite"
        torch.testing.assert_close(whole, run(), rtol=1e-4, atol=1e-4)


def test_a_last_norm_alone_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone().requires_grad_(False)
    model.encoder.layer_norm.requires_grad_(True)
    with watched(monkeypatch, whole=True) as seen:
        model(textual_tokens=texts(2, 4))["encoder_out"].sum().backward()
    assert model.encoder.layer_norm.B.weight.grad is not None
    assert set(seen) == {False, True}  # layer by layer, as none of them is trained


def test_a_last_norm_that_is_not_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = backbone(), texts(2, 4)
    with torch.no_grad():
        wanted = model(textual_tokens=words)["encoder_out"]
        norm = model.encoder.layer_norm.B
        norm.weight = nn.Parameter(torch.stack([norm.weight] * 2, 1)[:, 0])
        assert not norm.weight.is_contiguous()
        y = model(textual_tokens=words)["encoder_out"]
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def _hooked(model: Any, seen: list[int]) -> Any:
    note = lambda _, given, y: seen.append(len(y.rows))  # noqa: E731
    return model.encoder.layers[1].register_forward_hook(note)


def _hooked_before(model: Any, seen: list[int]) -> Any:
    note = lambda _, given: seen.append(len(given[0].rows))  # noqa: E731
    return model.encoder.layers[0].register_forward_pre_hook(note)


def _hooked_everywhere(model: Any, seen: list[int]) -> Any:
    def note(module: nn.Module, given: Any, y: Any) -> None:
        if module is model.encoder.layers[1]:
            seen.append(len(y.rows))

    return nn.modules.module.register_module_forward_hook(note)


def _replaced(model: Any, seen: list[int]) -> Any:
    layer = model.encoder.layers[1]
    real = layer.forward

    def forward(x: Any, *given: Any, **options: Any) -> Any:
        seen.append(len(x.rows))
        return real(x, *given, **options)

    layer.forward = forward
    return SimpleNamespace(remove=lambda: delattr(layer, "forward"))


def _subclassed(model: Any, seen: list[int]) -> Any:
    layer = model.encoder.layers[1]
    own = type(layer)

    class Noting(own):  # type: ignore[valid-type, misc]
        def forward(self, x: Any, *given: Any, **options: Any) -> Any:
            seen.append(len(x.rows))
            return super().forward(x, *given, **options)

    layer.__class__ = Noting
    return SimpleNamespace(remove=lambda: setattr(layer, "__class__", own))


@pytest.mark.parametrize(
    "watch", [_hooked, _hooked_before, _hooked_everywhere, _replaced, _subclassed]
)
def test_whoever_watches_a_layer_sees_its_call(watch: Callable[[Any, list[int]], Any]) -> None:
    model, words = backbone(), texts(2, 4)
    seen: list[int] = []
    with torch.no_grad():
        expected = model(textual_tokens=words)["encoder_out"]
        handle = watch(model, seen)
        assert torch.equal(model(textual_tokens=words)["encoder_out"], expected)
        assert seen == [8]
        handle.remove()
        model(textual_tokens=words)
    assert seen == [8]


@pytest.mark.parametrize(
    "unkept", [lambda: torch.inference_mode(), lambda: torch.no_grad()], ids=["inference", "shared"]
)
def test_weights_of_which_nothing_is_kept_are_packed_a_layer_at_a_time(
    unkept: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with unkept():
        model = backbone()
    if not model.text_embed.weight.is_inference():
        model.share_memory()
    calls: list[int] = []
    real = whole_layer._ops().encoder_layers.default

    def note(x: Tensor, packed: list[Tensor], *given: Any, **named: Any) -> Tensor:
        calls.append(len(packed))
        y: Tensor = real(x, packed, *given, **named)
        return y

    own = SimpleNamespace(encoder_layers=SimpleNamespace(default=note))
    monkeypatch.setattr(whole_layer, "_ops", lambda: own)
    with torch.no_grad():
        model(textual_tokens=texts(2, 4))
    assert calls == [6] * TINY.num_layers  # the weights of a layer with one expert
