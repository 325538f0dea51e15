"""torch.autocast around ops and models: products in the lower precision, LayerNorm and the sum of all layers in fp32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import backbone, images, need, padding, task_model, texts
from torch import Tensor

from beit3_fast.errors import ShapeError
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import (
    Norm,
    dispatch,
    expert_linear,
    head_top_k,
    library,
    masked_linear_cross_entropy,
    patch_embedding,
    shared_attention,
)
from beit3_fast.parity import assert_parity, model_parity

BF16 = torch.bfloat16
IMPLS = ("cpu", "composite", "auto")
BOUNDS = (0, 5, 5, 12)


def lowered() -> Any:
    return torch.autocast("cpu", BF16)


def plain(x: Tensor, call: dict[str, Any]) -> Tensor:
    """The same of torch.nn.functional calls, whose autocast is PyTorch's."""
    parts = []
    for e, (start, stop) in enumerate(pairwise(BOUNDS)):
        part = F.layer_norm(
            x[start:stop], x.shape[1:], call["norm"].weights[e], call["norm"].biases[e]
        )
        parts.append(F.gelu(F.linear(part, call["weights"][e], call["biases"][e])))
    y = torch.cat(parts)
    return y if call["residual"] is None else call["residual"] + y


def operands(residual: bool) -> tuple[Tensor, dict[str, Any]]:
    return torch.randn(12, 64), {
        "weights": [torch.randn(64, 64) * 0.2 for _ in range(3)],
        "biases": [torch.randn(64) for _ in range(3)],
        "norm": Norm(
            [1 + 0.2 * torch.randn(64) for _ in range(3)], [torch.randn(64) for _ in range(3)]
        ),
        "residual": torch.randn(12, 64) * 30 if residual else None,
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@torch.no_grad()
def test_products(impl: str, residual: bool, rows: bool) -> None:
    need(impl)
    x, call = operands(residual)
    expected = plain(x, call)
    with lowered():
        baseline = plain(x, call)
        if rows:
            order = torch.randperm(12)
            scattered = dict(call)
            scattered["residual"] = call["residual"]
            if residual:
                scattered["residual"] = torch.empty_like(x).index_copy(0, order, call["residual"])
            given = torch.empty_like(x).index_copy(0, order, x)
            y = expert_linear(
                given, **scattered, bounds=BOUNDS, activation="gelu", rows=order, impl=impl
            )[order]
        else:
            y = expert_linear(x, **call, bounds=BOUNDS, activation="gelu", impl=impl)
    assert y.dtype == baseline.dtype == (torch.float32 if residual else BF16)
    # The residual is large: were it rounded, the product's own error would vanish under it.
    base = call["residual"] if residual else 0.0
    assert_parity(
        model_parity((y - base).to(BF16), expected - base, (baseline - base).to(BF16)), impl
    )
    assert not torch.equal(y.float(), expected)


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_attention(impl: str) -> None:
    need(impl)
    layout = TokenLayout.from_lengths([7, 7], [3, 2])
    q, k, v = (torch.randn(layout.num_rows, 32) for _ in range(3))
    with lowered():
        o = shared_attention(q, k, v, layout, num_heads=2, impl=impl)
    low = [t.to(BF16) for t in (q, k, v)]
    assert o.dtype == BF16
    assert torch.equal(o, shared_attention(*low, layout, num_heads=2, impl=impl))
    with lowered(), torch.autocast("cpu", enabled=False):
        assert shared_attention(q, k, v, layout, num_heads=2, impl=impl).dtype == torch.float32


@torch.no_grad()
def test_double_precision_is_left_alone() -> None:
    layout = TokenLayout.from_lengths([4], [0])
    q = torch.randn(4, 16, dtype=torch.float64)
    with lowered():
        assert shared_attention(q, q, q, layout, num_heads=2, impl="reference").dtype == q.dtype


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("impl", ["composite", "reference", "auto"])
@torch.no_grad()
def test_double_precision_beside_another_one_is_refused(
    dtypes: tuple[torch.dtype, torch.dtype], impl: str
) -> None:
    """Autocast does not lower it, so no product takes both."""
    x, weight = (torch.randn(4, 4, dtype=dtype) for dtype in dtypes)
    rows, tokens = torch.tensor([0, 2]), [torch.zeros(4, dtype=dtypes[1])] * 3
    pixels, filters = x.expand(1, 3, 4, 4), weight.expand(4, 3, 4, 4)
    calls: dict[str, Callable[[], Any]] = {
        "weights": lambda: expert_linear(x, [weight], bounds=(0, 4), impl=impl),
        "weight": lambda: masked_linear_cross_entropy(x, weight, None, rows, rows, impl=impl),
        "^weight": lambda: head_top_k(x, weight, None, 2, impl=impl),
        "images": lambda: patch_embedding(pixels, filters, *tokens, None, impl=impl),
    }
    for name, call in calls.items():
        with (
            lowered(),
            pytest.raises(ShapeError, match=f"{name}.* must have .*leaves float64 alone"),
        ):
            call()


@torch.no_grad()
def test_auto_keeps_no_second_copy_of_the_weights() -> None:
    x, call = operands(False)
    with lowered():
        at = dispatch.situation("expert_linear", [x, *call["weights"]])
    assert (at.autocast, at.dtype) == (True, BF16)
    assert "a second time" in dict(dispatch.choose(at).rejected)["cpu"] or not library.available()


def test_training_in_autocast_takes_the_compiled_products() -> None:
    """Their copies of the weights live as long as a step, as those of autocast itself do."""
    x, call = operands(True)
    with lowered():
        at = dispatch.situation("expert_linear", [x.requires_grad_(), *call["weights"]])
    assert (at.autocast, at.needs_grad, at.dtype) == (True, True, BF16)
    fast = library.available() and library.cpu_isa() != "portable"
    assert dispatch.choose(at).impl == ("cpu" if fast else "composite")


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_a_model_computes_in_the_lower_precision(impl: str) -> None:
    need(impl)
    model, picture, words = backbone(impl=impl), images(2), texts(2, 5)
    expected = model(words, picture)["encoder_out"]
    with lowered():
        out = model(words, picture)["encoder_out"]
    error = (out.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.02
    assert model(words, picture)["encoder_out"].dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_training_gives_fp32_gradients_as_plain_modules_do(impl: str) -> None:
    need(impl)
    model = task_model("vqav2", impl).train()
    call = (images(3), texts(3, 5), padding([5, 2, 3], 5))
    grads = []
    for on in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", BF16, enabled=on):
            logits = model(*call)
            loss = F.cross_entropy(logits, torch.arange(3))
        assert logits.dtype == (BF16 if on else torch.float32)
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        ours = grads[1][name]
        assert ours.dtype == torch.float32
        if not name.endswith("k_proj.bias"):
            assert (ours - expected).norm() < 0.1 * expected.norm() + 1e-6, name
