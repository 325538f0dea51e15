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
from beit3_fast.parity import assert_parity, model_parity


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


def test_autocast_as_near_to_the_truth_as_composite() -> None:
    """fp16 on a CPU, where the interpreter multiplies bf16 wrongly; gradients come in the dtype of the weights."""
    torch.manual_seed(0)
    pictures, words = torch.randn(2, 3, 32, 32), torch.randint(4, 60, (2, 5))
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    given = [t.to(DEVICE) for t in (pictures, words, padding)]
    found: dict[str, dict[str, Tensor]] = {}
    for name, impl, on in (
        ("triton", "triton", True),
        ("composite", "composite", True),
        ("truth", "reference", False),
    ):
        torch.manual_seed(0)
        model: Any = create_model("beit3_tiny_patch16_32_vqav2", impl=impl).to(DEVICE).eval()
        with torch.autocast(DEVICE, torch.float16, enabled=on):
            logits = model(*given)
        weights = dict(model.named_parameters())
        chosen = [n for n in weights if "layers.1" in n and n.endswith("B.weight")][:2]
        chosen += ["beit3.encoder.layers.0.ffn.A.fc1.weight"]
        gradients = torch.autograd.grad(
            logits.float().square().sum(), [weights[n] for n in chosen], allow_unused=True
        )
        found[name] = {"logits": logits.detach()}
        found[name] |= {n: g for n, g in zip(chosen, gradients, strict=True) if g is not None}
    assert found["triton"]["logits"].dtype == torch.float16
    assert len(found["triton"]) > 1
    for name, ours in found["triton"].items():
        truth, plain = found["truth"][name], found["composite"][name]
        if name != "logits":
            assert ours.dtype == torch.float32
            ours, plain = ours.half(), plain.half()
        assert_parity(model_parity(ours, truth, plain, gradient=name != "logits"), name)
