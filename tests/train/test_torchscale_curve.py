"""The same run on torchscale's modules, three passes a batch: the same loss curve, the same accuracy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _compat import need_torchscale
from train_cases import CODES, OPTIONS, config, data, model, run

from beit3_fast.data.masked_batch import TERMS
from beit3_fast.data.mixed import Mix
from beit3_fast.train import MaskedDataModelling, evaluate, read_log

need_torchscale()

from bench.torchscale_heads import Pretraining  # noqa: E402

PLAIN = replace(OPTIONS, ema_decay=None, accumulation=1, save_every=10_000)
RUN = replace(PLAIN, lr=3e-3, warmup_steps=5, layer_decay=1.0)


def theirs_and_ours(world: Path) -> tuple[Any, Any]:
    """Two models with the same weights and the same names for the optimizer's groups."""
    ours = model(world, drop_path_rate=0.0)
    theirs = Pretraining(config(world, drop_path_rate=0.0), CODES)
    theirs.load_state_dict(ours.state_dict())
    theirs.no_weight_decay = ours.no_weight_decay  # type: ignore[assignment]
    return theirs, ours


def curves(world: Path, folder: Path, steps: int, precision: str) -> tuple[Any, Any, Any, Any]:
    theirs, ours = theirs_and_ours(world)
    options = replace(RUN, steps=steps, precision=precision)
    lines = []
    for name, own in (("theirs", theirs), ("ours", ours)):
        run(world, folder / name, options, own, data=data(world, Mix(image=2, text=2, pair=2)))
        lines.append(read_log(folder / name))
    return theirs, ours, lines[0], lines[1]


def right(own: Any, world: Path) -> float:
    """Share of right predictions in batches that the run did not have."""
    scores = evaluate(own, data(world, Mix(4, 4, 4), seed=77), 64).values()
    return sum(s.accuracy * s.predictions for s in scores) / sum(s.predictions for s in scores)


def assert_same_curve(theirs: list[Any], ours: list[Any], steps: int, most: float) -> float:
    """Means of so many steps in a row are less than ``most`` apart, a share, of the loss and of each of its terms."""
    worst = 0.0
    for key in ("loss", *TERMS):
        a, b = (means([line[key] for line in lines], steps) for lines in (theirs, ours))
        worst = max(worst, *(abs(x - y) / x for x, y in zip(a, b, strict=True)))
    assert worst < most, f"the curves are {worst:.4%} apart"
    return worst


def means(values: list[float], steps: int) -> list[float]:
    return [sum(values[n : n + steps]) / steps for n in range(len(values) - steps + 1)]


def test_the_loss_of_one_batch(world: Path) -> None:
    theirs, ours = theirs_and_ours(world)
    for mix in (Mix(2, 2, 2), Mix(image=2), Mix(text=3), Mix(pair=2), Mix(image=1, text=2)):
        batch = data(world, mix)[1]
        with torch.no_grad():
            a, b = theirs(batch), ours(batch)
        for term in TERMS:
            torch.testing.assert_close(b[term], a[term], rtol=1e-4, atol=1e-5)


def test_twenty_steps_are_the_same(world: Path, tmp_path: Path) -> None:
    _, _, theirs, ours = curves(world, tmp_path, 20, "float32")
    assert_same_curve(theirs, ours, 1, 1e-4)
    assert theirs[-1]["loss"] < 0.97 * theirs[0]["loss"]


# Steps whose means are compared, how far apart they may be, and accuracies over some 11,000 predictions. In bfloat16 a run leaves
# its own course: torchscale's, from weights 1e-6 apart, is up to 3.4 % from itself in a step. What does not depend on the course is
# held by the test below.
TOLERANCES = {"float32": (1, 1e-4, 5e-4), "bfloat16": (20, 0.01, 5e-3)}


@pytest.mark.full
@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_two_hundred_steps_are_the_same(precision: str, world: Path, tmp_path: Path) -> None:
    steps, apart, accuracy = TOLERANCES[precision]
    a, b, theirs, ours = curves(world, tmp_path, 200, precision)
    worst = assert_same_curve(theirs, ours, steps, apart)
    last = [sum(line["loss"] for line in lines[-20:]) / 20 for lines in (theirs, ours)]
    assert last[1] == pytest.approx(last[0], rel=min(apart, 0.005))
    mine = right(b, world)
    b.load_state_dict(a.state_dict())
    other = right(b, world)
    print(f"{precision}: curves at most {worst:.4%} apart, last 20 {last}, right {mine} {other}")
    assert mine == pytest.approx(other, abs=accuracy)


class Beside(MaskedDataModelling):
    """Every micro-batch through another model, too, with the weights that the trained one then has."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        object.__setattr__(self, "other", other)
        object.__setattr__(self, "apart", [])

    def __call__(self, model: Any, batch: Any, totals: Any) -> Any:
        made = super().__call__(model, batch, totals)
        self.other.load_state_dict(model.state_dict())  # type: ignore[attr-defined]
        with torch.no_grad():
            own = super().__call__(self.other, batch, totals)[1]  # type: ignore[attr-defined]
        self.apart.append([float(own[term] / made[1][term] - 1) for term in TERMS])  # type: ignore[attr-defined]
        return made


@pytest.mark.full
@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_every_step_is_the_same_from_the_same_weights(
    precision: str, world: Path, tmp_path: Path
) -> None:
    theirs, ours = theirs_and_ours(world)
    beside = Beside(ours)
    options = replace(RUN, steps=200, precision=precision)
    own = data(world, Mix(image=2, text=2, pair=2))
    run(world, tmp_path, options, theirs, data=own, objective=beside)
    apart = torch.tensor(beside.apart)  # type: ignore[attr-defined]
    worst, bias = float(apart.abs().max()), float(apart.mean(0).abs().max())
    print(f"{precision}: a loss is at most {worst:.4%} apart, in the mean of all steps {bias:.4%}")
    assert len(apart) == 200
    assert worst < {"float32": 1e-5, "bfloat16": 0.005}[precision]
    assert bias < {"float32": 1e-6, "bfloat16": 1e-4}[precision]
