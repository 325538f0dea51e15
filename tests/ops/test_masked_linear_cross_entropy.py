"""masked_linear_cross_entropy: every implementation against the formula in fp64, and what it must not hold or touch."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, Rotation, assert_near, lay, values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_fast.composite import masked_linear_cross_entropy as composite
from beit3_fast.errors import Beit3FastError, KernelUnavailable, ShapeError
from beit3_fast.ops import masked_linear_cross_entropy
from beit3_fast.parity import op_parity

# Rows of x, named rows, features, classes.
SHAPES = {
    "no rows": (5, 0, 8, 11),
    "one row": (1, 1, 16, 40),
    "one class": (6, 4, 8, 1),
    "one feature": (49, 40, 1, 3),
    "primes": (61, 29, 53, 101),
    "all rows": (17, 17, 24, 64),
    "few of many": (300, 13, 32, 517),
    "deep": (12, 7, 770, 33),
}
IMPLS = ("reference", "composite")
FACTORS: dict[str, tuple[Any, ...]] = {
    "inputs": ("normal", "large", "mean", "outliers", "small"),
    "layout": ("contiguous", "sliced", "every second row", "transposed"),
    "bias": (True, False),
    "smoothing": (0.0, 0.1, 1.0),
    "slices": (1 << 24, 37, 256),
}


class Case(NamedTuple):
    """One call: ``slices`` bounds the logits that exist at a time."""

    impl: str
    dtype: str
    shape: str
    inputs: str
    layout: str
    bias: bool
    smoothing: float
    slices: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


ROTATION = Rotation()
CASES = [
    Case(impl, dtype, shape, **ROTATION.next((impl, dtype), FACTORS))
    for shape, impl, dtype in product(SHAPES, IMPLS, DTYPES)
    if impl == "composite" or dtype == "bf16"
]


class Operands(NamedTuple):
    """Tensors of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    targets: Tensor

    def leaves(self, change: Callable[[Tensor], Tensor] = lambda t: t) -> Operands:
        """The same call on changed floating-point tensors that ask for gradients."""
        x, weight, bias = (
            None if t is None else change(t).detach().requires_grad_() for t in self[:3]
        )
        return Operands(x, weight, bias, *self[3:])  # type: ignore[arg-type]


def draw(
    shape: str,
    dtype: torch.dtype = torch.float32,
    inputs: str = "normal",
    layout: str = "contiguous",
    bias: bool = True,
) -> Operands:
    total, count, inner, vocabulary = SHAPES[shape]
    generator = torch.Generator().manual_seed(sum(map(ord, shape + inputs)))
    x = lay(values(inputs, total, inner, generator).to(dtype), layout)
    weight = torch.randn(vocabulary, inner, generator=generator) * inner**-0.5
    offsets = torch.randn(vocabulary, generator=generator).to(dtype)
    rows = torch.randperm(total, generator=generator)[:count]
    targets = torch.randint(vocabulary, (count,), generator=generator)
    return Operands(x, lay(weight.to(dtype), layout), offsets if bias else None, rows, targets)


def operands_of(case: Case) -> Operands:
    return draw(case.shape, DTYPES[case.dtype], case.inputs, case.layout, case.bias)


def plain(own: Operands, smoothing: float) -> Tensor:
    """The losses as PyTorch's own calls make them from all logits."""
    logits = F.linear(own.x[own.rows], own.weight, own.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, own.targets, label_smoothing=smoothing, reduction="none")


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def bound(logits: int) -> None:
        monkeypatch.setattr(composite, "_LOGITS", logits)
        monkeypatch.setattr(composite, "_THINNEST", 8)

    return bound


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradients(case: Case, slices: Callable[[int], None]) -> None:
    slices(case.slices)
    given = operands_of(case)
    seed = torch.randn(len(given.rows))

    def run(own: Operands, losses: Tensor) -> dict[str, Tensor]:
        named = {name: t for name, t in own._asdict().items() if t is not None and t.requires_grad}
        gradients = torch.autograd.grad(losses, [*named.values()], seed.to(losses.dtype))
        return {"losses": losses.detach(), **dict(zip(named, gradients, strict=True))}

    options: dict[str, Any] = {"label_smoothing": case.smoothing, "reduction": "none"}
    here, there, exact = given.leaves(), given.leaves(), given.leaves(Tensor.double)
    ours = run(here, masked_linear_cross_entropy(*here, **options, impl=case.impl))
    theirs = run(there, plain(there, case.smoothing))
    truth = run(exact, masked_linear_cross_entropy(*exact, **options, impl="reference"))
    for name, expected in truth.items():
        parity = op_parity(ours[name], theirs[name], expected, gradient=name != "losses")
        assert_near(parity, f"{name} of {case.name}")
    others = torch.ones(len(given.x), dtype=torch.bool).index_fill(0, given.rows, False)
    assert not ours["x"][others].any()


def by_hand(x: list[float], weight: list[list[float]], target: int, smoothing: float) -> float:
    logits = [sum(a * b for a, b in zip(x, w, strict=True)) for w in weight]
    log_total = math.log(sum(map(math.exp, logits)))
    surprise = [log_total - z for z in logits]
    return (1 - smoothing) * surprise[target] + smoothing * sum(surprise) / len(surprise)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_formula_itself(smoothing: float) -> None:
    """The truth of the other tests against arithmetic without PyTorch."""
    x, weight, _, rows, targets = draw("primes", torch.float64, bias=False)
    expected = [
        by_hand(x[row].tolist(), weight.tolist(), target, smoothing)
        for row, target in zip(rows.tolist(), targets.tolist(), strict=True)
    ]
    options: dict[str, Any] = {"label_smoothing": smoothing, "impl": "reference"}
    call = (x, weight, None, rows, targets)
    losses = masked_linear_cross_entropy(*call, reduction="none", **options)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    total = masked_linear_cross_entropy(*call, reduction="sum", **options)
    assert total.item() == pytest.approx(sum(expected), rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(impl: str, bias: bool, reduction: str, slices: Callable[[int], None]) -> None:
    slices(9)
    torch.manual_seed(1)
    x, weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    own = [x, weight, torch.randn(11, dtype=torch.float64)][: 2 + bias]
    rows, targets = torch.tensor([4, 0, 4]), torch.tensor([10, 0, 3])

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"label_smoothing": 0.2, "reduction": reduction, "impl": impl}
        return masked_linear_cross_entropy(x, weight, bias, rows, targets, **options)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in own])


@pytest.mark.parametrize("impl", IMPLS)
def test_without_rows_loss_and_gradients_are_zero(impl: str) -> None:
    own = draw("no rows").leaves()
    loss = masked_linear_cross_entropy(*own, impl=impl)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, own[:3]):
        assert gradient.abs().sum().item() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_not_named_are_not_read(impl: str) -> None:
    own = draw("few of many").leaves()
    clean = masked_linear_cross_entropy(*own, impl=impl)
    dx, dweight = torch.autograd.grad(clean, own[:2])
    spoiled = torch.full_like(own.x, math.nan).index_copy(0, own.rows, own.x[own.rows]).detach()
    own = own._replace(x=spoiled.requires_grad_())
    loss = masked_linear_cross_entropy(*own, impl=impl)
    assert torch.equal(loss, clean)
    again, dweight_again = torch.autograd.grad(loss, own[:2])
    assert torch.equal(again, dx)
    assert torch.equal(dweight_again, dweight)


@pytest.mark.parametrize("impl", IMPLS)
def test_classes_that_are_ruled_out_by_the_bias(impl: str, slices: Callable[[int], None]) -> None:
    """A bias of minus infinity, also for all classes of a slice."""
    slices(8)
    own = draw("primes")
    assert own.bias is not None
    bias = own.bias.index_fill(0, torch.arange(40), -math.inf)
    own = own._replace(bias=bias, targets=40 + own.targets % 61).leaves()
    losses = masked_linear_cross_entropy(*own, reduction="none", impl=impl)
    expected = plain(own, 0.0)
    torch.testing.assert_close(losses, expected)
    pair = [torch.autograd.grad(own_losses.sum(), own[:3]) for own_losses in (losses, expected)]
    for ours, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, theirs)


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor made within it has, weights and their gradients aside."""

    # The op itself is opaque to a mode: what it is made of is called here.

    def __init__(self, apart: tuple[int, ...]) -> None:
        super().__init__()
        self.apart, self.elements = apart, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and {*tensor.shape} != {*self.apart}:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_logits_are_never_whole(dtype: str, slices: Callable[[int], None]) -> None:
    count, inner, vocabulary, bound = 96, 4, 2000, 4096
    torch.manual_seed(0)
    x, weight = torch.randn(count, inner), torch.randn(vocabulary, inner)
    own = [t.to(DTYPES[dtype]) for t in (x, weight)]
    rows, targets = torch.arange(count), torch.randint(vocabulary, (count,))
    slices(bound)
    grad, call = torch.randn(count), (*own, None, rows, targets)
    with Largest((vocabulary, inner)) as seen:
        _, peaks = composite.masked_linear_cross_entropy(*call, 0.1)
        composite.masked_linear_cross_entropy_backward(grad, *call, peaks, 0.1)
    assert bound / 2 < seen.elements <= bound < count * vocabulary


def test_under_autocast_it_computes_in_its_dtype() -> None:
    own = draw("primes").leaves()
    low = draw("primes").leaves(lambda t: t.bfloat16())
    expected = masked_linear_cross_entropy(*low)
    with torch.autocast("cpu", torch.bfloat16):
        # As a trained model calls it: its rows are in the lower precision already.
        loss = masked_linear_cross_entropy(own.x.bfloat16(), *own[1:])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, own[:3])
    for gradient, other in zip(gradients, torch.autograd.grad(expected, low[:3]), strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, other.float())


def test_one_compiled_graph_serves_any_number_of_rows() -> None:
    def loss_of(x: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        return masked_linear_cross_entropy(x * 2, weight, None, rows, targets)

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 9, 17):
            x, weight = torch.randn(2 * count, 8), torch.randn(13, 8)
            rows, targets = torch.randperm(2 * count)[:count], torch.randint(13, (count,))
            own = [x.requires_grad_(), weight.requires_grad_()]
            ours, expected = compiled(*own, rows, targets), loss_of(*own, rows, targets)
            assert torch.equal(ours, expected)
            for pair in zip(*(torch.autograd.grad(y, own) for y in (ours, expected)), strict=True):
                assert torch.equal(*pair)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": None}, "x must be a tensor, got NoneType"),
    ({"x": torch.zeros(3)}, r"x must be .*\[R, D\]"),
    ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "floating-point"),
    ({"weight": torch.zeros(4, 7)}, "D = 8"),
    ({"weight": torch.zeros(0, 8)}, "at least one class"),
    ({"weight": torch.zeros(4, 8).double()}, "x's dtype torch.float32, got torch.float64"),
    ({"bias": torch.zeros(5)}, r"bias must have shape \[V\] = \[4\]"),
    ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows must be int64"),
    ({"rows": torch.tensor([0, 3])}, "rows must name rows of x, 0 to 2, got 0 to 3"),
    ({"rows": torch.tensor([-1, 0])}, "got -1 to 0"),
    ({"targets": torch.tensor([0, 4])}, "targets must name classes, 0 to 3, got 0 to 4"),
    ({"targets": torch.tensor([-100, 0])}, "got -100 to 0"),
    ({"targets": torch.tensor([0])}, "one class for each of the 2 rows, got 1"),
    ({"targets": torch.zeros(2)}, "targets must be int64"),
    ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "on x's device cpu, got meta"),
    ({"label_smoothing": 1.5}, "from 0 to 1, got 1.5"),
    ({"label_smoothing": None}, "from 0 to 1, got None"),
    ({"reduction": "average"}, "reduction must be one of"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_said(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "x": torch.zeros(3, 8),
        "weight": torch.zeros(4, 8),
        "bias": torch.zeros(4),
        "rows": torch.tensor([2, 0]),
        "targets": torch.tensor([1, 3]),
    }
    with pytest.raises(ShapeError, match=message):
        masked_linear_cross_entropy(**(call | changes))


def test_implementations_without_this_op_say_so() -> None:
    own = draw("primes")
    with pytest.raises(KernelUnavailable, match="no kernel for this op"):
        masked_linear_cross_entropy(*own, impl="cpu")
    with pytest.raises(Beit3FastError, match="impl must be"):
        masked_linear_cross_entropy(*own, impl="fast")
