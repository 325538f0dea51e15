"""The codebook: the nearest code, averages that follow, codes that come back to life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import on_ranks
from torch import Tensor

from beit3_fast.errors import ShapeError
from beit3_fast.model.codebook import Codebook

CODES, DIM = 6, 4


def drawn(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


def begun(**options: Any) -> Codebook:
    own = Codebook(CODES, DIM, **options)
    own.embedding.weight.copy_(unit(drawn(CODES, 1)))
    own.embedding.initted.fill_(1.0)
    own.cluster_size.fill_(2.0)
    return own.train()


def state(own: Codebook) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in own.state_dict().items()}


def assert_same(own: Codebook, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


def test_averages_follow_the_rows_that_chose_a_code() -> None:
    own, rows = begun(decay=0.9, revive_below=0.0), drawn(50)
    before = state(own)
    codes = own(rows).codes
    for code in range(CODES):
        mine = unit(rows)[codes == code]
        expected = before["embedding.weight"][code]
        if len(mine):
            mean = mine.mean(0) / mine.mean(0).norm()
            expected = 0.9 * expected + 0.1 * mean
        torch.testing.assert_close(own.embedding.weight[code], expected / expected.norm())
        torch.testing.assert_close(own.cluster_size[code], torch.tensor(1.8 + 0.1 * len(mine)))


def test_the_gradient_passes_straight_through() -> None:
    own, rows = begun().eval(), drawn(7).requires_grad_()
    made = own(rows)
    assert torch.allclose(made.rows, own.embedding.weight[made.codes], atol=1e-6)
    weight = drawn(7, 5)
    (made.rows * weight).sum().backward()
    grad = rows.grad
    rows.grad = None
    (unit(rows) * weight).sum().backward()
    torch.testing.assert_close(grad, rows.grad)


def test_only_training_teaches() -> None:
    own = begun()
    before = state(own)
    own.nearest(drawn(9))
    assert_same(own, before)
    own.eval()(drawn(9))
    assert_same(own, before)
    own.train()(drawn(9))
    assert not torch.equal(own.embedding.weight, before["embedding.weight"])


def test_autocast_changes_no_code() -> None:
    own, rows = Codebook(500, DIM).eval(), drawn(300)
    own.embedding.weight.copy_(unit(drawn(500, 1)))
    codes = own.nearest(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own.nearest(rows), codes)
        assert torch.equal(own(rows).codes, codes)
    assert own(rows.bfloat16()).rows.dtype == torch.float32


def test_the_first_rows_place_the_codes() -> None:
    centres = unit(drawn(CODES, 3))
    rows = (centres[:, None] + 0.01 * drawn(CODES * 30, 4).view(CODES, 30, DIM)).flatten(0, 1)
    torch.manual_seed(2)
    own = Codebook(CODES, DIM).train()
    own(rows)
    assert bool(own.embedding.initted)
    assert torch.equal(own.embedding.cluster_size.sum(), torch.tensor(float(len(rows))))
    found = own.embedding.weight @ centres.T
    assert len(set(found.argmax(1).tolist())) >= CODES - 1
    assert own.nearest(rows).unique().numel() >= CODES - 1


def test_the_first_codes_are_the_means_of_their_rows() -> None:
    """K-means to its end: 6 iterations of the 10, after one the codes are off by 0.27."""
    centres = unit(drawn(CODES, 3))
    rows = (centres[:, None] + 0.3 * drawn(CODES * 30, 4).view(CODES, 30, DIM)).flatten(0, 1)
    torch.manual_seed(0)
    own = Codebook(CODES, DIM, revive_below=0.0).train()
    codes = own(rows).codes
    means = torch.stack([unit(rows)[codes == code].mean(0) for code in range(CODES)])
    torch.testing.assert_close(own.embedding.weight, unit(means))
    assert float((own.embedding.weight @ centres.T).amax(0).min()) > 0.97
    counts = codes.bincount(minlength=CODES).float()
    torch.testing.assert_close(own.embedding.cluster_size, counts)
    torch.testing.assert_close(own.cluster_size, counts)


@pytest.mark.parametrize(
    ("rows", "came"),
    [
        (torch.zeros(0, DIM), r"\[0, 4\]"),
        (torch.zeros(3, DIM + 1), r"\[3, 5\]"),
        (torch.zeros(2, 3, DIM), r"\[2, 3, 4\]"),
    ],
)
def test_rows_that_do_not_fit(rows: Tensor, came: str) -> None:
    for own in (Codebook(CODES, DIM).train(), begun(), begun().eval()):
        with pytest.raises(ShapeError, match=rf"rows must be \[R, 4\] with R of at .*got {came}"):
            own(rows)
    if rows.numel():
        with pytest.raises(ShapeError, match=rf"rows must be \[R, 4\] with R of at .*got {came}"):
            begun().nearest(rows)
    assert begun().nearest(drawn(0)).shape == (0,)


def test_a_dead_code_begins_again_at_a_row() -> None:
    own, rows = begun(revive_below=0.5), drawn(40)
    alive = int(own.nearest(rows)[0])
    own.cluster_size.fill_(30.0)
    own.cluster_size[alive] = 30.0
    dead = next(code for code in range(CODES) if code != alive)
    own.cluster_size[dead] = 0.0
    own.embedding.weight[dead] = -own.embedding.weight[alive]
    own(rows)
    revived = own.embedding.weight[dead]
    assert bool((unit(rows) == revived).all(1).any())
    assert own.cluster_size[dead] == pytest.approx(float(own.cluster_size.mean()), rel=0.3)
    others = [code for code in range(CODES) if code != dead]
    assert not any(bool((unit(rows) == own.embedding.weight[code]).all(1).any()) for code in others)


def test_rows_that_are_not_finite_teach_nothing() -> None:
    one, other, rows = begun(revive_below=0.5), begun(revive_below=0.5), drawn(30)
    spoiled = torch.cat([rows, torch.full((3, DIM), float("nan"))])
    one(rows)
    other(spoiled)
    assert all(bool(tensor.isfinite().all()) for tensor in other.state_dict().values())
    torch.testing.assert_close(one.embedding.weight, other.embedding.weight)
    fresh = Codebook(CODES, DIM).train()
    fresh(torch.full((3, DIM), float("nan")))
    assert not bool(fresh.embedding.initted)


def test_a_dead_code_does_not_begin_at_a_row_that_is_not_finite() -> None:
    own = begun(revive_below=0.5)
    own.cluster_size[:3] = 0.0
    before = own.embedding.weight.clone()
    own(torch.full((9, DIM), float("nan")))
    assert torch.equal(own.embedding.weight, before)


def test_fewer_rows_than_codes() -> None:
    own = Codebook(CODES, DIM, revive_below=0.0).train()
    own(drawn(2).repeat(10, 1))
    torch.testing.assert_close(own.embedding.weight.norm(dim=1), torch.ones(CODES))


def test_two_processes_keep_one_codebook(tmp_path: Path) -> None:
    rows = drawn(80)

    def follow(rank: int) -> list[dict[str, Tensor]]:
        own = begun(revive_below=0.0)
        own(rows[rank::2])
        torch.manual_seed(rank)
        fresh = Codebook(CODES, DIM).train()
        fresh(rows[: 30 + rank])
        revived = begun(revive_below=0.5)
        revived.cluster_size[:3] = 0.0
        revived(rows[rank::2])
        return [own.state_dict(), fresh.state_dict(), revived.state_dict()]

    first, second = on_ranks(2, tmp_path, follow)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert float(first[1]["embedding.cluster_size"].sum()) == 61
    alone = begun(revive_below=0.0)
    alone(rows)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first[0][name], tensor, msg=name)
