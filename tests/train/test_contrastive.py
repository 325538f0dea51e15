"""The contrastive loss is the one of all pairs in one place, however many processes and slices compute it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_ranks import N, batch, features, gradients, half, retrieval_model
from forked_ranks import on_ranks
from torch import Tensor

from beit3_fast.composite import masked_linear_cross_entropy as slices
from beit3_fast.errors import ShapeError
from beit3_fast.train import TrainOptions, read_log, train
from beit3_fast.train.contrastive import ContrastiveTuning, contrastive_loss


def formula(vision: Tensor, language: Tensor, scale: Tensor) -> Tensor:
    scores = scale * vision @ language.T
    return -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_ranks(2, tmp_path_factory.mktemp("ranks"), half)


@pytest.mark.parametrize(("logits", "thinnest"), [(1 << 24, 256), (1, 3), (1, 1)])
def test_one_process(logits: int, thinnest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_LOGITS", logits)
    monkeypatch.setattr(slices, "_THINNEST", thinnest)
    own = features(requires_grad=True)
    torch.testing.assert_close(contrastive_loss(*own), formula(*own), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(contrastive_loss, own)


def test_no_more_scores_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    logits = slices._logits

    def seen(*operands: Any) -> Tensor:
        sizes.append(logits(*operands).shape)
        return logits(*operands)

    monkeypatch.setattr(slices, "_logits", seen)
    monkeypatch.setattr(slices, "_LOGITS", 1)
    monkeypatch.setattr(slices, "_THINNEST", 3)
    vision, language, scale = features(requires_grad=True)
    contrastive_loss(vision, language, scale).backward()
    wide = {shape[1] for shape in sizes}
    assert wide == {3, 2 * N % 3}
    # Both directions, forward and again backward.
    assert len(sizes) == 4 * -(-2 * N // 3)


def test_two_processes_are_one_with_all_pairs(ranks: list[dict[str, Any]]) -> None:
    vision, language, scale = features(requires_grad=True)
    formula(vision, language, scale).backward()
    loss = formula(vision, language, scale)
    torch.testing.assert_close(sum(own["loss"] for own in ranks) / 2, loss, rtol=1e-12, atol=0)
    for name, truth in (("vision", vision), ("language", language)):
        whole = torch.cat([own[name] for own in ranks]) / 2
        torch.testing.assert_close(whole, truth.grad, rtol=1e-10, atol=1e-14, msg=name)
    torch.testing.assert_close(
        sum(own["scale"] for own in ranks) / 2, scale.grad, rtol=1e-10, atol=1e-14
    )


def test_shares_of_two_processes_add_up(ranks: list[dict[str, Any]]) -> None:
    loss, grads = gradients(retrieval_model(), batch(), {"pairs": 2 * N})
    torch.testing.assert_close(sum(own["share"] for own in ranks), loss, rtol=1e-12, atol=0)
    for name, truth in grads.items():
        whole = sum(own["grads"][name] for own in ranks)
        torch.testing.assert_close(whole, truth, rtol=1e-9, atol=1e-13, msg=name)


def test_processes_with_different_counts_are_told(ranks: list[dict[str, Any]]) -> None:
    assert all("same number of pairs, got [5, 4]" in own["uneven"] for own in ranks)


def test_the_loss_is_never_computed_in_half_precision() -> None:
    vision, language, scale = (own.float() for own in features())
    truth = contrastive_loss(vision, language, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(vision, language, scale), truth)
    half = contrastive_loss(vision.bfloat16(), language.bfloat16(), scale.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(("first", "second"), [((3, 4), (2, 4)), ((3,), (3,)), ((0, 4), (0, 4))])
def test_embeddings_that_do_not_match(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"must both be \[N, C\] with at least one pair"):
        contrastive_loss(torch.randn(first), torch.randn(second), torch.tensor(1.0))


class OneBatch:
    """The same pairs in every step."""

    def __getitem__(self, number: int) -> Any:
        return batch(torch.float32)


def test_matching_pairs_are_drawn_together(tmp_path: Path) -> None:
    model = retrieval_model().float()
    options = TrainOptions(steps=24, lr=3e-3, warmup_steps=2)
    report = train(model, OneBatch(), ContrastiveTuning(), options, tmp_path, progress=False)
    lines = read_log(tmp_path)
    assert report.complete
    assert lines[-1]["contrastive"] == lines[-1]["loss"] < 0.5 * lines[0]["loss"]
