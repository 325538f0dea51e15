"""The ops met with input that they cannot use: one family of errors that say what came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sound_calls import attention, bias, gamma, layout, linear, name_of, q, residual, weight, x
from torch import nn

from beit3_fast.errors import (
    Beit3FastError,
)
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import Measured, Norm

META = torch.device("meta")
elsewhere = TokenLayout.from_lengths([2, 1], [1, 2], META)
BAD_LINEAR: list[tuple[dict[str, Any], str]] = [
    ({"x": [1]}, "x must be a tensor, got list"),
    ({"x": None}, "x must be a tensor, got NoneType"),
    ({"x": x[None]}, r"\[M, I\], got torch.float32 of shape \(1, 6, 8\)"),
    ({"x": x.long()}, "floating-point tensor.*got torch.int64"),
    ({"x": x[:, :7]}, r"weights\[0\] must have shape .* got \[4, 8\]"),
    ({"weights": []}, "at least one expert, got none"),
    ({"weights": None}, "weights must be a list.*got NoneType"),
    ({"weights": weight}, "weights must be a list.*got Tensor"),
    ({"weights": [()]}, r"weights\[0\] must be a tensor or a tuple.*got tuple"),
    ({"weights": ["w"]}, r"weights\[0\] must be a tensor.*got str"),
    ({"weights": [weight.T]}, r"weights\[0\] must have shape .* got \[8, 4\]"),
    ({"weights": [weight[None]]}, r"weights\[0\] must have shape"),
    ({"weights": [weight.bfloat16()]}, "x's dtype torch.float32, got torch.bfloat16"),
    ({"weights": [weight.to("meta")]}, "weights must be on x's device cpu, got meta; move"),
    ({"biases": [bias.to("meta")]}, "biases must be on x's device cpu, got meta"),
    ({"residual": residual.to("meta")}, "residual must be on x's device cpu, got meta"),
    ({"rows": torch.arange(6, device="meta")}, "rows must be on x's device cpu, got meta"),
    ({"norm": Norm([gamma.to("meta")], [gamma])}, "norm.weights must be on x's device cpu, got m"),
    ({"norm": Norm([gamma], [gamma.to("meta")])}, "norm.biases must be on x's device cpu, got met"),
    ({"x": Measured(x, torch.zeros(6, 1, 2, device="meta"), 8)}, "statistics must be on x's dev"),
    ({"x": x[:, :0], "weights": [weight[:, :0]], "norm": None}, r"one feature, got shape \[6, 0\]"),
    ({"biases": [bias, bias]}, r"biases must hold 1 tensors of shape \[4\]"),
    ({"biases": [gamma]}, r"biases must hold .* got \[\[8\]\]"),
    ({"biases": [None]}, r"biases\[0\] must be a tensor.*got NoneType"),
    ({"biases": bias}, "biases must be a list.*got Tensor"),
    ({"biases": [bias.bfloat16()]}, "x's dtype torch.float32, got torch.bfloat16"),
    ({"bounds": (0,)}, r"2 ascending row numbers from 0 to 6, got \(0,\)"),
    ({"bounds": (6, 0)}, "ascending row numbers"),
    ({"bounds": (1, 6)}, "ascending row numbers"),
    ({"bounds": (0, 5)}, "ascending row numbers"),
    ({"bounds": (0.0, 6.0)}, r"got \(0.0, 6.0\)"),
    ({"bounds": None}, "got None"),
    ({"bounds": torch.tensor([0, 6])}, "got tensor"),
    ({"norm": ([gamma], [gamma])}, "norm must be a Norm.*got tuple"),
    ({"norm": Norm([bias], [gamma])}, r"norm.weights must hold 1 tensors of shape \[8\]"),
    ({"norm": Norm([gamma], [gamma, gamma])}, "norm.biases must hold 1"),
    ({"norm": Norm([None], [gamma])}, r"norm.weights\[0\] must be a tensor"),  # type: ignore[list-item]
    ({"norm": Norm([gamma], [gamma], -1.0)}, "norm.eps must be .* got -1.0"),
    ({"norm": Norm([gamma], [gamma], float("nan"))}, "norm.eps must be .* got nan"),
    ({"activation": "relu"}, "None or 'gelu', got 'relu'"),
    ({"activation": nn.GELU()}, "None or 'gelu', got GELU"),
    ({"residual": x}, r"residual must have shape \[M, O\] = \[6, 4\], got \[6, 8\]"),
    ({"residual": residual.bfloat16()}, "residual must have x's dtype"),
    ({"residual": [1]}, "residual must be a tensor, got list"),
    ({"rows": torch.arange(6.0)}, "rows must be int64.*got torch.float32"),
    ({"rows": torch.arange(6)[None]}, r"rows must be int64 \[R\]"),
    ({"rows": torch.tensor(1)}, r"rows must be int64 \[R\]"),
    ({"rows": [0, 1, 2, 3, 4, 5]}, "rows must be a tensor, got list"),
    ({"rows": torch.tensor([0, 1, 2, 3, 4, 6])}, "rows of x, 0 to 5, got 0 to 6"),
    ({"rows": torch.tensor([0, 1, 2, 3, 4, -1])}, "rows of x, 0 to 5, got -1 to 4"),
    ({"rows": torch.tensor([0, 1, 2, 3, 4, 4])}, "must not name a row twice"),
    ({"rows": torch.arange(3)}, "from 0 to 3, got"),
    ({"impl": "fast"}, "impl must be 'auto' or one of.*'fast'"),
    ({"impl": None}, "impl must be 'auto' or one of.*None"),
]


BAD_ATTENTION: list[tuple[dict[str, Any], str]] = [
    ({"q": [1]}, "q must be a tensor, got list"),
    ({"q": q[None]}, r"q must have shape \[Rq, H \* D\].*got \[1, 6, 8\]"),
    ({"q": q[0]}, r"q must have shape .*got \[8\]"),
    ({"q": q.long(), "k": q.long(), "v": q.long()}, "floating-point dtype, got torch.int64"),
    ({"q": q[:5]}, "one row per query: 6, got 5"),
    ({"k": q[:5]}, r"k must have shape \[R, C\] = \[6, 8\], got \[5, 8\]"),
    ({"k": None}, "k must be a tensor, got NoneType"),
    ({"v": q[:, :4]}, r"v must have shape .* got \[6, 4\]"),
    ({"k": q.bfloat16()}, "k must have q's dtype and device.*got torch.bfloat16"),
    ({"v": q.to("meta")}, "v must have q's dtype and device.*meta"),
    ({"q": q[:, :0], "k": q[:, :0], "v": q[:, :0]}, r"D of 1 or more, got \[6, 0\]"),
    ({"layout": elsewhere}, "layout must be on q's device cpu, got meta; make it with device="),
    (
        {"queries": replace(layout.select("all", "all").layout, device=META)},
        "queries must be on q's device cpu, got m",
    ),
    ({"num_heads": 3}, "num_heads = 3"),
    ({"num_heads": 0}, "num_heads = 0"),
    ({"num_heads": -2}, "num_heads = -2"),
    ({"num_heads": 2.0}, "num_heads must be an integer, got 2.0"),
    ({"num_heads": None}, "num_heads must be an integer, got None"),
    ({"scale": float("nan")}, "scale must be a number.*got nan"),
    ({"scale": float("inf")}, "scale must be a number.*got inf"),
    ({"scale": -1.0}, "scale must be a number.*got -1.0"),
    ({"scale": "1"}, "scale must be a number.*got '1'"),
    ({"layout": None}, "layout must be a TokenLayout, got NoneType"),
    ({"layout": ([2], [1])}, "layout must be a TokenLayout, got tuple"),
    ({"layout": TokenLayout.from_lengths([2], [1])}, "one row per query: 3, got 6"),
    ({"mask": "prefix"}, "'bidirectional', 'seq2seq', 'causal'.*got 'prefix'"),
    ({"mask": None}, "mask must be one of .* got NoneType"),
    ({"mask": [[True]]}, "mask must be one of .* got list"),
    ({"mask": torch.zeros(4, 4)}, r"bool, .*\[4, 4\] or \[2, 4, 4\], got torch.float32"),
    ({"mask": torch.zeros(5, 5, dtype=torch.bool)}, r"got torch.bool of shape \[5, 5\]"),
    ({"mask": torch.zeros(3, 4, 4, dtype=torch.bool)}, r"of shape \[3, 4, 4\]"),
    ({"mask": torch.zeros(4, 4, dtype=torch.bool, device="meta")}, "device cpu, got meta"),
    ({"queries": (1,)}, "queries must be a TokenLayout, got tuple"),
    ({"queries": TokenLayout.from_lengths([2, 1], [1, 2])}, "must come from layout.select"),
    ({"queries": TokenLayout.from_lengths([2, 2], [1, 1])}, "must come from layout.select"),
    ({"q": q[:4], "queries": layout.select("first", "first")}, "TokenLayout, got Selection"),
    ({"impl": "fast"}, "impl must be 'auto' or one of.*'fast'"),
]


@pytest.mark.parametrize("operand", ["weights", "biases", "residual"])
def test_autocast_changes_dtypes_not_devices(operand: str) -> None:
    own = {"weights": [weight.to("meta")], "biases": [bias.to("meta")]}
    changes = {operand: own.get(operand, residual.to("meta"))}
    message = f"{operand} must be on x's device cpu"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Beit3FastError, match=message):
        linear(**changes)


@pytest.mark.parametrize("impl", ["auto", "composite", "reference", "cpu"])
@pytest.mark.parametrize(("changes", "message"), BAD_LINEAR, ids=name_of)
def test_expert_linear(impl: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        linear(**({"impl": impl} | changes))


@pytest.mark.parametrize("impl", ["auto", "composite", "reference"])
@pytest.mark.parametrize(("changes", "message"), BAD_ATTENTION, ids=name_of)
def test_shared_attention(impl: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        attention(**({"impl": impl} | changes))
