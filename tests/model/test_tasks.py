"""The five task classes: heads by their published formulas, rows that nobody reads, decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import TINY, backbone, images, need, padding, task_model, texts
from torch import Tensor

import beit3_fast.model.encoder as encoder_module
from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.ops import Measured, whole_layer
from beit3_fast.parity import assert_parity, model_parity

IMPLS = ("composite", "cpu", "auto")
LENGTHS = [4, 7, 1]
Nv = TINY.num_vision_tokens


def near(ours: Tensor, truth: Tensor) -> None:
    assert_parity(model_parity(ours, truth))


def rows_of(model: Any, **inputs: Any) -> Tensor:
    """All rows of the backbone in its padded form, [B, N, C]."""
    return model.beit3(**inputs)["encoder_out"]


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_image_classification(impl: str) -> None:
    need(impl)
    model = task_model("imageclassification", impl)
    state, picture = model.state_dict(), images(3)
    pooled = rows_of(model, visual_tokens=picture)[:, 1:].mean(1)
    logits = model(picture)
    assert logits.shape == (3, 1000)
    near(logits, linear(state, "head", norm(state, "fc_norm", pooled)))


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_visual_reasoning(impl: str) -> None:
    need(impl)
    model = task_model("nlvr2", impl)
    state, words, pad = model.state_dict(), texts(3, 7), padding(LENGTHS, 7)
    left, right = images(3), images(3, seed=9)
    features = []
    for picture in (left, right):
        rows = rows_of(
            model, textual_tokens=words, visual_tokens=picture, text_padding_position=pad
        )
        features += [rows[:, 0], rows[:, Nv]]
    x = norm(state, "head.norm1", torch.cat(features, 1))
    x = F.gelu(norm(state, "head.norm2", linear(state, "head.dense1", x)))
    logits = model(left, right, words, pad)
    assert logits.shape == (3, 2)
    near(logits, linear(state, "head.dense2", x))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [LENGTHS, [7, 0, 3]])
@torch.no_grad()
def test_visual_question_answering(impl: str, lengths: list[int]) -> None:
    need(impl)
    model = task_model("vqav2", impl)
    state, picture, words, pad = model.state_dict(), images(3), texts(3, 7), padding(lengths, 7)
    rows = rows_of(model, textual_tokens=words, visual_tokens=picture, text_padding_position=pad)
    x = torch.tanh(linear(state, "pooler.dense", norm(state, "pooler.norm", rows[:, 0])))
    x = F.gelu(norm(state, "head.1", linear(state, "head.0", x)))
    logits = model(picture, words, pad)
    assert logits.shape == (3, 3129)
    near(logits, linear(state, "head.3", x))


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_retrieval(impl: str) -> None:
    need(impl)
    model = task_model("retrieval", impl)
    state, picture, words, pad = model.state_dict(), images(3), texts(3, 7), padding(LENGTHS, 7)
    vision = linear(state, "vision_head", rows_of(model, visual_tokens=picture)[:, 0])
    rows = rows_of(model, textual_tokens=words, text_padding_position=pad)
    language = linear(state, "language_head", rows[:, 0])
    vision, language = (t / t.norm(dim=1, keepdim=True) for t in (vision, language))
    scores = math.exp(1.5) * vision @ language.T
    to_text = -scores.log_softmax(1).diagonal().mean()
    to_image = -scores.log_softmax(0).diagonal().mean()
    loss, ours_vision, ours_language = model(picture, words, pad)
    near(ours_vision, vision)
    near(ours_language, language)
    near(loss, (to_text + to_image) / 2)
    only_vision, nothing = model(image=picture, only_infer=True)
    assert nothing is None
    near(only_vision, vision)
    nothing, only_language = model(text_description=words, padding_mask=pad, only_infer=True)
    assert nothing is None
    near(only_language, language)
    for embedding in (only_vision, only_language):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def seq2seq(tokens: int) -> Tensor:
    blocked = torch.ones(Nv + tokens, Nv + tokens).triu(1)
    blocked[:Nv, :Nv] = 0
    return blocked


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [LENGTHS, [7, 0, 3], [7, 7, 7]])
@torch.no_grad()
def test_captioning(impl: str, lengths: list[int]) -> None:
    need(impl)
    model = task_model("captioning", impl)
    state, picture, words, pad = model.state_dict(), images(3), texts(3, 7), padding(lengths, 7)
    rows = rows_of(
        model,
        textual_tokens=words,
        visual_tokens=picture,
        text_padding_position=pad,
        attn_mask=seq2seq(7),
    )[:, Nv:]
    truth = linear(state, "mlm_head", rows)
    logits, cache = model(picture, words, pad, None)
    assert logits.shape == (3, 7, 100)
    assert cache is None
    near(logits[~pad], truth[~pad])
    chosen = (texts(3, 7, seed=5) % 2 == 0) & ~pad
    for mask in (chosen, chosen.long()):
        some, _ = model(picture, words, pad, mask)
        assert some.shape == (int(chosen.sum()), 100)
        near(some, truth[chosen])
    if not pad.any():
        near(model(picture, words, None, None)[0], truth)
        near(model(picture, words, None, chosen)[0], truth[chosen])


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_decoding_step_by_step_is_decoding_at_once(impl: str) -> None:
    need(impl)
    model = task_model("captioning", impl, layer_norm_eps=0.01)
    picture, words = images(3), texts(3, 6)
    words[:, -1] = mask = 99
    whole, _ = model(picture, words, None, None)
    state: dict[int, dict[str, Tensor]] = {}
    ask = torch.full((3, 1), mask)
    logits, state = model(picture, torch.cat([words[:, :1], ask], 1), None, None, 2, state)
    for step in range(1, 5):
        for cache in state.values():  # what the official decoder does: the mask token is not kept
            for name in ("prev_key", "prev_value"):
                cache[name] = cache[name][:, :, :-1]
        pair = torch.cat([words[:, step : step + 1], ask], 1)
        logits, state = model(None, pair, None, None, step + 2, state)
        assert logits.shape == (3, 2, 100)
        near(logits[:, 0], whole[:, step])
    near(logits[:, 1], whole[:, 5])
    assert state[0]["prev_key"].shape == (3, 4, Nv + 6, 16)


@torch.no_grad()
def test_the_first_decoding_step_is_the_plain_forward() -> None:
    model = task_model("captioning")
    picture, words = images(3), texts(3, 4)
    plain, _ = model(picture, words, None, None)
    state: dict[int, dict[str, Tensor]] = {}
    first, returned = model(picture, words, None, None, 4, state)
    near(first, plain)
    assert returned is state
    chosen = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]])
    near(model(picture, words, None, chosen, 4, {})[0], plain[chosen.bool()])


@torch.no_grad()
def test_decoding_with_another_image_size() -> None:
    model = task_model("captioning")
    picture, words = torch.randn(2, 3, 48, 16), texts(2, 4)
    whole, _ = model(picture, words, None, None)
    _, state = model(picture, words[:, :2], None, None, 2, {})
    logits, _ = model(None, words[:, 2:], None, None, 4, state)
    near(logits, whole[:, 2:])


# Text rows that the captioning head predicts: the second token of the two samples that have one.
CHOSEN = (torch.arange(21).view(3, 7) % 7 == 1) & ~padding(LENGTHS, 7)
# Rows of the last layer that each head reads, for 3 samples with texts of 4, 7 and 1 tokens.
ROWS_READ: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "nlvr2": (12, lambda m: m(images(3), images(3), texts(3, 7), padding(LENGTHS, 7))),
    "vqav2": (3, lambda m: m(images(3), texts(3, 7), padding(LENGTHS, 7))),
    "captioning": (2, lambda m: m(images(3), texts(3, 7), padding(LENGTHS, 7), CHOSEN)),
    "retrieval": (3, lambda m: m(images(3), only_infer=True)),
}


@pytest.mark.parametrize("impl", ["cpu", "composite"])
@pytest.mark.parametrize("task", ROWS_READ)
@torch.no_grad()
def test_rows_that_nobody_reads_are_not_computed(
    task: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(impl)
    expected, call = ROWS_READ[task]
    rows: list[int] = []
    real, whole = encoder_module.measured_expert_linear, whole_layer.encoder_layers

    def spy(x: Measured, *args: Any, **options: Any) -> Measured:
        if options.get("activation") == "gelu":
            rows.append(x.rows.shape[0])
        return real(x, *args, **options)

    def spy_layers(x: Tensor, layers: Any, *given: Any, **options: Any) -> Tensor | None:
        y = whole(x, layers, *given, **options)
        if y is not None:
            rows.extend([y.shape[0]] * len(layers))
        return y

    monkeypatch.setattr(encoder_module, "measured_expert_linear", spy)
    monkeypatch.setattr(whole_layer, "encoder_layers", spy_layers)
    call(task_model(task, impl))
    assert len(rows) == TINY.num_layers
    assert rows[-1] == expected
    assert rows[0] > expected


@torch.no_grad()
def test_a_text_that_is_all_padding() -> None:
    pad = padding([3, 0], 3)
    for task, call in (
        ("nlvr2", lambda m: m(images(2), images(2), texts(2, 3), pad)),
        ("retrieval", lambda m: m(None, texts(2, 3), pad, True)),
        ("retrieval", lambda m: m(None, texts(2, 3), pad.flip(0), True)),
    ):
        with pytest.raises(ShapeError, match=r"first text token of every sample.*sample \d"):
            call(task_model(task))


def test_inputs_that_do_not_belong_together() -> None:
    with pytest.raises(ShapeError, match=r"same shape, got \[2, 3, 32, 32\] and \[3, 3, 32, 32\]"):
        task_model("nlvr2")(images(2), images(3), texts(2, 3), None)
    with pytest.raises(ShapeError, match="same batch size"):
        task_model("vqav2")(images(2), texts(3, 4), None)
    with pytest.raises(ShapeError, match="needs an image and a text"):
        task_model("retrieval")(images(2))
    with pytest.raises(ShapeError, match="needs an image and a text"):
        task_model("retrieval")(None, texts(2, 3))
    with pytest.raises(ConfigError, match="without an image needs incremental_state"):
        task_model("captioning")(None, texts(2, 2), None, None)
    with pytest.raises(ShapeError, match="chooses padding in sample 1"):
        task_model("captioning")(images(2), texts(2, 3), padding([3, 1], 3), torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"the text's shape \[2, 3\], got \[2, 4\]"):
        task_model("captioning")(images(2), texts(2, 3), None, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("task", "arguments", "missing"),
    [
        ("vqav2", lambda: (None, texts(2, 3), None), "image"),
        ("vqav2", lambda: (images(2), None, None), "question"),
        ("nlvr2", lambda: (images(2), None, texts(2, 3), None), "image_b"),
        ("nlvr2", lambda: (images(2), images(2), None, None), "text_description"),
        ("captioning", lambda: (images(2), None, None, None), "text_ids"),
        ("imageclassification", lambda: (None,), "image"),
    ],
)
def test_an_input_that_is_missing(task: str, arguments: Any, missing: str) -> None:
    with pytest.raises(ShapeError, match=f"^{missing} is needed, a tensor, got NoneType"):
        task_model(task)(*arguments())


def test_a_decoding_step_that_fails_leaves_its_state() -> None:
    model = task_model("captioning").eval()
    right, wrong = ({i: {} for i in range(model.get_num_layers())} for _ in range(2))
    picture, words = images(1), texts(1, 2)
    step = {"attn_mask": torch.zeros(2, 3), "positions": torch.tensor([[2, 3]])}
    with torch.no_grad(), pytest.raises(ShapeError, match="attn_mask must be"):
        model.beit3(words, incremental_state=wrong, **step)
    assert wrong == {i: {} for i in wrong}
    with torch.no_grad():
        first, second = (
            model(picture, words, None, None, incremental_state=own)[0] for own in (right, wrong)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("text_len", [0, 1, 3, -1, "2", 2.0, True])
def test_the_length_of_a_caption_so_far(text_len: Any) -> None:
    model, words = task_model("captioning").eval(), texts(1, 2)
    state: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad(), pytest.raises(ShapeError, match="text_len must be"):
        model(images(1), words, None, None, text_len, state)
    with torch.no_grad():
        _, kept = model(images(1), words, None, None, 2, state)
    for wrong in (0, 1, 10**6, "3", 3.0):
        with torch.no_grad(), pytest.raises(ShapeError, match="text_len must be"):
            model(None, words, None, None, wrong, kept)
    with torch.no_grad():
        assert model(None, words, None, None, 3, kept)[0].shape[:2] == (1, 2)


@pytest.mark.parametrize("task", ["imageclassification", "nlvr2", "vqav2", "retrieval"])
def test_an_empty_batch(task: str) -> None:
    model, picture, words = task_model(task), images(0), texts(0, 3)
    pad = torch.zeros(0, 3, dtype=torch.bool)
    arguments: dict[str, tuple[Any, ...]] = {
        "imageclassification": (picture,),
        "nlvr2": (picture, picture, words, pad),
        "vqav2": (picture, words, pad),
        "retrieval": (picture, words, pad, True),
    }
    out = model(*arguments[task])
    for part in out if isinstance(out, tuple) else (out,):
        assert part.shape[0] == 0


def test_the_heads_take_gradients() -> None:
    for task in ("imageclassification", "vqav2", "nlvr2", "captioning", "retrieval"):
        model = task_model(task).train()
        words, pad, picture = texts(3, 7), padding(LENGTHS, 7), images(3)
        if task == "imageclassification":
            out = model(picture)
        elif task == "nlvr2":
            out = model(picture, picture, words, pad)
        elif task == "captioning":
            out = model(picture, words, pad, ~pad)[0]
        elif task == "retrieval":
            out = model(picture, words, pad)[0]
        else:
            out = model(picture, words, pad)
        out.square().sum().backward()
        for name, parameter in model.named_parameters():
            if not name.startswith("beit3."):
                assert parameter.grad is not None, (task, name)
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().max() > 0, (task, name)


def test_the_backbone_is_shared_by_name() -> None:
    model, plain = task_model("vqav2"), backbone(TINY.replace(normalize_output=False))
    own = {n.removeprefix("beit3.") for n in model.state_dict() if n.startswith("beit3.")}
    assert own == set(plain.state_dict())
