"""A whole model on the Triton kernels: the numbers and the gradients of the composite implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE

from beit3_fast.kernels import _row_statistics as kernels
from beit3_fast.kernels import expert_linear as linear
from beit3_fast.layout import TokenLayout
from beit3_fast.model import create_model
from beit3_fast.model.drop_path import Kept
from beit3_fast.model.encoder import encoder_layer
from beit3_fast.ops import Measured


def run(impl: str, mask: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model: Any = create_model("beit3_tiny_patch16_32", impl=impl).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape).to(DEVICE))
    images = [torch.randn(3, 32, 32, device=DEVICE), None]
    text = [torch.arange(5, device=DEVICE) + 7, torch.arange(3, device=DEVICE) + 2]
    encoded = model.forward_packed(images, text, mask=mask)
    y: Tensor = encoded.rows
    weight = model.encoder.layers[0].self_attn.q_proj.A.weight
    norm = model.encoder.layers[1].ffn.A.ffn_layernorm.weight
    gradients = torch.autograd.grad(y.square().sum(), [weight, norm])
    return {"rows": y, "q": gradients[0], "norm": gradients[1]}


def test_statistics_go_from_op_to_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read for a LayerNorm only where no op wrote them: in front of the first layer."""
    measured: list[tuple[int, int]] = []

    def seen(x: Tensor, *rest: Any) -> Any:
        measured.append((x.shape[0], x.shape[1]))
        return kernels.row_statistics(x, *rest)

    monkeypatch.setattr(linear, "row_statistics", seen)
    images, results = torch.randn(2, 3, 32, 32), {}
    for impl in ("triton", "composite"):
        torch.manual_seed(0)
        model: Any = create_model("beit3_tiny_patch16_32_retrieval", impl=impl).to(DEVICE).eval()
        with torch.inference_mode():
            results[impl] = model.encode_image(images.to(DEVICE))
    assert measured == [(2 * 5, 64)]
    torch.testing.assert_close(results["triton"], results["composite"], rtol=1e-5, atol=1e-5)


def test_drop_path_changes_the_rows_and_drops_their_statistics() -> None:
    """Behind a drop that keeps every sample, rows are scaled, added and measured anew."""
    torch.manual_seed(0)
    model: Any = create_model("beit3_tiny_patch16_32").to(DEVICE)
    layout = TokenLayout.from_lengths((5, 2), (3, 4), DEVICE)
    kept = Kept(torch.full((2,), 2.0, device=DEVICE), (True, True), 2.0)
    x, results = torch.randn(layout.num_rows, 64).to(DEVICE), []
    for impl in ("triton", "composite"):
        state = Measured(x)
        for layer in model.encoder.layers:
            state = encoder_layer(layer, state, layout, kept=(None, kept), impl=impl)
        results.append(state.rows)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mask", ["seq2seq", pytest.param("bidirectional", marks=pytest.mark.full)])
def test_a_model_gives_the_numbers_of_composite(mask: str) -> None:
    ours, expected = run("triton", mask), run("composite", mask)
    for name, theirs in expected.items():
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=2e-5 * largest, msg=name)
