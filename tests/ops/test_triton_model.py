"""A whole model on the Triton kernels: the numbers and the gradients of the composite implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE

from beit3_fast.model import create_model


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


@pytest.mark.parametrize("mask", ["seq2seq", pytest.param("bidirectional", marks=pytest.mark.full)])
def test_a_model_gives_the_numbers_of_composite(mask: str) -> None:
    ours, expected = run("triton", mask), run("composite", mask)
    for name, theirs in expected.items():
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=2e-5 * largest, msg=name)
