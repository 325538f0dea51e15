"""expert_linear's CUDA kernels, their instructions emulated: against the formula in fp64, in every order of events."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from beit3_fast.kernels._folded_weights import fold
from emulated_linear import ORDERS, PART_WIDTH, Plan, Result, expert_linear, plan
from torch import Tensor

from beit3_fast.parity import op_parity
from beit3_fast.reference.expert_linear import expert_linear as formula

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """One call: rows of the experts, features in and out, and what is asked for."""

    bounds: tuple[int, ...]
    inner: int
    out: int
    norm: bool = False
    bias: bool = True
    gelu: bool = False
    residual: bool = False
    gathered: bool = False


CASES = {
    "one row": Case((0, 1), 8, 8, norm=True),
    "7 rows": Case((0, 7), 72, 136, gelu=True, residual=True),
    "129 rows": Case((0, 129), 200, 264, norm=True, gelu=True),
    "two experts": Case((0, 130, 200), 200, 264, norm=True, gelu=True, residual=True),
    "three experts": Case((0, 3, 140, 200), 72, 40, bias=False, residual=True),
    "middle expert empty": Case((0, 129, 129, 200), 136, 136, norm=True),
    "first expert empty": Case((0, 0, 7), 64, 128, gelu=True),
    "rows before the first": Case((5, 12, 140), 88, 72, norm=True, residual=True),
    "deep": Case((0, 40, 70), 1032, 24, norm=True, gelu=True, residual=True),
    "gathered": Case((0, 130, 200), 200, 264, norm=True, residual=True, gathered=True),
    "gathered, deep": Case((0, 7, 7, 135), 840, 136, gelu=True, gathered=True),
    "gathered, one step": Case((0, 1, 130), 8, 8, bias=False, gathered=True),
}


class Operands(NamedTuple):
    """Tensors of one call."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    residual: Tensor | None
    rows: Tensor | None

    def doubles(self) -> Operands:
        groups = ([t.double() for t in group] for group in self[1:5])
        residual = None if self.residual is None else self.residual.double()
        return Operands(self.x.double(), *groups, residual, self.rows)


def draw(case: Case, dtype: str, shift: float = 0.0) -> Operands:
    generator = torch.Generator().manual_seed(sum(case.bounds) + case.inner)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DTYPES[dtype])

    experts, count = range(len(case.bounds) - 1), case.bounds[-1] + 3
    rows = torch.randperm(count, generator=generator)[: case.bounds[-1]] if case.gathered else None
    return Operands(
        normal(count, case.inner) + shift,
        [normal(case.out, case.inner, scale=case.inner**-0.5) for _ in experts],
        [normal(case.out) for _ in experts] if case.bias else [],
        [1 + normal(case.inner, scale=0.1) for _ in experts] if case.norm else [],
        [normal(case.inner, scale=0.1) for _ in experts] if case.norm else [],
        normal(count, case.out) if case.residual else None,
        rows,
    )


def moments(x: Tensor, width: int) -> Tensor:
    """fp64 [M, T, 2]: mean and sum of squared deviations of the parts of every row."""
    parts = [part.double() for part in x.split(width, dim=1)]
    means = [part.mean(1) for part in parts]
    squares = [(part - m[:, None]).square().sum(1) for part, m in zip(parts, means, strict=True)]
    return torch.stack([torch.stack(means, 1), torch.stack(squares, 1)], dim=2)


def launch(
    case: Case, operands: Operands, order: str = "eager", width: int = PART_WIDTH, **options: Any
) -> Result:
    statistics = (moments(operands.x, width).float(), width) if case.norm else None
    return expert_linear(
        operands.x,
        fold(operands.weights, operands.biases, operands.gammas, operands.betas),
        operands.residual,
        operands.rows,
        case.bounds,
        1e-5,
        "gelu" if case.gelu else "none",
        statistics=statistics,
        order=order,
        **options,
    )


def named(case: Case, operands: Operands) -> Tensor:
    """The rows that the call is about."""
    places = torch.arange(case.bounds[0], case.bounds[-1])
    return places if operands.rows is None else operands.rows[places]


def by_formula(case: Case, operands: Operands, activation: str, residual: bool) -> Tensor:
    """The formula, whose experts begin at row 0, in the dtype of the operands."""
    begin, end = case.bounds[0], case.bounds[-1]
    own = named(case, operands)
    return formula(
        operands.x[own],
        *operands[1:5],
        operands.residual[own] if residual and operands.residual is not None else None,
        None,
        [bound - begin for bound in case.bounds],
        1e-5,
        activation,
    )[: end - begin]


def plain(case: Case, operands: Operands, activation: str, residual: bool) -> Tensor:
    """What plain PyTorch makes of it, every step in the dtype."""
    own = named(case, operands)
    results = []
    for e, weight in enumerate(operands.weights):
        first = case.bounds[0]
        own_rows = own[case.bounds[e] - first : case.bounds[e + 1] - first]
        part = operands.x[own_rows]
        if case.norm:
            norm = (operands.gammas[e], operands.betas[e], 1e-5)
            part = torch.nn.functional.layer_norm(part, (case.inner,), *norm)
        bias = operands.biases[e] if case.bias else None
        part = torch.nn.functional.linear(part, weight, bias)
        results.append(torch.nn.functional.gelu(part) if activation == "gelu" else part)
    y = torch.cat(results)
    return y + operands.residual[own] if residual and operands.residual is not None else y


def check(case: Case, operands: Operands, result: Result) -> None:
    own = named(case, operands)
    activation = "gelu" if case.gelu else "none"
    for ours, arguments in ((result.y, (activation, True)), (result.z, ("none", False))):
        truth = by_formula(case, operands.doubles(), *arguments)
        parity = op_parity(ours[own], plain(case, operands, *arguments), truth)
        assert parity.passed, parity.reason
    expected = moments(result.y[own], PART_WIDTH)
    torch.testing.assert_close(result.parts[own].double(), expected, rtol=1e-5, atol=1e-5)
    others = torch.ones(len(operands.x), dtype=torch.bool)
    others[own] = False
    assert result.y[others].isnan().all()
    assert result.z[others].isnan().all()
    assert result.parts[others].isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    turn = list(CASES).index(name)
    case, dtype = CASES[name], ("bf16", "fp16")[turn % 2]
    operands = draw(case, dtype)
    result = launch(case, operands, ORDERS[turn % 3])
    check(case, operands, result)


@pytest.mark.parametrize("name", ["7 rows", "two experts", "three experts", "gathered, deep"])
def test_low_tiles(name: str) -> None:
    case, turn = CASES[name], list(CASES).index(name)
    operands = draw(case, ("fp16", "bf16")[turn % 2])
    check(case, operands, launch(case, operands, ORDERS[turn % 3], plan=Plan(1)))


@pytest.mark.parametrize("name", ["7 rows", "two experts", "three experts", "gathered, deep"])
def test_portable(name: str) -> None:
    case, turn = CASES[name], list(CASES).index(name)
    operands = draw(case, ("bf16", "fp16")[turn % 2])
    check(case, operands, launch(case, operands, ("late", "random")[turn % 2], plan=Plan(0)))


@pytest.mark.parametrize("name", CASES)
def test_clusters(name: str) -> None:
    """Experts of one, two and three row tiles: in every odd number the last one's neighbour has no real rows."""
    turn = list(CASES).index(name)
    operands = draw(CASES[name], ("fp16", "bf16")[turn % 2])
    result = launch(CASES[name], operands, ORDERS[(turn + 1) % 3], plan=Plan(high=2))
    check(CASES[name], operands, result)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.gathered])
def test_square_clusters(name: str) -> None:
    """One to three columns of tiles: in every odd number the last one's neighbours have no real columns."""
    turn = list(CASES).index(name)
    operands = draw(CASES[name], ("bf16", "fp16")[turn % 2])
    result = launch(CASES[name], operands, ORDERS[(turn + 2) % 3], plan=Plan(high=2, wide=2))
    check(CASES[name], operands, result)


@pytest.mark.parametrize("wide", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_clusters_that_have_more_than_one_tile(order: str, wide: int) -> None:
    """Through every slot of the ring more than once, the last tile with rows of one block alone."""
    case = Case((0, 300, 420), 456, 136, norm=True, gelu=True, residual=True)
    operands = draw(case, "bf16")
    check(case, operands, launch(case, operands, order, plan=Plan(2, 2, wide), clusters=1))


def test_clusters_give_the_same_bits() -> None:
    case = CASES["two experts"]
    operands = draw(case, "bf16")
    alone = launch(case, operands)
    for wide in (1, 2):
        together = launch(case, operands, plan=Plan(2, 2, wide))
        for ours, own in zip(together, alone, strict=True):
            assert torch.equal(ours.nan_to_num(), own.nan_to_num())


def test_clusters_are_taken_where_they_cost_no_round() -> None:
    many = 128 * 22
    assert plan((0, many), 768, 768, most_blocks=2) == Plan(2, 2)
    assert plan((0, many), 768, 768, 1) == Plan(2)  # no processor for a second block
    assert plan((0, many - 256), 768, 768).bands == 1
    assert plan((0, many, many + 128), 768, 1536) == Plan(2)  # an expert of one row tile
    assert plan((0, many, many), 768, 1536, most_blocks=2) == Plan(2, 2)  # an empty one
    assert plan((0, 128 * 33), 768, 512) == Plan(2)  # without a cluster one round, with it two
    assert plan((0, 128 * 35), 768, 512, most_blocks=2) == Plan(2, 2)
    assert plan((0, 128 * 35), 768, 512, most_blocks=1) == Plan(2)


def test_square_clusters_are_taken_where_they_cost_few_rounds() -> None:
    rows = 256 * 197
    for inner, out in ((768, 768), (768, 2304), (768, 3072), (3072, 768), (1024, 4096)):
        assert plan((0, rows), inner, out) == Plan(2, 2, 2)
    assert plan((0, rows), 768, 768, gathered=True) == Plan(2, 2)
    assert plan((0, rows), 768, 768, 14) == Plan(2, 2)  # no room for four blocks
    assert plan((0, 256 * 66), 768, 128) == Plan(2, 2)  # half of the blocks without columns
    assert plan((0, 256 * 33), 768, 256) == Plan(2, 2)  # two rounds instead of one


@pytest.mark.parametrize("shares", [2, 4])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.inner > 3 * 64])
def test_split_k(name: str, shares: int) -> None:
    """From one step along K a block to more than the ring has slots; columns for all blocks and for the first alone."""
    turn = list(CASES).index(name) + shares // 2
    operands = draw(CASES[name], ("bf16", "fp16")[turn % 2])
    check(
        CASES[name],
        operands,
        launch(CASES[name], operands, ORDERS[turn % 3], plan=Plan(1, shares=shares)),
    )


@pytest.mark.parametrize("shares", [2, 4])
def test_split_k_gives_the_same_bits_in_every_order(shares: int) -> None:
    """The shares are added up in the order of K, whichever comes first."""
    case = CASES["deep"]
    operands = draw(case, "bf16")
    expected = launch(case, operands, "eager", plan=Plan(1, shares=shares))
    for order, seed in (("late", 0), ("random", 1), ("random", 2)):
        result = launch(case, operands, order, plan=Plan(1, shares=shares), seed=seed)
        for ours, own in zip(result, expected, strict=True):
            assert torch.equal(ours.nan_to_num(), own.nan_to_num())


def test_k_is_split_where_processors_would_be_idle() -> None:
    assert plan((0, 197), 3072, 768) == Plan(1, shares=4)  # 24 tiles
    assert plan((0, 197), 3072, 1024) == Plan(1, shares=4)  # 32: no room for more clusters of four
    assert plan((0, 64 * 11), 3072, 384) == Plan(1, shares=2)  # 33
    assert plan((0, 197), 768, 2112) == Plan(1)  # 68
    assert plan((0, 197), 448, 768) == Plan(1, shares=2)  # seven steps
    assert plan((0, 197), 192, 768) == Plan(1)
    assert plan((0, 3, 6), 768, 768, gathered=True) == Plan(1, shares=4)
    assert plan((0, 197), 3072, 768, most_blocks=2) == Plan(1, shares=2)
    assert plan((0, 197), 3072, 768, most_blocks=1) == Plan(1)
    assert plan((0, 197), 3072, 768, 12) == Plan(2, 2)


def test_tiles_are_low_where_high_ones_leave_processors_idle() -> None:
    assert plan((0, 197), 768, 3072).bands == 1
    assert plan((0, 128 * 11), 768, 1536).bands == 2
    assert plan((0, 128 * 11 - 128), 768, 1536).bands == 1


@pytest.mark.full
@pytest.mark.parametrize("shares", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["two experts", "deep", "gathered", "gathered, deep"])
def test_split_k_long(name: str, order: str, shares: int) -> None:
    for dtype in DTYPES:
        operands = draw(CASES[name], dtype)
        check(
            CASES[name],
            operands,
            launch(CASES[name], operands, order, plan=Plan(1, shares=shares), seed=3),
        )


@pytest.mark.full
@pytest.mark.parametrize("own", [Plan(0), Plan(1), Plan(2), Plan(2, 2), Plan(2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_forward_long(name: str, order: str, dtype: str, own: Plan) -> None:
    if CASES[name].gathered:
        own = own._replace(wide=1)
    operands = draw(CASES[name], dtype)
    result = launch(CASES[name], operands, order, clusters=3, plan=own)
    check(CASES[name], operands, result)


@pytest.mark.parametrize("name", ["two experts", "gathered"])
def test_every_order_gives_the_same_bits(name: str) -> None:
    operands = draw(CASES[name], "bf16")
    expected = launch(CASES[name], operands, "eager", clusters=1)
    for order, seed in (("late", 0), ("random", 1), ("random", 2)):
        result = launch(CASES[name], operands, order, clusters=1, seed=seed)
        for ours, own in zip(result, expected, strict=True):
            assert torch.equal(ours.nan_to_num(), own.nan_to_num())


def test_gelu_of_any_number() -> None:
    """Within the rounding of fp16, in the tails, too; infinities and NaN as in PyTorch."""
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 6e4, -6e4, 1e-7])
    z = torch.cat([special, torch.linspace(-8.0, 8.0, 504)])
    folded = fold([torch.zeros(len(z), 8, dtype=torch.float16)], [z], (), ())
    y = expert_linear(
        torch.zeros(1, 8, dtype=torch.float16),
        folded,
        None,
        None,
        (0, 1),
        0.0,
        "gelu",
        plan=Plan(1),
    ).y[0]
    truth = torch.nn.functional.gelu(z.double())
    rounding, smallest = 2.0**-11, 2.0**-24
    torch.testing.assert_close(
        y.double(), truth, rtol=1.02 * rounding, atol=0.51 * smallest, equal_nan=True
    )


@pytest.mark.parametrize("width", [8, 40, 136])
def test_statistics_in_any_parts(width: int) -> None:
    """With a mean 50 deviations away, too."""
    case = Case((0, 19), 136, 24, norm=True)
    operands = draw(case, "fp16", shift=50.0)
    check(case, operands, launch(case, operands, width=width))


@pytest.mark.parametrize("name", ["three experts", "gathered"])
def test_poison_stays_in_its_row(name: str) -> None:
    case = CASES[name]
    operands = draw(case, "bf16")
    own = named(case, operands)
    clean = launch(case, operands)
    row = own[case.bounds[1]]
    operands.x[row, 3] = float("nan")
    spoiled = launch(case, operands)
    assert spoiled.y[row].isnan().all()
    others = own[own != row]
    assert torch.equal(spoiled.y[others], clean.y[others])


@pytest.mark.parametrize(
    ("inner", "out", "words"),
    [(12, 16, "features that are multiples of 8"), (16, 12, "features that are multiples of 8")],
)
def test_sizes_that_are_refused(inner: int, out: int, words: str) -> None:
    case = Case((0, 3), inner, out)
    with pytest.raises(RuntimeError, match=words):
        launch(case, draw(case, "bf16"))


def test_rows_at_odd_addresses_are_refused() -> None:
    case = Case((0, 3), 16, 16)
    operands = draw(case, "bf16")
    wide = torch.zeros(17, 16, dtype=torch.bfloat16).view(-1)
    operands.weights[0] = wide[1:257].view(16, 16)
    folded = fold(operands.weights, operands.biases, (), ())
    odd = torch.zeros(257, dtype=torch.bfloat16)[1:].view(1, 16, 16)
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        expert_linear(
            operands.x, folded._replace(weights=odd), None, None, case.bounds, 1e-5, "none"
        )
