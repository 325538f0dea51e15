"""Beam search against trying every caption, and what it does with inputs that are finished."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import SPECIAL, TableDecoder, every_caption

from beit3_fast.generate import Caption, Options, beam, captions


def search(decoder: TableDecoder, **options: Any) -> list[list[Caption]]:
    return captions(decoder, Options(**options), SPECIAL)


class FewWords(TableDecoder):
    """A vocabulary that is wide enough for the beams, of which only the first words have any chance."""

    def scores(self, which: int, words: tuple[int, ...]) -> torch.Tensor:
        out = super().scores(which, words)
        out[SPECIAL.mask :] = -1e4
        out[[SPECIAL.bos, SPECIAL.pad]] = -1e4
        return out


class Indifferent(TableDecoder):
    """Scores that depend on no words, which captions of any length are quickly made of."""

    def scores(self, which: int, words: tuple[int, ...]) -> torch.Tensor:
        return super().scores(which, words[:0])


@pytest.mark.parametrize("penalty", [0.6, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("end", [-2.0, 0.0, 3.0])
def test_with_beams_for_everything_it_finds_the_best(end: float, penalty: float) -> None:
    """Three words at most: 36 beams hold every prefix, so nothing may be missed."""
    decoder = FewWords(3, end, vocabulary=200)
    found = captions(decoder, Options(36, 5, penalty, 4), replace(SPECIAL, mask=150))
    for which, own in enumerate(found):
        expected = every_caption(decoder, which, 5, penalty)[:4]
        assert [c.tokens for c in own] == [words for _, words, _ in expected]
        assert [c.ended for c in own] == [ended for _, _, ended in expected]
        scores = [score for score, _, _ in expected]
        assert [c.score for c in own] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("penalty", [-10, 10])
@pytest.mark.parametrize("width", [{"num_beams": 2}, {"num_beams": 1, "sample": True}])
def test_the_longest_captions_keep_their_order(penalty: int, width: dict[str, Any]) -> None:
    """At the bounds of the penalty: no score may overflow, nor become nothing."""
    plain, powered = [], []
    for found, own in ((plain, 0), (powered, penalty)):
        torch.manual_seed(0)
        options = {"max_length": 1022, "num_return_sequences": 2, **width}
        found += search(Indifferent(1, -1e4, 40), length_penalty=own, **options)[0]
    assert [c.tokens for c in powered] == [c.tokens for c in plain]
    scores = [c.score / 1021.0**penalty for c in plain]
    assert [c.score for c in powered] == pytest.approx(scores, rel=1e-5)
    assert powered[0].score > powered[1].score


@pytest.mark.parametrize("penalty", [0.6, -1.0])
def test_a_search_that_ends_early_has_missed_nothing(
    penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> list[list[Caption]]:
        decoder = TableDecoder(300, end=3.0, vocabulary=40)
        return search(decoder, num_beams=2, max_length=8, length_penalty=penalty)

    early = found()
    monkeypatch.setattr(beam, "_longest", lambda *_: float("inf"))
    assert found() == early


def test_finished_inputs_leave() -> None:
    decoder = TableDecoder(8, end=2.0, vocabulary=40)
    found = search(decoder, num_beams=2, max_length=12)
    assert decoder.rows[0] == 8
    assert decoder.rows == sorted(decoder.rows, reverse=True)
    assert len(set(decoder.rows)) > 2
    for which in range(8):
        alone = TableDecoder(8, end=2.0, vocabulary=40)
        alone.live, alone.told = [which], [[()]]
        assert search(alone, num_beams=2, max_length=12) == [found[which]]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_finished_inputs_stay_where_leaving_is_dear(num_beams: int) -> None:
    """Asked every fourth step, and half of them must be done; the captions are the same."""
    options = {"num_beams": num_beams, "max_length": 14}
    expected = search(TableDecoder(8, end=1.5, vocabulary=40), **options)
    decoder = TableDecoder(8, end=1.5, vocabulary=40)
    decoder.keep_is_free = False
    assert search(decoder, **options) == expected
    assert decoder.rows[:4] == [8] * 4
    assert len(set(decoder.rows)) > 1
    for before, after in itertools.pairwise(decoder.rows):
        assert after == before or 2 * after <= before


def test_a_caption_of_the_wanted_length() -> None:
    """Nothing may end: every caption has max_length - 2 words, and is not called complete."""
    decoder = TableDecoder(2, end=-1e4, vocabulary=40)
    for own in search(decoder, num_beams=3, max_length=7, num_return_sequences=3):
        assert [len(c.tokens) for c in own] == [5, 5, 5]
        assert not any(c.ended for c in own)
        assert len({c.tokens for c in own}) == 3


def test_the_released_habit_drops_the_last_word() -> None:
    options = {"num_beams": 3, "max_length": 7, "num_return_sequences": 3}
    mended = search(FewWords(2, -1e4, 40), **options)
    kept = search(FewWords(2, -1e4, 40), compat=True, **options)
    for ours, released in zip(mended, kept, strict=True):
        assert [c.tokens[:-1] for c in ours] == [c.tokens for c in released]
        assert [c.score for c in ours] == [c.score for c in released]


def test_tokens_that_are_no_words_are_not_chosen() -> None:
    class Tempting(TableDecoder):
        def scores(self, which: int, words: tuple[int, ...]) -> torch.Tensor:
            out = super().scores(which, words)
            out[[SPECIAL.bos, SPECIAL.pad, SPECIAL.mask, SPECIAL.mask + 1]] += 5.0
            return out

    for options in (
        {"num_beams": 2},
        {"num_beams": 1},
        {"num_beams": 1, "sample": True, "seed": 0},
    ):
        for own in search(Tempting(4, end=-1e4), max_length=8, **options):
            assert all(3 <= token < SPECIAL.mask for c in own for token in c.tokens)
    released = search(Tempting(4, end=-1e4), num_beams=2, max_length=8, compat=True)
    assert any(token >= SPECIAL.mask for own in released for c in own for token in c.tokens)
