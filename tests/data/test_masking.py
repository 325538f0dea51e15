"""Which patches and words are hidden: shares, blocks, seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3_fast.data.masking import Masking, mask_patches, mask_words, sample_generator
from beit3_fast.errors import ConfigError, InputError

MASK = 101


def generator(*place: int) -> np.random.Generator:
    return sample_generator(0, *place)


def text(words: int) -> Tensor:
    return torch.tensor([0, *range(4, 4 + words), 2])


@pytest.mark.parametrize(
    ("grid", "share", "count"),
    [((14, 14), 0.4, 78), ((8, 8), 0.4, 26), ((2, 2), 0.4, 2), ((1, 1), 0.4, 0), ((3, 5), 1.0, 15)],
)
def test_the_share_of_patches_is_exact(grid: tuple[int, int], share: float, count: int) -> None:
    for number in range(20):
        hidden = mask_patches(grid, share, generator(number))
        assert hidden.shape == (grid[0] * grid[1],)
        assert int(hidden.sum()) == count


def neighbours(hidden: Tensor, side: int = 14) -> float:
    """Share of the hidden patches whose right neighbour, too, is hidden."""
    mask = hidden.view(side, side)
    return float((mask[:, :-1] & mask[:, 1:]).sum() / mask[:, :-1].sum())


def test_patches_are_hidden_in_blocks() -> None:
    blocks = [neighbours(mask_patches((14, 14), 0.4, generator(n))) for n in range(100)]
    single = [neighbours(mask_patches((14, 14), 0.4, generator(n), 1, 1.0)) for n in range(100)]
    apart = [
        neighbours(torch.rand(196, generator=torch.Generator().manual_seed(n)) < 0.4)
        for n in range(100)
    ]
    assert np.mean(apart) == pytest.approx(0.4, abs=0.05)
    assert np.mean(blocks) > 0.7
    assert np.mean(blocks) > np.mean(single)


def test_every_patch_is_hidden_at_times() -> None:
    often = sum(mask_patches((14, 14), 0.4, generator(n)).float() for n in range(400)) / 400
    assert isinstance(often, Tensor)
    assert often.mean() == pytest.approx(78 / 196)
    # Blocks lie inside the image, so corners are hidden least.
    assert often.min() > 0.01
    assert often.max() < 0.8


@pytest.mark.parametrize(
    ("words", "share", "count"),
    [(20, 0.15, 3), (3, 0.15, 1), (20, 0.5, 10), (0, 0.5, 0), (1, 0.5, 1), (7, 0.0, 0)],
)
def test_the_share_of_words(words: int, share: float, count: int) -> None:
    tokens = text(words)
    seen, hidden = mask_words(tokens, share, generator(1), MASK)
    assert int(hidden.sum()) == count
    assert torch.equal(seen[~hidden], tokens[~hidden])
    assert (seen[hidden] == MASK).all()
    assert torch.equal(tokens, text(words))


def test_specials_are_never_hidden_and_unknown_words_may_be() -> None:
    tokens = torch.tensor([0, 3, 2, 1, 1])
    seen, hidden = mask_words(tokens, 1.0, generator(0), MASK)
    assert hidden.tolist() == [False, True, False, False, False]
    assert seen.tolist() == [0, MASK, 2, 1, 1]


def test_every_word_is_hidden_equally_often() -> None:
    often = (
        sum(mask_words(text(8), 0.25, generator(n), MASK).hidden.float() for n in range(800)) / 800
    )
    assert isinstance(often, Tensor)
    assert often[1:-1].tolist() == pytest.approx([0.25] * 8, abs=0.06)


def test_random_and_kept_words() -> None:
    tokens = text(90)
    masked = kept = drawn = 0
    others = set()
    for number in range(100):
        seen, hidden = mask_words(tokens, 0.5, generator(number), MASK, 0.1, 0.2)
        own, new = tokens[hidden], seen[hidden]
        masked += int((new == MASK).sum())
        kept += int((new == own).sum())
        other = new[(new != MASK) & (new != own)]
        drawn += len(other)
        others |= set(other.tolist())
    assert [masked / 4500, drawn / 4500, kept / 4500] == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    assert min(others) == 4
    assert max(others) == MASK - 1


def test_a_sample_is_masked_by_its_place_alone() -> None:
    def drawn(*place: int, seed: int = 5) -> list[Any]:
        own = sample_generator(seed, *place)
        hidden = mask_patches((14, 14), 0.4, own)
        return [hidden.tolist(), mask_words(text(30), 0.5, own, MASK).hidden.tolist()]

    first = drawn(0, 1, 2)
    torch.manual_seed(9)
    np.random.seed(9)
    assert drawn(0, 1, 2) == first
    for other in (drawn(1, 1, 2), drawn(0, 2, 2), drawn(0, 1, 3), drawn(0, 1, 2, seed=6)):
        assert other[0] != first[0]
        assert other[1] != first[1]


def test_pairs_hide_both_or_one() -> None:
    assert Masking().shares("pair", generator()) == (0.4, 0.5)
    assert Masking().shares("image", generator()) == (0.4, 0.0)
    assert Masking().shares("text", generator()) == (0.0, 0.15)
    one = Masking(pair_masks="one")
    drawn = [one.shares("pair", generator(n)) for n in range(200)]
    assert set(drawn) == {(0.4, 0.0), (0.0, 0.5)}
    assert 70 < drawn.count((0.4, 0.0)) < 130


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image", 1.5, "image must be a share"),
        ("text", "0.15", "text must be a share"),
        ("pair_text", float("nan"), "pair_text must be a share"),
        ("kept_words", True, "kept_words must be a share"),
        ("pair_masks", "neither", "pair_masks must be one of"),
        ("min_block", 0, "min_block must be a positive"),
        ("max_aspect", 0.5, "max_aspect must be a finite number"),
    ],
)
def test_values_that_make_no_sense(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Masking(**{field: value})


def test_other_errors() -> None:
    with pytest.raises(ConfigError, match="at most 1 together"):
        Masking(random_words=0.6, kept_words=0.5)
    with pytest.raises(ConfigError, match="kind must be"):
        Masking().shares("video", generator())
    for seed in (-1, 0.5, True):
        with pytest.raises(ConfigError, match="seed must be an integer of at least 0"):
            sample_generator(seed, 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"int64 \[Nt\], got torch.float32"):
        mask_words(torch.zeros(3), 0.5, generator(), MASK)
