"""shared_attention: every implementation against the formula in fp64, by the one parity rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import (
    ATTENTION_FACTORS,
    LAYOUTS,
    MASKS,
    AttentionCase,
    AttentionOperands,
    attention_cases,
    attention_operands,
    plain_attention,
    rows_and_names,
    run_attention,
)
from op_cases import DTYPES, IMPLS, TARGETS, Results, assert_draws_near, assert_near, draws_of, need
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import shared_attention
from beit3_fast.parity import op_parity

GRADIENT_TARGETS = [target for target in TARGETS if target[0] != "reference"]
CASES = attention_cases(repeats=1)
# Elsewhere the gradients of q and k are differences of nearly equal numbers, in plain PyTorch too.
GRADIENT_CASES = attention_cases(1, GRADIENT_TARGETS, inputs=("normal", "peaked"))
HARD_GRADIENT_CASES = [
    case
    for case in attention_cases(1, GRADIENT_TARGETS, inputs=("saturated", "mean", "small"))
    if case.tokens in ("mixed", "primes", "one of each")
]
LONG_CASES = attention_cases(repeats=9)[len(CASES) :]
PLAIN = AttentionCase(
    "reference", "fp32", "mixed", (2, 13), "bidirectional", "all", "normal", "fused", False
)


def widened(operands: AttentionOperands) -> AttentionOperands:
    return operands._replace(q=operands.q.double(), k=operands.k.double(), v=operands.v.double())


def check_forward(case: AttentionCase) -> None:
    need(case.impl)
    operands = attention_operands(case)
    with torch.set_grad_enabled(case.grad_mode):
        ours = run_attention(operands, case, case.impl)
    truth = run_attention(widened(operands), case, "reference")
    plain = plain_attention(operands, case.heads[0], truth)
    assert_near(op_parity(ours, plain, truth), case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case: AttentionCase) -> None:
    check_forward(case)


@pytest.mark.full
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_forward_long(case: AttentionCase) -> None:
    check_forward(case)


def gradients(operands: AttentionOperands, dtype: str, call: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in operands[:3]]
    y = call(operands._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(DTYPES[dtype]).to(y.dtype))
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def gradient_results(operands: AttentionOperands, case: AttentionCase) -> dict[str, Results]:
    """The gradients of one draw of a case by name, but for those that are nothing but rounding."""
    ours = gradients(operands, case.dtype, lambda own: run_attention(own, case, case.impl))
    if operands.q.shape[0] == 0:
        assert not any(bool(t.any()) for t in ours)
        return {}
    plain = gradients(operands, case.dtype, lambda own: plain_attention(own, case.heads[0]))
    truth = gradients(
        widened(operands), case.dtype, lambda own: run_attention(own, case, "reference")
    )
    found = {}
    for name, mine, theirs, expected in zip("qkv", ours, plain, truth, strict=True):
        if bool(expected.any()):
            found[name] = Results(mine, theirs, expected)
        else:
            # One visible key each: q and k have no effect, and what is left is rounding.
            assert mine.abs().max() <= 100 * torch.finfo(mine.dtype).eps
    return found


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.name)
def test_gradients(case: AttentionCase) -> None:
    need(case.impl)
    numbers = attention_operands(case).q.numel()
    draws = [attention_operands(case, draw=draw) for draw in draws_of(numbers)]
    assert_draws_near([gradient_results(operands, case) for operands in draws], case.name)


@pytest.mark.parametrize("case", HARD_GRADIENT_CASES, ids=lambda case: case.name)
def test_gradients_of_hard_inputs_are_finite(case: AttentionCase) -> None:
    need(case.impl)
    operands = attention_operands(case)
    for gradient in gradients(
        operands, case.dtype, lambda own: run_attention(own, case, case.impl)
    ):
        assert bool(gradient.isfinite().all())


def test_every_factor_meets_every_implementation() -> None:
    for factor, values in ATTENTION_FACTORS.items():
        for value in values:
            for target in TARGETS:
                assert any(
                    (case.impl, case.dtype) == target and getattr(case, factor) == value
                    for case in CASES
                ), (factor, value, target)


def sees(
    mask: str | Tensor, sample: int, query: tuple[str, int], key: tuple[str, int], first_text: int
) -> bool:
    """Whether a query of a caller's sample may look at a key, each named (modality, place)."""
    if isinstance(mask, Tensor):
        own = mask if mask.dim() == 2 else mask[sample]
        row, column = (place + first_text * (kind == "text") for kind, place in (query, key))
        return bool(own[row, column])
    if mask == "bidirectional":
        return True
    if query[0] == "vision":
        return key[0] == "vision" and (mask == "seq2seq" or key[1] <= query[1])
    return key[0] == "vision" or key[1] <= query[1]


@pytest.mark.parametrize("mask", [*MASKS, "tensor [N, N]", "tensor [B, N, N]"])
@pytest.mark.parametrize("selection", ["all", "first first", "none some"])
def test_the_formula_itself(mask: str, selection: str) -> None:
    """The truth of all other tests against arithmetic without PyTorch."""
    case = PLAIN._replace(mask=mask, selection=selection, heads=(2, 3))
    q, k, v, layout, queries, given = attention_operands(case)
    y = run_attention(
        widened(AttentionOperands(q, k, v, layout, queries, given)), case, "reference"
    )
    own = queries or layout
    first_text = max(layout.vision_lengths)
    for sample in range(layout.batch_size):
        keys, key_names = rows_and_names(layout, sample)
        rows, names = rows_and_names(own, sample)
        for row, (kind, place) in zip(rows, names, strict=True):
            if own.positions is not None:
                place = int(own.positions[row])
            seen = [
                key
                for key, name in zip(keys, key_names, strict=True)
                if sees(given, layout.order[sample], (kind, place), name, first_text)
            ]
            for head in range(2):
                columns = range(3 * head, 3 * head + 3)
                scores = [
                    sum(float(q[row, c]) * float(k[key, c]) for c in columns) / math.sqrt(3)
                    for key in seen
                ]
                weights = [math.exp(score) for score in scores]
                for c in columns:
                    total = sum(w * float(v[key, c]) for w, key in zip(weights, seen, strict=True))
                    expected = total / sum(weights) if seen else 0.0
                    assert float(y[row, c]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("impl", ["reference", "composite"])
@pytest.mark.parametrize("mask", [*MASKS, "tensor [B, N, N]"])
@pytest.mark.parametrize("selection", ["all", "none some"])
def test_gradcheck(impl: str, mask: str, selection: str) -> None:
    case = PLAIN._replace(mask=mask, selection=selection, heads=(2, 2), tokens="an empty sample")
    operands = widened(attention_operands(case))
    leaves = [t.detach().requires_grad_() for t in operands[:3]]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run_attention(operands._replace(q=q, k=k, v=v), case, impl)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sample_that_is_not_finite_stays_alone(impl: str, dtype: str) -> None:
    need(impl)
    layout = TokenLayout.from_lengths((5, 9, 0, 5), (4, 3, 6, 0))
    q, k, v = (torch.randn(layout.num_rows, 32).to(DTYPES[dtype]) for _ in range(3))
    sample = 1
    own = [i for part in layout.segments(sample) for i in range(part.start, part.stop)]
    others = [i for i in range(layout.num_rows) if i not in own]
    for mask in MASKS:
        clean = shared_attention(q, k, v, layout, num_heads=2, mask=mask, impl=impl)
        for poison in (math.nan, math.inf):
            for place in range(3):
                operands = [q.clone(), k.clone(), v.clone()]
                operands[place][own[0]] = poison
                y = shared_attention(*operands, layout, num_heads=2, mask=mask, impl=impl)
                assert torch.equal(y[others], clean[others])
                # PyTorch's own attention gives zeros where all scores of a query are NaN.
                assert impl == "composite" or not bool(y[own].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "composite"])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(
    impl: str, dtype: torch.dtype
) -> None:
    layout = TokenLayout.from_lengths((3, 2), (2, 4))
    q, k, v = (torch.randn(layout.num_rows, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[1] = False  # second vision token
    mask[4] = False  # second text token
    y = shared_attention(q, k, v, layout, num_heads=2, mask=mask, impl=impl)
    blind = [1, 4, 6, 8]
    assert y[blind].abs().max() == 0
    assert bool((y.abs().amax(1) > 0)[[0, 2, 3, 5, 7]].all())
    y.sum().backward()
    for t in (q, k, v):
        assert t.grad is not None
        assert bool(t.grad.isfinite().all())
        assert bool((t.grad.abs().amax(1) > 0)[[0, 2, 3, 5, 7]].all())
    assert q.grad is not None
    assert q.grad[blind].abs().max() == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("selection", ["first none", "first first", "none all", "none some"])
@pytest.mark.parametrize("mask", MASKS)
def test_selected_queries_give_rows_of_the_whole(impl: str, selection: str, mask: str) -> None:
    need(impl)
    layout = TokenLayout.from_lengths(*LAYOUTS["mixed"])
    q, k, v = (torch.randn(layout.num_rows, 24) for _ in range(3))
    vision, text = selection.split()
    chosen: Any = torch.arange(layout.num_text_rows) % 3 == 1 if text == "some" else text
    rows, queries = layout.select(vision, chosen)  # type: ignore[arg-type]
    whole = shared_attention(q, k, v, layout, num_heads=3, mask=mask, impl=impl)
    part = shared_attention(
        q[rows], k, v, layout, num_heads=3, mask=mask, queries=queries, impl=impl
    )
    torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_scale(impl: str) -> None:
    need(impl)
    layout = TokenLayout.from_lengths((4,), (3,))
    q, k, v = (torch.randn(7, 8) for _ in range(3))
    usual = shared_attention(q, k, v, layout, num_heads=2, impl=impl)
    doubled = shared_attention(q, k, v, layout, num_heads=2, scale=2 * 4**-0.5, impl=impl)
    torch.testing.assert_close(
        doubled, shared_attention(2 * q, k, v, layout, num_heads=2, impl=impl)
    )
    assert (doubled - usual).abs().max() > 1e-3
    flat = shared_attention(q, k, v, layout, num_heads=2, scale=0.0, impl=impl)
    torch.testing.assert_close(flat, v.mean(0).expand(7, 8))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_operands_in_any_memory_order(impl: str, operand: str) -> None:
    need(impl)
    layout = TokenLayout.from_lengths((4, 5), (3, 0))
    rows = {name: torch.randn(12, 8) for name in "qkv"}
    expected = shared_attention(*rows.values(), layout, num_heads=2, impl=impl)
    rows[operand] = torch.stack([rows[operand]] * 2, dim=-1)[..., 0]
    ours = shared_attention(*rows.values(), layout, num_heads=2, impl=impl)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("impl", ["composite", "cpu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_uninitialised_memory_holds_changes_nothing(impl: str, dtype: str) -> None:
    need(impl)
    for mask in MASKS:
        case = PLAIN._replace(dtype=dtype, mask=mask, selection="first first")
        operands = attention_operands(case)
        poisoned = run_attention(operands, case, impl)
        assert bool(poisoned.isfinite().all())
        torch.utils.deterministic.fill_uninitialized_memory = False
        assert torch.equal(run_attention(operands, case, impl), poisoned)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_tensor_says_what_a_structure_says(impl: str) -> None:
    need(impl)
    layout = TokenLayout.from_lengths((2,), (2,))
    q, k, v = (torch.randn(4, 8) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    ours = shared_attention(q, k, v, layout, num_heads=2, mask=mask, impl=impl)
    expected = shared_attention(q, k, v, layout, num_heads=2, mask="causal", impl="reference")
    torch.testing.assert_close(ours, expected)
