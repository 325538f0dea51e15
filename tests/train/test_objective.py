"""The loss of masked data modelling: four means, weighted, whatever the step is cut into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from train_cases import data, model

from beit3_fast.data.masked_batch import TERMS
from beit3_fast.data.mixed import Mix
from beit3_fast.errors import ConfigError
from beit3_fast.train import MaskedDataModelling


def test_the_loss_is_the_weighted_sum_of_four_means(world: Any) -> None:
    own, batch = model(world).eval(), data(world)[0]
    with torch.no_grad():
        losses = own(batch)
    means = {term: float(losses[term].mean()) for term in TERMS}
    weights = {"image": 2.0, "pair_image": 0.5, "pair_text": 0.0, "text": 3.0}
    loss, terms = MaskedDataModelling(**weights)(own, batch, batch.counts)
    assert {term: float(own) for term, own in terms.items()} == pytest.approx(means, rel=1e-5)
    assert loss.item() == pytest.approx(sum(weights[t] * means[t] for t in TERMS), rel=1e-5)
    assert not any(term.requires_grad for term in terms.values())


def gradients(own: Any, batches: list[Any]) -> tuple[float, dict[str, Tensor]]:
    own.zero_grad(set_to_none=True)
    totals = {term: sum(batch.counts[term] for batch in batches) for term in TERMS}
    total = 0.0
    for batch in batches:
        loss, _ = MaskedDataModelling()(own, batch, totals)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in own.named_parameters() if p.grad is not None}


def test_micro_batches_add_up_to_the_whole_batch(world: Any) -> None:
    own = model(world).eval()
    small, large = data(world, Mix(1, 1, 1)), data(world, Mix(4, 4, 4))
    parts, whole = [small[number] for number in range(4)], large[0]
    assert len({tuple(part.counts.values()) for part in parts}) > 1, "the parts must differ in size"
    sums = {term: sum(part.counts[term] for part in parts) for term in TERMS}
    assert sums == whole.counts
    loss, grads = gradients(own, parts)
    expected, wanted = gradients(own, [whole])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        if not name.endswith("k_proj.A.bias") and not name.endswith("k_proj.B.bias"):
            torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_term_without_predictions_is_left_out(world: Any) -> None:
    own = model(world).eval()
    batch = data(world, Mix(text=3))[0]
    loss, terms = MaskedDataModelling()(own, batch, batch.counts)
    assert list(terms) == ["text"]
    assert loss.item() == pytest.approx(own(batch)["text"].mean().item(), rel=1e-5)
    with pytest.raises(ConfigError, match="nothing is hidden"):
        MaskedDataModelling()(own, batch, dict.fromkeys(TERMS, 0))


@pytest.mark.parametrize("weights", [{"image": -1.0}, {"text": float("nan")}, {"text": "1"}])
def test_weights_that_make_no_sense(weights: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="weights must be numbers"):
        MaskedDataModelling(**weights)
    with pytest.raises(ConfigError, match="one of them above"):
        MaskedDataModelling(0, 0, 0, 0)
