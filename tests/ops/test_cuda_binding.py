"""The CUDA kernels behind impl="cuda", and what is done around them; without a GPU the binding in front of plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import (
    LAYOUTS,
    MASKS,
    SELECTIONS,
    AttentionCase,
    attention_operands,
    plain_attention,
    run_attention,
)
from cuda_cases import DEVICE, on_device  # noqa: F401
from linear_cases import SHAPES, LinearCase, linear_cases, linear_operands, plain_linear, run_linear
from op_cases import DTYPES, assert_near
from torch import Tensor

from beit3_fast.errors import KernelUnavailable
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import (
    Measured,
    Norm,
    cuda_kernels,
    expert_linear,
    kernel_cases,
    measured_expert_linear,
    measured_shared_attention,
    shared_attention,
)
from beit3_fast.parity import op_parity, worst_of

pytestmark = pytest.mark.usefixtures("on_device")
TARGETS = (("cuda", "bf16"), ("cuda", "fp16"))
FITTING = {name for name, (_, inner, out) in SHAPES.items() if inner % 8 == 0 and out % 8 == 0}
# The plain loops are slow.
SMALL = {"no rows", "first expert empty", "middle expert empty", "three experts"}
LINEAR = [
    case
    for case in linear_cases(2 if DEVICE == "cpu" else 6, TARGETS)
    if case.shape in (FITTING & SMALL if DEVICE == "cpu" else FITTING)
]
HEADS = ((1, 64), (2, 88))
QUICK = ("one of each", "no samples", "an empty sample", "pairs", "mixed", "texts")
TOKENS = QUICK if DEVICE == "cpu" else tuple(LAYOUTS)
ATTENTION = [
    AttentionCase(*TARGETS[i % 2], tokens, HEADS[i // 2 % 2], MASKS[i % 3], chosen, *rest, False)
    for i, (tokens, chosen, rest) in enumerate(
        (tokens, SELECTIONS[(i + j) % 6], (("normal", "fused"), ("saturated", "transposed"))[j])
        for i, tokens in enumerate(TOKENS)
        for j in range(2)
    )
]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
@torch.no_grad()
def test_expert_linear(case: LinearCase) -> None:
    operands = linear_operands(case)
    truth = run_linear(operands.map(Tensor.double), case, "reference")
    plain = plain_linear(operands, case.gelu)
    ours = run_linear(operands.on(DEVICE), case, "cuda")
    assert_near(op_parity(ours.cpu(), plain, truth), case)


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
@torch.no_grad()
def test_shared_attention(case: AttentionCase) -> None:
    assert case.tokens in LAYOUTS
    operands = attention_operands(case)
    q, k, v = (t.double() for t in operands[:3])
    truth = run_attention(operands._replace(q=q, k=k, v=v), case, "reference")
    plain = plain_attention(operands, case.heads[0], truth)
    ours = run_attention(operands.on(DEVICE), case, "cuda")
    assert_near(op_parity(ours.cpu(), plain, truth), case)


@pytest.mark.parametrize("kernel", ["cuda_expert_linear", "cuda_shared_attention"])
@pytest.mark.full
def test_the_checks_on_a_users_machine_pass(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(cuda_kernels, "attention_rounds", lambda device: False)
    parity = worst_of(kernel_cases.CUDA_CASES[kernel](torch.bfloat16, DEVICE))
    assert parity.passed, parity.reason


def draw(*shape: int, dtype: str = "bf16") -> Tensor:
    return torch.randn(*shape).to(DTYPES[dtype]).to(DEVICE)


def test_more_experts_than_one_launch_takes() -> None:
    bounds = (0, 3, 3, 8, 9, 20)
    norm = Norm([draw(24) for _ in range(5)], [draw(24) for _ in range(5)])
    x, weights = draw(20, 24), [draw(40, 24) / 5 for _ in range(5)]
    biases = [draw(40) for _ in range(5)]
    arguments: dict[str, Any] = {"bounds": bounds, "norm": norm}
    y = expert_linear(x, weights, biases, impl="cuda", **arguments)
    expected = expert_linear(x, weights, biases, impl="reference", **arguments)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_groups_of_experts_leave_none_out() -> None:
    groups = cuda_kernels.expert_groups((0, 3, 3, 8, 8, 8, 8, 20))
    assert list(groups) == [(0, [0, 3, 3, 8]), (6, [8, 20])]


def test_the_statistics_that_an_op_leaves_are_those_of_its_rows() -> None:
    """In front of a LayerNorm they are read instead of the rows."""
    x, first, second = draw(9, 64), [draw(136, 64) / 8], [draw(24, 136) / 12]
    layout = TokenLayout.from_lengths((5, 2), (0, 2), DEVICE)
    h = measured_expert_linear(x, first, bounds=(0, 9), impl="cuda")
    q, k, v = (draw(9, 128) for _ in range(3))
    o = measured_shared_attention(q, k, v, layout, num_heads=2, impl="cuda")
    for own in (h, o):
        assert own.parts is not None
        expected = kernel_cases.moments(own.rows, own.width)
        torch.testing.assert_close(own.parts, expected, rtol=1e-4, atol=1e-4)
    norm = Norm([draw(136)], [draw(136)])
    read = expert_linear(h, second, bounds=(0, 9), norm=norm, impl="cuda")
    bare = expert_linear(h.rows, second, bounds=(0, 9), norm=norm, impl="cuda")
    torch.testing.assert_close(read, bare, rtol=2e-2, atol=2e-2)
    assert h.parts is not None
    other = Measured(h.rows, h.parts * 2, h.width)
    spoiled = expert_linear(other, second, bounds=(0, 9), norm=norm, impl="cuda")
    assert (spoiled - bare).abs().max() > 0.1


def test_rows_that_are_not_named_are_zero() -> None:
    x, weight, residual = draw(6, 8), draw(16, 8), draw(6, 16)
    rows = torch.tensor([4, 1], device=DEVICE)
    y = expert_linear(x, [weight], bounds=(0, 2), residual=residual, rows=rows, impl="cuda")
    assert y[[0, 2, 3, 5]].abs().max() == 0
    torch.testing.assert_close(y[rows], x[rows] @ weight.T + residual[rows], rtol=2e-2, atol=2e-2)


def test_a_changed_weight_is_folded_again() -> None:
    x, weight, norm = draw(6, 8), draw(16, 8), Norm([draw(8)], [draw(8)])
    for _ in range(2):
        y = expert_linear(x, [weight], bounds=(0, 6), norm=norm, impl="cuda")
        expected = expert_linear(x, [weight], bounds=(0, 6), norm=norm, impl="reference")
        torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
        norm.weights[0].mul_(2)


@pytest.mark.parametrize(
    ("place", "is_copy"),
    [
        ((slice(None), slice(0, 64)), False),
        ((slice(None), slice(8, 72)), False),
        ((slice(None), slice(1, 65)), True),
    ],
    ids=["aligned", "a column block", "shifted"],
)
def test_only_rows_that_are_not_aligned_are_copied(place: Any, is_copy: bool) -> None:
    whole = draw(5, 80)
    own = cuda_kernels.aligned(whole[place])
    assert torch.equal(own, whole[place])
    assert (own.data_ptr() != whole[place].data_ptr()) is is_copy
    odd = draw(5, 68)[:, :64]
    assert cuda_kernels.aligned(odd).stride(0) % 8 == 0
    assert torch.equal(cuda_kernels.aligned(odd), odd)


def test_one_graph_and_the_same_numbers_under_torch_compile() -> None:
    layout = TokenLayout.from_lengths((5, 3), (2, 4), DEVICE)
    bounds = layout.expert_bounds("AB")
    weights = [draw(384, 16) / 4 for _ in range(2)]
    norm = Norm([draw(16) for _ in range(2)], [draw(16) for _ in range(2)])

    def block(x: Tensor) -> Tensor:
        qkv = expert_linear(x, weights, bounds=bounds, norm=norm, impl="cuda")
        q, k, v = qkv.chunk(3, dim=1)
        return shared_attention(q, k, v, layout, num_heads=2, mask="seq2seq", impl="cuda")

    x = draw(layout.num_rows, 16)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)


def moved(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes on the device of what they change."""
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changes.items()}


def product(**changes: Any) -> dict[str, Any]:
    """Arguments of launch_expert_linear that fit together."""
    arguments: dict[str, Any] = {
        "x": draw(4, 16),
        "weights": draw(2, 8, 16),
        "sums": torch.zeros(2, 8, device=DEVICE),
        "biases": torch.zeros(2, 8, device=DEVICE),
        "parts": torch.ones(4, 1, 2, device=DEVICE),
        "part_width": 16,
        "eps": 1e-5,
        "residual": draw(4, 8),
        "rows": torch.arange(4, device=DEVICE),
        "bounds": [0, 2, 4],
        "gelu": True,
        "y": draw(4, 8),
        "y_parts": None,
        "stream": 0,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.ones(4, 16)}, "bfloat16 or float16"),
        ({"most_blocks": 3}, "most_blocks must be 1, 2 or 4, got 3"),
        ({"x": draw(4, 32)[:, ::2]}, "stride 1"),
        ({"y": draw(4, 8, dtype="fp16")}, "y must have the dtype"),
        ({"y": draw(3, 8)}, "the 4 rows of x"),
        ({"weights": draw(2, 8, 24)}, r"weights must be contiguous \[2, 8, 16\]"),
        ({"weights": draw(2, 8, 16).mT.contiguous().mT}, "weights must be contiguous"),
        ({"sums": None}, "come together"),
        ({"sums": torch.zeros(2, 7)}, "sums must be contiguous, of 16"),
        ({"biases": torch.zeros(2, 8, dtype=torch.float64)}, "biases"),
        ({"parts": torch.ones(4, 2, 2)}, "parts must be contiguous, of 8"),
        ({"part_width": 0}, "part_width"),
        ({"residual": draw(4, 16)}, "residual must have the shape of y"),
        ({"rows": torch.arange(4, dtype=torch.int32)}, "rows"),
        ({"rows": torch.arange(3)}, "behind the last of rows"),
        ({"bounds": [0, 2, 5], "rows": None}, "x has 4 rows"),
        ({"bounds": [0, 3, 2]}, "ascending"),
        ({"bounds": [0, 1, 2, 3, 4], "weights": draw(4, 8, 16)}, "1 to 3 experts, got 4"),
        ({"y_parts": torch.ones(4, 2, 2)}, "y_parts"),
        ({"x": draw(4, 12), "weights": draw(2, 8, 12), "part_width": 12}, "multiples of 8"),
    ],
)
def test_the_binding_refuses(changes: dict[str, Any], words: str, on_device: Any) -> None:  # noqa: F811
    on_device.launch_expert_linear(**product())
    with pytest.raises(RuntimeError, match=words):
        on_device.launch_expert_linear(**product(**moved(changes)))


def attention(**changes: Any) -> dict[str, Any]:
    """Arguments of launch_shared_attention that fit together."""
    offsets = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    arguments: dict[str, Any] = {
        **{name: draw(6, 128) for name in "qkv"},
        "cu_vision": offsets,
        "cu_text": offsets,
        **dict.fromkeys(("cu_vision_q", "cu_text_q", "positions_q")),
        "longest": 6,
        "longest_q": 6,
        "num_heads": 2,
        "scale": 0.1,
        "mask": "causal",
        "o": draw(6, 128),
        "lse": None,
        "parts": None,
        **dict.fromkeys(("v_scales", "rounded", "rounded_scales")),
        "stream": 0,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": draw(5, 128)}, "the same rows"),
        ({"v": draw(6, 64)}, "width of q"),
        ({"o": draw(6, 64)}, "o must have the shape of q"),
        ({"num_heads": 3}, "3 heads do not divide"),
        ({"mask": "diagonal"}, "mask must be .*'diagonal'"),
        ({"scale": float("nan")}, "finite"),
        ({"cu_text": torch.tensor([0, 3])}, "cu_text"),
        ({"cu_text": torch.tensor([0, 1, 3], dtype=torch.int32)}, "cu_text must be .* of 2"),
        ({"positions_q": torch.arange(6, dtype=torch.int32)}, "come together"),
        ({"lse": torch.ones(6, 3)}, "lse"),
        ({"parts": torch.ones(6, 2)}, "parts"),
        ({"v_scales": torch.ones(6, 2)}, r"v_scales must have shape \[6, 1\], got \[6, 2\]"),
        ({"v_scales": torch.ones(6, 1).double()}, "v_scales must be float32"),
        ({"v_scales": torch.ones(6)}, "v_scales must have 2 dimensions"),
        ({"rounded": torch.zeros(5, 128).to(torch.float8_e4m3fn)}, "rounded must be .*of 768"),
        ({"rounded_scales": torch.ones(6, 2)}, "rounded_scales must be .*of 6"),
        pytest.param(
            *({"longest": 5}, "planted: longest"),
            marks=pytest.mark.skipif(DEVICE == "cuda", reason="the plain loops' own error"),
        ),
    ],
)
def test_the_binding_of_attention_refuses(
    changes: dict[str, Any],
    words: str,
    on_device: Any,  # noqa: F811
) -> None:
    on_device.launch_shared_attention(**attention())
    with pytest.raises(RuntimeError, match=words):
        on_device.launch_shared_attention(**attention(**moved(changes)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: expert_linear(draw(2, 12), [draw(8, 12)], bounds=(0, 2), impl="cuda"), "12 in"),
        (lambda: expert_linear(draw(2, 8), [draw(9, 8)], bounds=(0, 2), impl="cuda"), "9 out"),
        (
            lambda: shared_attention(
                *(draw(3, 96) for _ in range(3)),
                TokenLayout.from_lengths((3,), (0,), DEVICE),
                num_heads=3,
                impl="cuda",
            ),
            "width 64 or 88, got 32",
        ),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_said(call: Any, words: str) -> None:
    with pytest.raises(KernelUnavailable, match=words):
        call()
