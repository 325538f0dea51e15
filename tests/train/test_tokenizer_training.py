"""A visual tokenizer learns from a teacher, the same again and after a kill."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_continuation import at_call, child
from tokenizer_runs import OPTIONS, ColoursAndEdges, images, teach, tokenizer
from torch import Tensor, nn

from beit3_fast.checkpoint import read_checkpoint
from beit3_fast.errors import ConfigError, InputError, ShapeError
from beit3_fast.model.visual_tokenizer import create_visual_tokenizer
from beit3_fast.train import read_log
from beit3_fast.train.distillation import VisualTokenizerDistillation
from beit3_fast.train.optimizer import Optimizer
from beit3_fast.train.tokenizer_score import score_tokenizer

CURVE = ("step", "loss", "reconstruction", "commitment", "used_codes", "grad_norm")


def curve(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in CURVE) for line in read_log(folder)]


def assert_same(folder: Path, whole: Path) -> None:
    assert curve(folder) == curve(whole)
    for name in ("model", "average"):
        own, expected = (
            read_checkpoint(run / f"{name}.safetensors").state for run in (folder, whole)
        )
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in expected), name


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert teach(world, folder).complete
    return folder


def test_it_learns_what_the_teacher_sees(world: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=48, lr=3e-3, warmup_steps=5, ema_decay=None, accumulation=1)
    own = tokenizer(revive_below=0.2, decay=0.9)
    teach(world, tmp_path, options, own, data=images(world, 10))
    lines = read_log(tmp_path)
    assert lines[0]["loss"] == pytest.approx(lines[0]["reconstruction"] + lines[0]["commitment"])
    first, last = (
        sum(line["reconstruction"] for line in part) / 5 for part in (lines[:5], lines[-5:])
    )
    assert last < 0.2 * first
    # K-means begins with all codes; many are deserted when the encoder starts to move, and come back.
    assert lines[-1]["used_codes"] > lines[6]["used_codes"] + 0.3
    teacher: Any = ColoursAndEdges()
    score = score_tokenizer(own, teacher, images(world, 5, seed=7), 2)
    fresh = score_tokenizer(tokenizer(), teacher, images(world, 5, seed=7), 2)
    assert score.cosine > score.mean_cosine > fresh.cosine
    assert score.used > 0.9
    with pytest.raises(ConfigError, match="batches must be an integer of at least 1, got 0"):
        score_tokenizer(own, teacher, images(world, 5, seed=7), 0)
    assert 1 <= fresh.perplexity < score.perplexity <= 24


def test_a_killed_run_ends_with_the_same_codebook(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def work() -> None:
            at_call(Optimizer, "step", 6, patch)
            teach(world, tmp_path)

        assert child(work) == signal.SIGKILL
    torch.manual_seed(99)
    assert teach(world, tmp_path, own=tokenizer(seed=99)).resumed == 3
    assert_same(tmp_path, whole)


def test_the_same_again(world: Path, whole: Path, tmp_path: Path) -> None:
    teach(world, tmp_path, replace(OPTIONS, workers=1))
    assert_same(tmp_path, whole)
    with pytest.raises(ConfigError, match="of another objective"):
        teach(world, tmp_path, objective=VisualTokenizerDistillation(ColoursAndEdges(), 0.5))
    with pytest.raises(ConfigError, match="of another data"):
        teach(world, tmp_path, data=images(world, 5))


def test_its_file_makes_codes(world: Path, whole: Path) -> None:
    read = create_visual_tokenizer(checkpoint=whole / "model.safetensors")
    assert read.config == tokenizer().config
    batch = images(world)[0].images
    codes = read.tokenize(batch)
    assert codes.shape == (4, 36)
    assert torch.equal(codes, read(batch).codes)


def test_micro_batches_add_up(world: Path) -> None:
    own, objective = tokenizer().eval(), VisualTokenizerDistillation(ColoursAndEdges(), 0.3)
    small, large = images(world, 2), images(world, 4)
    parts = [objective(own, small[number], {"images": 4}) for number in range(2)]
    whole, terms = objective(own, large[0], {"images": 4})
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    expected = terms["reconstruction"] + 0.3 * terms["commitment"]
    torch.testing.assert_close(whole.detach(), expected)
    assert not any(term.requires_grad for term in terms.values())


class Wide(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 36, 5)


def test_a_teacher_of_another_shape(world: Path) -> None:
    with pytest.raises(ShapeError, match=r"must give features \[4, 36, 12\].*got \[4, 36, 5\]"):
        VisualTokenizerDistillation(Wide())(tokenizer(), images(world)[0], {"images": 4})
    with pytest.raises(ConfigError, match="commitment must be a number"):
        VisualTokenizerDistillation(Wide(), -1.0)
    assert repr(VisualTokenizerDistillation(Wide())).startswith(
        "VisualTokenizerDistillation('Wide'"
    )


def test_images_come_once_an_epoch(world: Path) -> None:
    data = images(world, 5)
    first, second = (torch.cat([data[n].images, data[n + 1].images]) for n in (0, 2))
    assert len(data.paths) == 10

    def keys(rows: Tensor) -> list[float]:
        return [round(float(row.double().std()), 9) for row in rows]

    assert sorted(keys(first)) == sorted(keys(second))
    assert keys(first) != keys(second)
    with pytest.raises(ConfigError, match="batch_size must be a positive integer"):
        images(world, 0)
    with pytest.raises(InputError, match="at least one image"):
        type(data)([], 1, 48)
