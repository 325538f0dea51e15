"""Drop path: who is dropped, that nothing else changes, and that what is dropped is not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import FORMS, TINY, backbone, images, task_model, texts
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.model import BEiT3
from beit3_fast.model import encoder as encoder_module
from beit3_fast.model.drop_path import Draws, Kept, draw
from beit3_fast.ops import Measured

RATE = 0.4


def mixed(model: BEiT3, **options: Any) -> Tensor:
    """Six samples: pairs, images and texts, of any lengths."""
    dtype = next(model.parameters()).dtype
    picture, words = images(4, model.config).to(dtype), texts(4, 5, model.config)
    return model.forward_packed(
        [picture[0], None, picture[1], picture[2], None, picture[3]],
        [words[0], words[1, :2], None, words[2, :3], words[3], None],
        **options,
    ).rows


def test_drop_path_rates_grow_with_depth() -> None:
    model = BEiT3(TINY.replace(num_layers=5, drop_path_rate=0.4))
    assert list(model.encoder.drop_path_rates) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    single = BEiT3(TINY.replace(num_layers=1, drop_path_rate=0.4))
    assert list(single.encoder.drop_path_rates) == [0.0]


def test_whole_samples_are_dropped_and_the_others_scaled() -> None:
    layout = TokenLayout.from_lengths([3] * 400, [2] * 400)
    ((first, second),) = draw([0.25], torch.zeros(layout.num_rows, 4), layout, skip=True)
    assert first is not None
    assert second is not None
    factors = first.of_rows(layout)
    assert factors.shape == (layout.num_rows, 1)
    assert sorted(set(factors.flatten().tolist())) == pytest.approx([0.0, 1 / 0.75])
    for sample in range(400):
        assert len(set(factors[layout.sample_of_row == sample, 0].tolist())) == 1
    assert factors.mean().item() == pytest.approx(1.0, abs=0.1)
    assert first.samples == tuple((first.factors > 0).tolist())
    assert first.scale == pytest.approx(1 / 0.75)
    assert first.samples != second.samples
    assert draw([0.0], torch.zeros(5, 4), layout, skip=True) == [(None, None)]


def test_draws_are_in_the_caller_s_order() -> None:
    """Sorting the batch by kind changes no sample's luck, nor does drawing all layers at once."""
    layout = TokenLayout.from_lengths([0, 3, 3, 0, 3, 3] * 8, [2, 0, 1, 1, 0, 4] * 8)
    torch.manual_seed(3)
    drawn = [torch.empty(48, 1, 1).bernoulli_(0.5).div_(0.5)[:, 0, 0] for _ in range(4)]
    torch.manual_seed(3)
    layers = draw([0.5, 0.0, 0.5], torch.zeros(layout.num_rows, 4), layout, skip=False)
    kept = [branch for layer in layers for branch in layer if branch is not None]
    assert len(kept) == 4
    for own, expected in zip(kept, drawn, strict=True):
        assert torch.equal(own.factors, expected)
        assert torch.equal(own.of_rows(layout)[:, 0], expected[layout.sample_of_row])


def test_drop_path_on_average_is_the_plain_model() -> None:
    config = TINY.replace(drop_path_rate=0.5, num_layers=2, normalize_output=False)
    model = backbone(config)
    picture = images(1).expand(4000, -1, -1, -1)
    with torch.no_grad():
        plain = model(visual_tokens=picture[:1])["encoder_out"][0, 0]
        model.train()
        drawn = model(visual_tokens=picture)["encoder_out"][:, 0]
        model.eval()
        again = model(visual_tokens=picture[:1])["encoder_out"][0, 0]
    kinds = drawn.unique(dim=0)
    assert len(kinds) == 4  # attention and feed-forward of the last layer, each kept or dropped
    assert torch.equal(again, plain)
    assert (kinds - plain).abs().amax(1).min() > 1e-3


def test_drop_path_is_off_in_evaluation_and_at_rate_zero() -> None:
    model = backbone(TINY.replace(drop_path_rate=0.5))
    with torch.no_grad():
        assert torch.equal(mixed(model), mixed(model))
        model.train()
        assert not torch.equal(mixed(model), mixed(model))
        steady = backbone(TINY).train()
        assert torch.equal(mixed(steady), mixed(backbone(TINY)))


def given(masks: list[list[bool]], skip: bool) -> Any:
    """``draw`` with these samples kept, two masks a layer."""

    def draws(rates: Any, x: Tensor, *_: Any) -> list[Draws]:
        scale = 1 / (1 - RATE)
        kept = [
            Kept(torch.tensor(own, dtype=x.dtype) * scale, tuple(own) if skip else None, scale)
            for own in masks
        ]
        return [(kept[i], kept[i + 1]) for i in range(0, len(kept), 2)]

    return draws


MASKS = {
    "some": [
        [True, False, True, False, True, True],
        [False, True, False, True, False, True],
        [True, True, False, False, False, True],
        [False, False, False, True, True, False],
    ],
    "no text left": [
        [False, False, True, False, False, True],
        [True] * 6,
        [False, False, False, False, False, True],
        [True, False, True, True, False, True],
    ],
    "nobody": [[True] * 6, [False] * 6, [False] * 6, [False] * 6],
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", ["released", "paper, all layers"])
@pytest.mark.parametrize("reads", [("all", "all"), ("first", "none")])
@pytest.mark.parametrize("mask", ["bidirectional", "seq2seq"])
def test_the_result_and_gradients_of_multiplying(
    masks: str, form: str, reads: tuple[str, str], mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FORMS[form].replace(drop_path_rate=RATE, num_layers=2)
    model = backbone(config).double().train()
    results = []
    for skip in (False, True):
        monkeypatch.setattr(encoder_module, "draw", given(MASKS[masks], skip))
        model.zero_grad(set_to_none=True)
        rows = mixed(model, mask=mask, read_vision=reads[0], read_text=reads[1])
        rows.square().sum().backward()
        results.append((rows.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (expected, gradients), (ours, own) = results
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert expected.abs().max() > 0
    for name, gradient in gradients.items():
        if gradient is None:
            assert own[name] is None, name
        else:
            assert own[name] is not None, name
            torch.testing.assert_close(own[name], gradient, rtol=1e-10, atol=1e-9, msg=name)


def test_the_same_seed_multiplies_or_skips_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(TINY.replace(drop_path_rate=0.5)).train()
    torch.manual_seed(11)
    ours = mixed(model)
    monkeypatch.setattr(encoder_module, "draw", lambda *given, **_: draw(*given[:3], skip=False))
    torch.manual_seed(11)
    torch.testing.assert_close(mixed(model), ours, rtol=1e-5, atol=1e-5)


def test_rows_of_dropped_samples_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(TINY.replace(drop_path_rate=RATE, num_layers=1)).train()
    seen: list[int] = []
    real = encoder_module.measured_expert_linear

    def counting(x: Measured, *args: Any, **options: Any) -> Any:
        seen.append(len(x.rows))
        return real(x, *args, **options)

    monkeypatch.setattr(encoder_module, "draw", given([[True] * 4, [True] * 4], True))
    monkeypatch.setattr(encoder_module, "measured_expert_linear", counting)
    model.encode(images(4))
    whole = list(seen)
    seen.clear()
    kept = [True, False, True, False]
    monkeypatch.setattr(encoder_module, "draw", given([kept, [False] * 4], True))
    model.encode(images(4))
    assert seen == [rows // 2 for rows in whole[:2]]


def test_a_mask_tensor_multiplies() -> None:
    model = backbone(TINY.replace(drop_path_rate=0.5)).train()
    tokens = TINY.num_vision_tokens
    everything = torch.ones(tokens, tokens, dtype=torch.bool)
    torch.manual_seed(2)
    ours = model.encode(images(5), mask=everything).rows
    torch.manual_seed(2)
    torch.testing.assert_close(model.encode(images(5)).rows, ours, rtol=1e-5, atol=1e-5)


ANSWERS: dict[str, Callable[[Any], Any]] = {
    "imageclassification": lambda model: model.classify(images(6)),
    "vqav2": lambda model: model.answer(images(6), texts(6, 4)),
    "nlvr2": lambda model: model.reason(images(6), images(6, seed=3), texts(6, 4)),
    "captioning": lambda model: model.caption(images(6), mask_id=91),
    "retrieval": lambda model: [
        model.encode_image(images(6)).tolist(),
        model.encode_text(texts(6, 4)).tolist(),
        model.encode_pair(images(6), texts(6, 4)).tolist(),
    ],
}


@pytest.mark.parametrize("task", ANSWERS)
def test_answers_do_not_depend_on_chance_in_train_mode(task: str) -> None:
    model = task_model(task, drop_path_rate=0.9)
    expected = ANSWERS[task](model)
    model.train()
    assert ANSWERS[task](model) == expected
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        rows = [model.beit3.encode(images(6)).rows for _ in range(2)]
    assert not torch.equal(*rows)
