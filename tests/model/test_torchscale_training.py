"""Gradients, autocast and drop path against torchscale itself, same weights and inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from _compat import (
    SHAPES,
    impls,
    need_torchscale,
    slim_of,
    torchscale_beit3,
)
from torch import Tensor
from torchscale_cases import GRADIENT_CASES, Case, compare, inputs

from beit3_fast.integrations.torchscale import accelerate, accelerated_status, restore
from beit3_fast.parity import assert_parity, model_parity

need_torchscale()


def gradients(
    model: Any, call: dict[str, Any], seed: int, autocast: bool = False
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """encoder_out with zeros at padding, and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**call)
    real = (~out["encoder_padding_mask"]).unsqueeze(-1)
    rows = out["encoder_out"].float() * real
    weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (rows * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return rows.detach(), {n: None if g is None else g.clone() for n, g in grads.items()}


def compare_gradients(
    name: str, ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]
) -> None:
    assert list(ours) == list(theirs)
    for parameter, grad in theirs.items():
        mine = ours[parameter]
        assert (mine is None) == (grad is None), f"{name}: {parameter}"
        if grad is None or mine is None:
            continue
        sibling = theirs[parameter.replace("k_proj", "q_proj")]
        assert sibling is not None
        scale = float(sibling.abs().max())
        if "k_proj" in parameter and parameter.endswith("bias") and grad.abs().max() < 1e-4 * scale:
            # A bias of all keys shifts every score of a query alike: the true gradient is zero.
            assert float(mine.abs().max()) < 1e-4 * scale, f"{name}: {parameter}"
            continue
        assert_parity(model_parity(mine, grad, gradient=True), f"{name}: gradient of {parameter}")


@cache
def training(shape: str, rate: float) -> tuple[Any, Any]:
    """torchscale's model and the slim one in train mode."""
    config = SHAPES[shape].replace(drop_path_rate=rate)
    theirs = torchscale_beit3(config).train()
    return theirs, slim_of(theirs, config)


@cache
def expected_training(case: Case, shape: str, rate: float, autocast: bool) -> Any:
    return gradients(training(shape, rate)[0], inputs(case, shape), seed=5, autocast=autocast)


def both_training(shape: str, rate: float, impl: str) -> Iterator[tuple[str, Any]]:
    theirs, model = training(shape, rate)
    model.impl = impl
    yield "slim", model
    try:
        yield "accelerated", accelerate(theirs, impl)
        assert not accelerated_status(theirs)[0].fallback_reasons
    finally:
        restore(theirs)


@pytest.mark.parametrize("rate", [0.0, 0.4], ids=["", "drop_path"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32"))
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_training(case: Case, impl: str, dtype: str, shape: str, rate: float) -> None:
    call = inputs(case, shape)
    truth, grads = expected_training(case, shape, rate, False)
    for name, model in both_training(shape, rate, impl):
        rows, mine = gradients(model, call, seed=5)
        assert_parity(model_parity(rows, truth), name)
        compare_gradients(name, mine, grads)


@pytest.mark.parametrize("rate", [0.0, 0.4], ids=["", "drop_path"])
@pytest.mark.parametrize("shape", ["base", "d88"])
@pytest.mark.parametrize("impl", ["reference", "composite", "auto"])
@pytest.mark.parametrize("case", [Case("image"), Case("pair", "right", "seq2seq")], ids=str)
def test_autocast(case: Case, impl: str, shape: str, rate: float) -> None:
    call = inputs(case, shape)
    truth, true_grads = expected_training(case, shape, rate, False)
    baseline, plain_grads = expected_training(case, shape, rate, True)
    for name, model in both_training(shape, rate, impl):
        rows, grads = gradients(model, call, seed=5, autocast=True)
        assert_parity(model_parity(rows.bfloat16(), truth, baseline.bfloat16()), name)
        for parameter, true in true_grads.items():
            if true is None or ("k_proj" in parameter and parameter.endswith("bias")):
                continue
            mine, plain = (g[parameter].bfloat16() for g in (grads, plain_grads))
            assert_parity(model_parity(mine, true, plain, gradient=True), f"{name}: {parameter}")


@pytest.mark.parametrize("shape", SHAPES)
def test_drop_path_draws_as_torchscale_does_and_not_in_evaluation(shape: str) -> None:
    case = Case("pair", "right")
    call = inputs(case, shape)
    for name, model in both_training(shape, 0.4, "auto"):
        outputs = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            outputs.append(model(**call)["encoder_out"])
        assert torch.equal(outputs[0], outputs[1]), name
        assert not torch.equal(outputs[0], outputs[2]), name
        model.eval()
        try:
            with torch.no_grad():
                compare(name, model(**call)["encoder_out"], case, shape, "fp32", "encoder_out")
        finally:
            model.train()
