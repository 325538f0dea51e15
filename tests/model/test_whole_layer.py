"""A layer in one call of the compiled library gives what the calls of its ops give, bit for bit, and leaves the rest to them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_cases import FORMS, TINY, backbone, images, randomize, task_model, texts
from one_call_cases import both, in_form, watched
from torch import Tensor, nn

import beit3_fast
from beit3_fast.errors import Beit3FastError, ShapeError
from beit3_fast.layout import TokenLayout
from beit3_fast.model import encoder
from beit3_fast.model.decoding import CaptionDecoder
from beit3_fast.ops import MASKS, library, whole_layer
from beit3_fast.ops.packed_weight import quantize

if not library.available():
    pytest.skip(f"the library {library.why_unavailable()}", allow_module_level=True)

# Every kind of sample, among them none with an image, none with a text.
LENGTHS = {
    "mixed": ([5, 0, 5, 5, 0], [3, 7, 0, 1, 2]),
    "pairs": ([5, 5], [3, 8]),
    "images": ([5, 5, 5], [0, 0, 0]),
    "one sentence": ([0], [9]),
    "empty samples": ([0, 5, 0], [0, 2, 0]),
}
READ: dict[str, tuple[Any, Any]] = {
    "all": ("all", "all"),
    "first": ("first", "first"),
    "words": ("none", "all"),
}


@pytest.mark.parametrize("form", ["fp32", "bf16", "packed, bf16", "int8, bf16", "int8, fp32"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_layer(form: str, mask: str, lengths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = in_form(backbone(), form).encoder.layers[0]
    for expert in "AB":  # each product has an epsilon of its own
        getattr(layer.self_attn.inner_attn_ln, expert).eps = 0.1
        getattr(layer.final_layer_norm, expert).eps = 0.2
        getattr(layer.ffn, expert).ffn_layernorm.eps = 0.3
    layout = TokenLayout.from_lengths(*LENGTHS[lengths])
    wide = torch.randn(layout.num_rows, 2 * TINY.embed_dim).to(layer.self_attn.q_proj.A.bias.dtype)
    x = encoder.Measured(wide[:, 7 : 7 + TINY.embed_dim])
    with torch.no_grad():
        for read in (None, *(layout.select(*picks) for picks in READ.values())):
            if read is not None and not read.layout.num_rows:
                continue
            how: dict[str, Any] = {"mask": mask, "read": read}
            run = lambda how=how: encoder.encoder_layer(layer, x, layout, **how).rows  # noqa: E731
            whole, apart = both(monkeypatch, run, layers=1)
            assert torch.equal(whole, apart)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["bf16", "packed, bf16", "int8, bf16", "packed, fp32"])
@pytest.mark.parametrize("model", ["heads of 64", "heads of 32", "an expert for pairs"])
def test_a_layer_of_many_rows(
    model: str, form: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many that threads take rows through several products, what lies between in strips (AMX)."""
    config = TINY.replace(embed_dim=192, num_heads=6 if model == "heads of 32" else 3, ffn_dim=416)
    if model == "an expert for pairs":
        config = config.replace(attention="shared", vl_expert_layers=1, num_layers=1)
    layer = in_form(backbone(config), form).encoder.layers[0]
    vision, text = [300, 500, 0, 41], [20, 0, 37, 3]
    if model == "an expert for pairs":
        vision, text = [500, 340], [20, 40]
    layout = TokenLayout.from_lengths(vision, text)
    x = encoder.Measured(
        torch.randn(layout.num_rows, 192).to(layer.final_layer_norm.A.weight.dtype)
    )
    torch.set_num_threads(threads)
    with torch.no_grad():
        for read in (None, layout.select("all", "none"), layout.select("first", "first")):
            how: dict[str, Any] = {"mask": "seq2seq", "read": read}
            run = lambda how=how: encoder.encoder_layer(layer, x, layout, **how).rows  # noqa: E731
            whole, apart = both(monkeypatch, run, layers=1)
            assert torch.equal(whole, apart)


@pytest.mark.parametrize("form", FORMS)
def test_models(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of attention and of feed-forward networks, for pairs as well, each with its own rows."""
    config = FORMS[form]
    model = backbone(config)
    pictures = [images(3, config)[i] if i != 1 else None for i in range(3)]
    words = [texts(3, 6, config)[i, : 6 - i] if i != 2 else None for i in range(3)]
    apart = config.embed_dim % 32 != 0

    def run() -> Tensor:
        with torch.no_grad():
            return model.forward_packed(pictures, words).rows

    if apart:  # panels of packed weights would lie across query, key and value
        monkeypatch.delattr(whole_layer, "packed_form")  # they are not even packed that way
        with watched(monkeypatch, whole=True) as seen:
            run()
        assert not any(seen)
        return
    whole, calls = both(monkeypatch, run, config.num_layers)
    assert torch.equal(whole, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3])
def test_a_caption(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, some of them after images that are done have left: rows and all that is kept of them."""
    model = task_model("captioning").to(dtype)

    def run() -> Tensor:
        torch.manual_seed(3)
        found = []
        with torch.no_grad():
            decoder = CaptionDecoder(model, images(3).to(dtype), width, 6, 0, 5)
            found.append(decoder.start())
            for step in range(4):
                count = len(decoder.samples)
                words = torch.randint(4, TINY.vocab_size, (count, width))
                before = 1 if step == 0 else width
                found.append(decoder.step(words, torch.randint(0, before, (count, width))))
                if step == 1:
                    decoder.keep(torch.tensor([2, 0]))
        found += [t for cache in decoder.caches for t in (cache.k, cache.v)]
        return torch.cat([t.flatten() for t in found])

    with watched(monkeypatch, whole=True) as seen:
        whole = run()
    assert seen.count(True) >= 5 * TINY.num_layers
    assert all(seen)
    with watched(monkeypatch, whole=False):
        apart = run()
    assert torch.equal(whole, apart)


def _without_bias(layer: Any) -> None:
    layer.self_attn.k_proj.B.bias = None


def _without_inner_norm(layer: Any) -> None:
    layer.self_attn.inner_attn_ln = None


def _other_eps(layer: Any) -> None:
    layer.ffn.A.ffn_layernorm.eps = 0.5


def _norm_of_doubles(layer: Any) -> None:
    layer.final_layer_norm.double()


def _weights_of_another_dtype(layer: Any) -> None:
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.weight = quantize(torch.randn(module.weight.shape), torch.bfloat16)


def _slanted_norm(layer: Any) -> None:
    norm = layer.final_layer_norm.B
    norm.weight = nn.Parameter(torch.randn(2, TINY.embed_dim).T.contiguous().T[0])


@pytest.mark.parametrize(
    "change",
    [
        _without_bias,
        _without_inner_norm,
        _other_eps,
        _norm_of_doubles,
        _slanted_norm,
        _weights_of_another_dtype,
    ],
)
def test_what_one_call_does_not_take(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left to the calls of the ops: they compute it, or say what is wrong with it."""
    layer, layout = backbone().encoder.layers[0], TokenLayout.from_lengths(*LENGTHS["mixed"])
    change(layer)
    x = encoder.Measured(torch.randn(layout.num_rows, TINY.embed_dim))

    def outcome(whole: bool) -> Any:
        with watched(monkeypatch, whole) as seen, torch.no_grad():
            try:
                y = encoder.encoder_layer(layer, x, layout).rows
            except (Beit3FastError, RuntimeError) as error:
                return type(error), str(error), seen
        return y.sum().item(), y.shape, seen

    first, second = outcome(True), outcome(False)
    assert first[:2] == second[:2]
    assert not any(first[2])


@pytest.mark.parametrize("impl", ["auto", "cpu", "composite", "reference"])
def test_it_is_the_cpu_kernels_alone(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, takes = backbone(impl=impl), impl in ("auto", "cpu")
    level = library.cpu_isa()
    if impl == "auto" and level == "portable":
        takes = False

    def layers_in_one_call(**tensors: Any) -> set[bool]:
        with watched(monkeypatch, whole=True) as seen:
            model(**tensors)
        return set(seen) or {False}

    own = {"visual_tokens": images(2), "textual_tokens": texts(2, 4)}
    with torch.no_grad():
        assert layers_in_one_call(**own) == {takes}
        assert layers_in_one_call(**own, attn_mask=torch.eye(9, dtype=torch.bool)) == {False}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layers_in_one_call(**own) == {False}
        monkeypatch.setenv("BEIT3_FAST_IMPL", "composite")
        assert layers_in_one_call(**own) == {takes and impl != "auto"}
        monkeypatch.delenv("BEIT3_FAST_IMPL")
    assert layers_in_one_call(**own) == {False}  # gradients are recorded
    model.requires_grad_(False)
    assert layers_in_one_call(**own) == {takes}


def test_a_weight_that_does_not_fit_is_named() -> None:
    model = backbone()
    layer = model.encoder.layers[1]
    layer.ffn.B.fc2.weight = nn.Parameter(torch.randn(TINY.embed_dim, TINY.ffn_dim + 32))
    with torch.no_grad(), pytest.raises(ShapeError, match=r"weights\[1\] must have shape"):
        model(textual_tokens=texts(2, 4))


def test_changed_parameters_are_seen() -> None:
    model, words = backbone(), texts(2, 4)
    with torch.no_grad():
        before = model(textual_tokens=words)["encoder_out"]
        randomize(model, seed=5)
        after = model(textual_tokens=words)["encoder_out"]
        model.impl = "composite"
        expected = model(textual_tokens=words)["encoder_out"]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_drop_path_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass in train mode that records no gradients."""
    model = randomize(beit3_fast.create_model("beit3_tiny_patch16_32", drop_path_rate=0.9)).train()
    with torch.no_grad(), watched(monkeypatch, whole=True) as seen:
        model(visual_tokens=images(8))
    assert len(seen) < TINY.num_layers


def test_a_failure_is_not_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no memory, in the midst of a call")

    broken = SimpleNamespace(default=fail)
    ops = SimpleNamespace(encoder_layers=broken, decoder_layer=broken)
    model = task_model("captioning")
    with torch.no_grad():
        decoder = CaptionDecoder(model, images(2), 1, 6, 0, 5)
        decoder.start()
        monkeypatch.setattr(whole_layer, "_ops", lambda: ops)
        with pytest.raises(RuntimeError, match="in the midst"):
            decoder.step(torch.full((2, 1), 5), torch.zeros(2, 1, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="in the midst"):
            backbone()(textual_tokens=texts(2, 4))
