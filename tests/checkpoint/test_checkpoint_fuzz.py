"""Random damage: every mutated file is refused, or gives back exactly what was in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_cases import Standin, same, snapshot
from malformed_files import SHAPES, good, good_bytes

from beit3_fast.checkpoint import LoadReport, load_checkpoint
from beit3_fast.errors import CheckpointError

FORMS = ("zip", "legacy", "safetensors")


def mutations(raw: bytes, generator: random.Random, count: int) -> Iterator[bytes]:
    """Flipped bits, changed bytes, cuts, insertions, moved and repeated pieces; half of them in the first 4 KiB."""
    for _ in range(count):
        data = bytearray(raw)
        limit = len(data) if generator.random() < 0.5 else min(len(data), 4096)
        place, other = generator.randrange(limit), generator.randrange(len(data))
        length = generator.randrange(1, 40)
        kind = generator.randrange(7)
        if kind <= 1:
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 2:
            data[place] = generator.randrange(256)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place : place + length]
        elif kind == 5:
            data[place:place] = generator.randbytes(length)
        else:
            data[place : place + length] = data[other : other + length]
        if bytes(data) != raw:
            yield bytes(data)


def attempt(model: Standin, path: Path) -> tuple[LoadReport | None, str]:
    try:
        return load_checkpoint(model, path), ""
    except CheckpointError as error:
        return None, str(error)


def run(form: str, count: int, seed: int, path: Path) -> tuple[int, int]:
    """(refused, unharmed); fails where a mutation does anything else."""
    original, model = good(), Standin(SHAPES)
    refused = unharmed = 0
    for number, data in enumerate(mutations(good_bytes(form), random.Random(seed), count)):
        path.write_bytes(data)
        before = snapshot(model)
        report, error = attempt(model, path)
        if report is None:
            refused += 1
            assert str(path) in error
            assert snapshot(model) == before, f"mutation {number} half-loaded"
            continue
        if form == "legacy":
            # no checksums in this form: the report has to say so
            assert any("unnoticed" in remark for remark in report.remarks)
        else:
            assert same(model.state_dict(), original), f"mutation {number} changed weights unseen"
        unharmed += 1
        model = Standin(SHAPES)
    return refused, unharmed


@pytest.mark.parametrize("form", FORMS)
def test_random_damage(form: str, tmp_path: Path) -> None:
    refused, unharmed = run(form, 200, 1, tmp_path / "x.pth")
    assert refused + unharmed > 190
    assert refused > {"zip": 100, "legacy": 60, "safetensors": 0}[form]
    if form == "safetensors":
        assert unharmed == 0


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", FORMS)
def test_ten_thousand_times_random_damage(form: str, tmp_path: Path) -> None:
    run(form, 10_000, 2, tmp_path / "x.pth")
