"""What a run does on its way: it learns, counts what it skips, stops in time and says where it is."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from train_cases import OPTIONS, Watched, data, model, run

from beit3_fast.checkpoint import load_checkpoint, read_checkpoint
from beit3_fast.data.masked_batch import TERMS
from beit3_fast.errors import ConfigError, TrainingError
from beit3_fast.train import MaskedDataModelling, TrainOptions, read_log, train
from beit3_fast.train.checkpoints import Checkpoints

PLAIN = replace(OPTIONS, ema_decay=None, accumulation=1, save_every=100)


class Spoiled(MaskedDataModelling):
    """A loss, or only its gradient, that is not finite in the steps named."""

    def __init__(self, steps: tuple[int, ...], what: str) -> None:
        super().__init__()
        object.__setattr__(self, "state", [0, steps, what])

    def __call__(self, model: nn.Module, batch: Any, totals: Any) -> tuple[Tensor, Any]:
        state: list[Any] = self.state  # type: ignore[attr-defined]
        loss, terms = super().__call__(model, batch, totals)
        state[0] += 1
        if state[0] in state[1]:
            bias = model.get_parameter("mlm_head.bias")
            spoil = (
                bias.sum() * float("nan") if state[2] == "loss" else (bias * 0.0).abs().sqrt().sum()
            )
            loss = loss + spoil
        return loss, terms


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(what: str, world: Path, tmp_path: Path) -> None:
    own = model(world)
    seen: list[dict[str, Tensor]] = []

    class Watched(Spoiled):
        def __call__(self, model: nn.Module, batch: Any, totals: Any) -> tuple[Tensor, Any]:
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
            return super().__call__(model, batch, totals)

    options = replace(PLAIN, steps=5, ema_decay=0.5)
    report = run(world, tmp_path, options, own, objective=Watched((2, 3), what))
    assert (report.step, report.skipped) == (5, 2)

    def same(a: int, b: int) -> bool:
        return all(torch.equal(seen[a][name], seen[b][name]) for name in seen[a])

    assert [same(step, step + 1) for step in range(4)] == [False, True, True, False]
    lines = read_log(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2, 2]
    assert [line["lr"] is None for line in lines] == [False, True, True, False, False]
    assert (lines[1]["loss"] is None) is (what == "loss")
    assert lines[1]["grad_norm"] is None
    assert all(bool(p.isfinite().all()) for p in own.parameters())
    average = read_checkpoint(tmp_path / "average.safetensors").state
    for name, last in own.named_parameters():
        # What the steps that were made left behind: the first, the fourth and the fifth.
        expected = seen[0][name].lerp(seen[1][name], 0.5).lerp(seen[4][name], 0.5)
        assert torch.equal(average[name], expected.lerp(last, 0.5)), name


def test_too_many_in_a_row_stop_the_run(world: Path, tmp_path: Path) -> None:
    options = replace(PLAIN, max_skipped=2, accumulation=2, steps=8)
    with pytest.raises(
        TrainingError, match=r"not finite in 3 steps in a row, at last in step 6 .*bad-step-6\.pt"
    ):
        run(world, tmp_path, options, objective=Spoiled((3, 4, 7, 9, 11), "loss"))
    saved = torch.load(tmp_path / "bad-step-6.pt", weights_only=True)
    expected = [data(world)[10], data(world)[11]]
    assert len(saved) == 2
    for own, batch in zip(saved, expected, strict=True):
        assert torch.equal(own["images"], batch.images)
        assert torch.equal(own["tokens"], batch.tokens)
        assert torch.equal(own["hidden_patches"], batch.hidden_patches)
    assert [line["skipped"] for line in read_log(tmp_path)] == [0, 1, 1, 2, 3]


def test_steps_in_a_row_are_counted_over_a_continuation(world: Path, tmp_path: Path) -> None:
    options = replace(PLAIN, max_skipped=2, save_every=3, steps=6)

    class Ended(Exception):
        pass

    def end(call: int) -> None:
        if call == 4:
            raise Ended

    # Steps 2 and 3 are skipped, 3 is saved, then the run ends; the next one begins with step 4.
    with pytest.raises(Ended):
        run(world, tmp_path, options, objective=Watched(end, spoil=(2, 3)))
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row, at last in step 4"):
        run(world, tmp_path, options, objective=Watched(lambda call: None, spoil=(1,)))


@pytest.mark.parametrize("save_every", [1, 100])
def test_it_says_what_to_do_past_the_limit(save_every: int, world: Path, tmp_path: Path) -> None:
    options = replace(PLAIN, max_skipped=0, save_every=save_every)
    with pytest.raises(TrainingError) as raised:
        run(world, tmp_path, options, objective=Watched(lambda call: None, spoil=(3,)))
    said = str(raised.value)
    assert (
        "look at that batch, or begin anew in another folder with a lower lr or clip_grad" in said
    )
    assert ("the same call goes on from step 2" in said) is (save_every == 1)
    assert "last checkpoint" not in said


def test_checkpoints_of_skipped_steps_take_the_place_of_none(world: Path, tmp_path: Path) -> None:
    """Steps 1 to 3 are good, the others skipped: the last two good ones stay beside them."""
    options = replace(PLAIN, save_every=1, keep=2, steps=6)
    report = run(world, tmp_path, options, objective=Watched(lambda call: None, spoil=(4, 5, 6)))
    assert Checkpoints(tmp_path, 2).steps() == [2, 3, 4, 5, 6]
    assert report.said.startswith("6 steps, 3 skipped (the last 3 in a row: look at log.jsonl")


def test_a_run_of_an_older_version_is_refused(world: Path, tmp_path: Path) -> None:
    options = replace(PLAIN, steps=1)
    run(world, tmp_path, options)
    path = tmp_path / "step-00000001/run.json"
    facts = json.loads(path.read_text())
    del facts["start"]
    path.write_text(json.dumps(facts | {"form": "beit3_fast run 3"}))
    with pytest.raises(ConfigError, match=r"version of this package \(its form is .* run 3', not"):
        run(world, tmp_path, options)


def test_it_learns(world: Path, tmp_path: Path) -> None:
    options = replace(PLAIN, steps=24, lr=6e-3)
    run(world, tmp_path, options)
    lines = read_log(tmp_path)
    for term in TERMS:
        first, last = (
            sum(line[term] for line in lines[own]) / 4 for own in (slice(0, 4), slice(-4, None))
        )
        assert last < 0.9 * first, term


def test_bfloat16_runs_under_autocast(world: Path, tmp_path: Path) -> None:
    own = model(world)
    run(world, tmp_path / "a", replace(PLAIN, steps=3, precision="bfloat16"), own)
    run(world, tmp_path / "b", replace(PLAIN, steps=3))
    assert {p.dtype for p in own.parameters()} == {torch.float32}
    half, full = ([line["loss"] for line in read_log(tmp_path / name)] for name in "ab")
    assert half != full
    assert half == pytest.approx(full, rel=1e-2)


def test_the_gradient_is_clipped(world: Path, tmp_path: Path) -> None:
    norms = []

    def watch(optimizer: Any, *_: Any) -> None:
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    handle = register_optimizer_step_pre_hook(watch)
    try:
        run(world, tmp_path / "a", replace(PLAIN, steps=2, clip_grad=0.5))
        assert norms == pytest.approx([0.5, 0.5], rel=1e-3)
        run(world, tmp_path / "b", replace(PLAIN, steps=2, clip_grad=None))
    finally:
        handle.remove()
    logged = [line["grad_norm"] for line in read_log(tmp_path / "b")]
    assert norms[2:] == pytest.approx(logged, rel=1e-4)
    assert read_log(tmp_path / "a")[0]["grad_norm"] == pytest.approx(logged[0], rel=1e-5)


def test_what_is_saved_at_the_end(world: Path, tmp_path: Path) -> None:
    own = model(world)
    run(world, tmp_path, replace(OPTIONS, steps=4, save_every=100), own)
    other = model(world, seed=3)
    load_checkpoint(other, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    load_checkpoint(other, tmp_path / "average.safetensors")
    moved = [
        not torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True)
    ]
    assert sum(moved) > 0.8 * len(moved)


def test_the_log_and_the_bar(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    options = replace(PLAIN, steps=5, log_every=2)
    report = train(model(world), data(world), MaskedDataModelling(), options, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert lines[-1]["loss"] == report.loss
    assert lines[-1]["loss"] == pytest.approx(sum(lines[-1][term] for term in TERMS), rel=1e-5)
    assert all(line["samples_per_s"] > 0 for line in lines)
    assert "] 5/5," in terminal.getvalue()
    assert f"loss {report.loss:.3f}" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_options_have_the_paper_s_defaults() -> None:
    own = TrainOptions()
    assert (own.steps, own.lr, own.warmup_steps, own.weight_decay) == (10**6, 1e-3, 10**4, 0.05)
    assert (own.betas, own.eps, own.clip_grad) == ((0.9, 0.98), 1e-6, 3.0)
    assert math.isclose(own.rate(10**6), own.min_lr)
