"""Gradients of the compiled attention, at every instruction-set level of this machine."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from cpu_cases import DTYPES, OPS, cumulative
from fence import Fence
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import shared_attention
from beit3_fast.parity import op_parity

# Samples, and how their queries are chosen where they are not all.
LENGTHS = [
    ([5], [3]),
    ([1], [0]),
    ([0, 0], [1, 40]),
    ([67, 0, 30], [8, 9, 0]),
    ([50, 33, 32, 16], [33, 12, 0, 17]),
]
SIZES = [(3, 64), (2, 88), (1, 7), (8, 1), (1, 130)]
MASKS = ("bidirectional", "seq2seq", "causal")


def draw(layout: TokenLayout, width: int, dtype: torch.dtype, sharpness: float) -> list[Tensor]:
    """q, k, v and the gradient of the result, slices of one tensor."""
    g = torch.Generator().manual_seed(layout.num_rows)
    rows = torch.randn(layout.num_rows, 4 * width + 2, generator=g)[:, 1:-1]
    rows[:, :width] *= sharpness
    return list(rows.to(dtype).split(width, dim=1))


def gradients(
    operands: list[Tensor], layout: TokenLayout, impl: str, dtype: torch.dtype, **how: Any
) -> list[Tensor]:
    """Those of q, k and v."""
    chosen, queries = how.pop("chosen", (slice(None), None))
    *leaves, grad = (t.to(dtype) for t in operands)
    leaves = [t.detach().requires_grad_() for t in leaves]
    q, k, v = leaves
    o = shared_attention(q[chosen], k, v, layout, queries=queries, impl=impl, **how)
    o.backward(grad[chosen])
    return [t.grad for t in leaves if t.grad is not None]


def check(
    operands: list[Tensor], layout: TokenLayout, dtype: torch.dtype, **how: Any
) -> list[Tensor]:
    ours = gradients(operands, layout, "cpu", dtype, **how)
    plain = gradients(operands, layout, "composite", dtype, **how)
    truth = gradients(operands, layout, "reference", torch.float64, **how)
    for name, *own in zip("qkv", ours, plain, truth, strict=True):
        result = op_parity(*own, gradient=True)
        assert result.passed, f"{name}: {result.reason}"
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients(size: tuple[int, int], mask: str, dtype: str) -> None:
    heads, width = size
    for vision, text in LENGTHS:
        layout = TokenLayout.from_lengths(vision, text)
        for sharpness in (1.0, 3.0):
            operands = draw(layout, heads * width, DTYPES[dtype], sharpness)
            check(operands, layout, DTYPES[dtype], num_heads=heads, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", ["first none", "none first", "none all", "first some"])
def test_of_chosen_queries(selection: str, dtype: str) -> None:
    layout = TokenLayout.from_lengths([50, 33, 0, 16], [33, 12, 20, 17])
    vision, text = selection.split()
    some: Any = torch.arange(layout.num_text_rows) % 3 == 1 if text == "some" else text
    for mask in MASKS:
        operands = draw(layout, 128, DTYPES[dtype], 3.0)
        how: dict[str, Any] = {"num_heads": 2, "mask": mask, "chosen": layout.select(vision, some)}  # type: ignore[arg-type]
        check(operands, layout, DTYPES[dtype], **how)


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_a_mask_tensor(dtype: str) -> None:
    """Keys of both segments hidden one by one; some queries see none, and pass no gradient on."""
    layout = TokenLayout.from_lengths([9, 33, 0], [33, 12, 20])
    seen = torch.rand(3, 66, 66) > 0.3
    seen[:, 4] = False
    seen[:, :, 7] = False
    for own in (seen, seen[0]):
        operands = draw(layout, 128, DTYPES[dtype], 3.0)
        q, k, _ = check(operands, layout, DTYPES[dtype], num_heads=2, mask=own)
        for start in layout.vision_starts[:2]:
            assert q[start + 4].abs().max() == 0
            assert k[start + 7].abs().max() == 0


def test_of_a_sum_whose_gradient_is_one_number() -> None:
    """Expanded over all rows and columns: its strides are zeros."""
    layout = TokenLayout.from_lengths([9, 3], [3, 12])
    found = []
    for impl in ("cpu", "reference"):
        leaves = [t.clone().requires_grad_() for t in draw(layout, 64, torch.float32, 1.0)[:3]]
        shared_attention(*leaves, layout, num_heads=2, impl=impl).sum().backward()
        found.append([t.grad for t in leaves])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_of_a_scale_of_zero(mask: str) -> None:
    """Weights of what is hidden stay zero where all that is seen counts alike."""
    layout = TokenLayout.from_lengths([5, 20], [3, 17])
    operands = draw(layout, 24, torch.float32, 1.0)
    how: dict[str, Any] = {"num_heads": 3, "scale": 0.0, "mask": mask}
    ours = gradients(operands, layout, "cpu", torch.float32, **how)
    truth = gradients(operands, layout, "reference", torch.float64, **how)
    for own, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-4, atol=1e-5)


def test_of_no_queries_and_no_samples() -> None:
    q, k = torch.zeros(0, 8), torch.randn(3, 8)
    offsets = (cumulative([3]), cumulative([0]), cumulative([0]), cumulative([0]))
    how = (2, 1.0, "bidirectional")
    dq, dk, dv = OPS.shared_attention_gradients(q, q, k, k, *offsets, None, *how)
    assert dq.shape == (0, 8)
    assert dk.abs().max() == dv.abs().max() == 0
    none = (cumulative([]), cumulative([]))
    for own in OPS.shared_attention_gradients(q, q, q, q, *none, None, None, None, *how):
        assert own.shape == (0, 8)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    layout = TokenLayout.from_lengths([100, 3], [20, 45])
    operands = draw(layout, 128, torch.bfloat16, 1.0)

    def run() -> list[Tensor]:
        return gradients(operands, layout, "cpu", torch.bfloat16, num_heads=2, mask="causal")

    whole = run()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, run(), whole))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages without access")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_outside_its_tensor(dtype: str, at_end: bool) -> None:
    fence, offsets = Fence(at_end), (cumulative([5, 33]), cumulative([3, 0]))
    for width in (7, 64, 88):
        rows = [torch.randn(41, width).to(DTYPES[dtype]) for _ in range(4)]
        how = (*offsets, None, None, None, 1, 0.1, "causal")
        wanted = OPS.shared_attention_gradients(*rows, *how)
        found = OPS.shared_attention_gradients(*map(fence, rows), *how)
        assert all(map(torch.equal, found, wanted))
    fence.open()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", range(4))
def test_poison_stays_in_its_sample(place: int, poison: float) -> None:
    layout = TokenLayout.from_lengths([9, 33], [33, 12])
    operands = draw(layout, 128, torch.bfloat16, 1.0)
    how: dict[str, Any] = {"num_heads": 2, "mask": "seq2seq"}
    clean = gradients(operands, layout, "cpu", torch.bfloat16, **how)
    own = [i for part in layout.segments(0) for i in range(part.start, part.stop)]
    others = [i for i in range(layout.num_rows) if i not in own]
    operands[place] = operands[place].clone()
    operands[place][own[3]] = poison
    spoiled = gradients(operands, layout, "cpu", torch.bfloat16, **how)
    for found, expected in zip(spoiled, clean, strict=True):
        assert torch.equal(found[others], expected[others])
    assert not bool(spoiled[1][own].isfinite().all())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grad": torch.randn(3, 8).bfloat16()}, "grad must be a CPU tensor of the same dtype"),
        ({"grad": torch.randn(2, 8)}, "grad must have the shape of q"),
        ({"grad": torch.randn(3, 16)[:, ::2]}, "grad"),
        ({"num_heads": 3}, "3 heads do not divide"),
        ({"mask": "diagonal"}, "mask must be"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], words: str) -> None:
    rows = torch.randn(3, 8)
    arguments: dict[str, Any] = dict.fromkeys(("grad", "q", "k", "v"), rows)
    arguments |= {"cu_vision": cumulative([3]), "cu_text": cumulative([0])}
    arguments |= dict.fromkeys(("cu_vision_q", "cu_text_q", "positions_q"))
    arguments |= {"num_heads": 2, "scale": 1.0, "mask": "causal"}
    OPS.shared_attention_gradients(**arguments)
    with pytest.raises(RuntimeError, match=words):
        OPS.shared_attention_gradients(**(arguments | changes))
