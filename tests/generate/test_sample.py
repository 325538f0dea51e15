"""Greedy choice and sampling: what is drawn, how it is scored, and word by word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import SPECIAL, TableDecoder

from beit3_fast.generate import Caption, Options, caption_steps, captions
from beit3_fast.generate.sample import choose_words


def run(decoder: TableDecoder, seed: int = 0, **options: Any) -> list[list[Caption]]:
    generator = torch.Generator().manual_seed(seed)
    return captions(decoder, Options(num_beams=1, **options), SPECIAL, generator)


def log_p(decoder: TableDecoder, which: int, told: tuple[int, ...], word: int) -> float:
    return float(decoder.scores(which, told).log_softmax(0)[word])


def score(decoder: TableDecoder, which: int, caption: Caption, penalty: float) -> float:
    """The model's own probability of a caption, over its length."""
    words = caption.tokens + ((SPECIAL.eos,) if caption.ended else ())
    total = sum(log_p(decoder, which, words[:i], word) for i, word in enumerate(words))
    return total / (len(words) + 1) ** penalty


def allowed(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    logits[[SPECIAL.bos, SPECIAL.pad]] = float("-inf")
    logits[SPECIAL.mask :] = float("-inf")
    return logits


@pytest.mark.parametrize("end", [-1e4, 0.0, 2.0])
def test_greedy_takes_the_likeliest_word(end: float) -> None:
    decoder = TableDecoder(6, end)
    for which, (caption,) in enumerate(run(decoder, max_length=9)):
        told: tuple[int, ...] = ()
        while len(told) < 7:
            word = int(allowed(decoder.scores(which, told)).argmax())
            if word == SPECIAL.eos:
                break
            told = (*told, word)
        assert caption.tokens == told
        assert caption.ended == (len(told) < 7)
        assert caption.score == pytest.approx(score(decoder, which, caption, 0.6), abs=1e-5)


def test_greedy_inputs_leave_when_they_end() -> None:
    decoder = TableDecoder(6, 1.0)
    lengths = [len(caption.tokens) for (caption,) in run(decoder, max_length=9)]
    assert len(set(lengths)) > 1
    assert decoder.rows == [sum(n >= step for n in lengths) for step in range(len(decoder.rows))]


def test_samples_follow_the_distribution() -> None:
    """1,600 first words: every frequency within five standard deviations of its probability."""
    decoder = TableDecoder(1)
    options = Options(1, 3, num_return_sequences=1600, sample=True, temperature=1.5)
    words, logs, _ = next(choose_words(decoder, options, SPECIAL, torch.Generator().manual_seed(1)))
    p = (allowed(decoder.scores(0, ())) / 1.5).softmax(0)
    counts = torch.bincount(words[0], minlength=len(p))
    assert ((counts - 1600 * p).abs() <= 5 * (1600 * p * (1 - p)).sqrt()).all()
    assert counts[allowed(decoder.scores(0, ())).isinf()].sum() == 0
    own = torch.tensor([log_p(decoder, 0, (), int(word)) for word in words[0]])
    assert torch.allclose(logs[0], own, atol=1e-5)


@pytest.mark.parametrize("limit", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.5}])
def test_only_the_likeliest_are_drawn(limit: dict[str, Any]) -> None:
    decoder = TableDecoder(1)
    options = Options(1, 3, num_return_sequences=1600, sample=True, **limit)
    words, _, _ = next(choose_words(decoder, options, SPECIAL, torch.Generator().manual_seed(2)))
    p, order = allowed(decoder.scores(0, ())).softmax(0).sort(descending=True)
    kept = order[: limit.get("top_k", len(order))]
    if "top_p" in limit:
        own = p[: len(kept)] / p[: len(kept)].sum()
        kept = kept[: int((own.cumsum(0) < limit["top_p"]).sum()) + 1]
    assert set(words[0].tolist()) == set(kept.tolist())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.87, 3), (0.88, 4)]
)
def test_the_word_that_reaches_top_p_is_the_last(top_p: float, kept: int) -> None:
    class Halves(TableDecoder):
        def scores(self, which: int, words: tuple[int, ...]) -> torch.Tensor:
            out = torch.full((self.vocabulary,), -1e4)
            out[3:7] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
            return out

    options = Options(1, 3, num_return_sequences=200, sample=True, top_p=top_p)
    draw = torch.Generator().manual_seed(0)
    words, _, _ = next(choose_words(Halves(1), options, SPECIAL, draw))
    assert len(words.unique()) == kept


def test_captions_that_are_drawn() -> None:
    decoder = TableDecoder(3, 0.5)
    options = {"max_length": 8, "num_return_sequences": 5, "sample": True, "length_penalty": 1.0}
    found = run(decoder, **options)
    for which, own in enumerate(found):
        assert len(own) == 5
        assert [c.score for c in own] == sorted((c.score for c in own), reverse=True)
        for caption in own:
            assert caption.score == pytest.approx(score(decoder, which, caption, 1.0), abs=1e-5)
            assert caption.ended or len(caption.tokens) == 6
    assert len({c.tokens for own in found for c in own}) > 8
    assert run(TableDecoder(3, 0.5), **options) == found
    assert run(TableDecoder(3, 0.5), seed=1, **options) != found


@pytest.mark.parametrize("end", [-1e4, 1.0])
def test_word_by_word_is_all_at_once(end: float) -> None:
    for which in range(4):
        decoder, again = TableDecoder(4, end), TableDecoder(4, end)
        for own in (decoder, again):
            own.live, own.told = [which], [[()]]
        ((caption,),) = run(decoder, max_length=9, length_penalty=0.0)
        steps = list(caption_steps(again, Options(1, 9), SPECIAL))
        assert tuple(step.token for step in steps) == caption.tokens
        if not caption.ended:
            assert sum(step.log_p for step in steps) == pytest.approx(caption.score, abs=1e-5)
