"""Masked data modelling: one packed pass is three passes, and only hidden places count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import FORMS
from pretraining_cases import CODES, CONFIG, batch, model, sample
from torch import Tensor

from beit3_fast.data import MaskedSample, masked_batch
from beit3_fast.data.masked_batch import TERMS
from beit3_fast.errors import ConfigError, InputError, ShapeError
from beit3_fast.model import BEiT3ForPretraining


def by_hand(own: Any, kinds: str) -> dict[str, Tensor]:
    """The losses from the plain forward, one sample at a time, with all logits."""
    names = {"i": "image", "p": "pair", "t": "text"}
    losses: dict[str, list[Tensor]] = {term: [] for term in TERMS}
    for number, kind in enumerate(kinds):
        one = sample(number, names[kind], own.config)
        out = own.beit3(
            None if one.text is None else one.text[None],
            None if one.image is None else one.image[None],
            vision_masked_position=None if one.image is None else one.hidden_patches[None],
        )["encoder_out"][0]
        patches = 0
        if one.image is not None:
            patches = len(one.hidden_patches)
            logits = own.mim_head(out[1 : 1 + patches])[one.hidden_patches]
            term = "image" if kind == "i" else "pair_image"
            losses[term].append(
                F.cross_entropy(logits, one.codes[one.hidden_patches], reduction="none")
            )
        if one.text is not None:
            logits = own.mlm_head(out[-len(one.text) :])[one.hidden_words]
            term = "text" if kind == "t" else "pair_text"
            losses[term].append(
                F.cross_entropy(logits, one.words[one.hidden_words], reduction="none")
            )
    return {term: torch.cat(parts) if parts else torch.zeros(0) for term, parts in losses.items()}


@pytest.mark.parametrize("kinds", ["ippt", "tpitip", "i", "t", "p", "it"])
@pytest.mark.parametrize("form", ["released", "decoupled with pair experts", "paper"])
def test_one_packed_pass_is_each_sample_alone(form: str, kinds: str) -> None:
    own = model(FORMS[form].replace(patch_size=8, img_size=32))
    losses = own(batch(kinds, own.config))
    expected = by_hand(own, kinds)
    assert list(losses) == list(TERMS)
    for term in TERMS:
        assert losses[term].dtype == torch.float32
        torch.testing.assert_close(losses[term], expected[term], rtol=1e-4, atol=1e-4)


def test_gradients_of_the_packed_pass() -> None:
    own = model()
    sum(loss.sum() for loss in own(batch("tpitip")).values()).backward()
    packed = {name: p.grad for name, p in own.named_parameters()}
    own.zero_grad(set_to_none=True)
    sum(loss.sum() for loss in by_hand(own, "tpitip").values()).backward()
    for name, parameter in own.named_parameters():
        grad, expected = packed[name], parameter.grad
        assert (grad is None) is (expected is None), name
        if grad is not None and expected is not None and not name.endswith("k_proj.bias"):
            scale = float(expected.abs().max())
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_what_is_hidden_cannot_be_seen() -> None:
    own = model()
    one = batch("ip")
    assert one.images is not None
    assert one.hidden_patches is not None
    before = own(one)
    patches = one.hidden_patches.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    unseen = own(replace(one, images=one.images + 3.0 * patches))
    seen = own(replace(one, images=one.images + 3.0 * ~patches))
    for term in ("image", "pair_image", "pair_text"):
        assert torch.equal(unseen[term], before[term])
        assert not torch.allclose(seen[term], before[term])


def test_predictions_and_truth() -> None:
    own = model()
    one = batch("tpitip")
    predicted = own.predict(one)
    losses = own(one)
    for term in TERMS:
        tokens, true = predicted[term]
        assert len(tokens) == len(true) == one.counts[term]
        # A prediction that is right has a probability above one in V, one that is wrong below a half.
        right = tokens == true
        assert (losses[term][~right] > 0.69).all()
        classes = CODES if "image" in term else CONFIG.vocab_size
        assert (losses[term][right] < torch.tensor(classes).log()).all()
    with torch.no_grad():
        own.mlm_head.bias[57] = 1e4
    assert set(own.predict(one)["pair_text"].predicted.tolist()) == {57}


def test_a_batch_holds_each_sample_once() -> None:
    one = batch("tpitip")
    assert (one.num_images, one.num_pairs, one.num_texts, one.num_samples) == (2, 2, 2, 6)
    samples = [sample(n, k) for n, k in ((2, "image"), (4, "image"), (1, "pair"), (5, "pair"))]
    texts = [samples[2], samples[3], sample(0, "text"), sample(3, "text")]
    assert one.images is not None
    assert one.tokens is not None
    assert torch.equal(one.images, torch.stack([s.image for s in samples if s.image is not None]))
    for own, expected in zip(one.tokens.split(one.text_lengths), texts, strict=True):
        assert torch.equal(own, expected.text)
    words = [s.words[s.hidden_words] for s in texts if s.words is not None]
    assert torch.equal(one.words, torch.cat(words))
    codes = [s.codes[s.hidden_patches] for s in samples if s.codes is not None]
    assert torch.equal(one.codes, torch.cat(codes))
    assert one.counts["text"] == sum(len(own) for own in words[2:])
    moved = one.to("cpu", torch.bfloat16)
    assert moved.images is not None
    assert moved.images.dtype == torch.bfloat16
    assert moved.hidden_patches is one.hidden_patches


def test_samples_that_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        masked_batch([])
    with pytest.raises(InputError, match="sample 1 has neither"):
        masked_batch([sample(0, "image"), MaskedSample()])
    other = sample(1, "image", CONFIG.replace(img_size=16))
    with pytest.raises(InputError, match=r"one size, got \[\(3, 16, 16\), \(3, 32, 32\)\]"):
        masked_batch([sample(0, "image"), other])
    with pytest.raises(InputError, match=r"an image needs a mask .* got \[16\] and None"):
        masked_batch([sample(0, "image")._replace(codes=None)])


def test_a_model_of_one_branch() -> None:
    own = BEiT3ForPretraining(CONFIG.replace(modalities=("text",)), CODES)
    assert not hasattr(own, "mim_head")
    assert len(own(batch("tt"))["text"])
    with pytest.raises(ConfigError, match="no vision branch"):
        own(batch("i"))


def test_lengths_that_do_not_fit_the_batch() -> None:
    own = model()
    one = batch("ipt")
    with pytest.raises(ShapeError, match="2 images, of which 3 are alone, do not fit 2 texts"):
        own(replace(one, num_images=3))
    with pytest.raises(ShapeError, match="do not fit 2 texts of 9 tokens"):
        own(replace(one, text_lengths=(4, 5)))
