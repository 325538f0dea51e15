"""What the compiled CPU ops refuse: every argument is checked before memory is touched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cpu_cases import OPS, Linear, cumulative


def test_pack_weight_says_what_it_holds() -> None:
    weight = torch.randn(64, 128)
    packed = OPS.pack_weight(weight)
    assert packed.dtype == weight.dtype
    assert packed.dim() == 1
    case = Linear(torch.float32, (4, 64, 128))
    assert case.packed[0].shape == packed.shape
    with pytest.raises(RuntimeError, match=r"packed\[0\] is not a weight of shape \[128, 64\]"):
        case.run(packed=[packed])
    for smaller in ((128, 60), (120, 64)):  # padded to the same size
        other = OPS.pack_weight(torch.randn(smaller))
        assert other.shape == packed.shape
        with pytest.raises(RuntimeError, match="pack_weight of this build"):
            case.run(packed=[other])
    with pytest.raises(RuntimeError, match="pack_weight of this build"):
        case.run(packed=[torch.zeros_like(packed)])
    with pytest.raises(RuntimeError, match="pack_weight of this build"):
        case.run(packed=[packed[:-1]])


BAD_LINEAR: dict[str, tuple[dict[str, Any], str]] = {
    "vector": ({"x": torch.randn(8)}, "x must have 2 dimensions"),
    "dtype": ({"x": torch.randn(6, 8).double()}, "x must be float32 or bfloat16"),
    "other dtype": ({"x": torch.randn(6, 8).bfloat16()}, "same dtype"),
    "columns apart": ({"x": torch.randn(8, 6).t()}, "stride 1"),
    "features": ({"x": torch.randn(6, 9)}, r"weights\[0\] must have shape \[4, 9\]"),
    "no weight": ({"weights": []}, "at least one weight"),
    "biases": ({"biases": [torch.randn(4)]}, "0 or 2 entries"),
    "bias": ({"biases": [torch.randn(4), torch.randn(5)]}, r"biases\[1\]"),
    "norm": ({"norm_biases": []}, "norm_biases"),
    "residual": ({"residual": torch.randn(6, 5)}, r"residual must have shape \[6, 4\]"),
    "few bounds": ({"bounds": [0, 6]}, "bounds must have 3 entries"),
    "bounds start": ({"bounds": [1, 2, 6]}, "start at 0"),
    "bounds fall": ({"bounds": [0, 7, 6]}, "not decrease"),
    "bounds end": ({"bounds": [0, 2, 7]}, "bounds end at 7"),
    "rows count": ({"rows": torch.arange(5)}, "rows has 5 entries"),
    "rows type": ({"rows": torch.arange(6).int()}, "int64"),
    "row beyond": ({"rows": torch.tensor([0, 1, 2, 3, 4, 6])}, r"rows\[5\] is 6"),
    "row below": ({"rows": torch.tensor([0, 1, 2, 3, 4, -1])}, r"rows\[5\] is -1"),
    "row twice": ({"rows": torch.tensor([0, 1, 2, 3, 4, 1])}, "row 1 twice"),
    "eps": ({"eps": math.nan}, "eps"),
    "activation": ({"activation": "tanh"}, "'none' or 'gelu'"),
}


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_expert_linear_rejects(name: str) -> None:
    changes, message = BAD_LINEAR[name]
    case = Linear(torch.float32, (6, 8, 4), experts=2, packed=False)
    case.run()
    with pytest.raises(RuntimeError, match=message):
        case.run(**changes)


BAD_ATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 3}, "3 heads do not divide"),
    "k rows": ({"k": torch.randn(8, 8)}, "same rows"),
    "v width": ({"v": torch.randn(9, 6)}, "same rows"),
    "q rows": ({"q": torch.randn(8, 8)}, "q has 8 rows"),
    "q dtype": ({"q": torch.randn(9, 8).half()}, "float32 or bfloat16"),
    "k dtype": ({"k": torch.randn(9, 8).bfloat16()}, "same dtype"),
    "k strides": ({"k": torch.randn(8, 9).t()}, "stride 1"),
    "offsets start": ({"cu_vision": torch.tensor([1, 2, 5]).int()}, "start at 0"),
    "offsets fall": ({"cu_text": torch.tensor([0, 5, 4]).int()}, "not decrease"),
    "offsets end": ({"cu_text": torch.tensor([0, 1, 5]).int()}, "end at 10"),
    "offsets count": ({"cu_text": torch.tensor([0, 4]).int()}, "3 entries"),
    "offsets type": ({"cu_text": torch.tensor([0, 1, 4])}, "int32"),
    "no offsets": ({"cu_vision": torch.empty(0).int()}, "B \\+ 1"),
    "half the queries": ({"cu_text_q": torch.tensor([0, 1, 4]).int()}, "come together"),
    "position": ({"positions_q": torch.tensor([0, 1, 0, 1, 3, 0, 0, 1, 2]).int()}, r"q\[4\] is 3"),
    "positions": ({"positions_q": torch.tensor([0]).int()}, "9 entries"),
    "mask": ({"mask": "full"}, "mask must be"),
    "seen": ({"seen": torch.ones(5, 5, dtype=torch.bool)}, r"\[6, 6\] or \[2, 6, 6\]"),
    "seen samples": ({"seen": torch.ones(1, 6, 6, dtype=torch.bool)}, r"got shape \[1, 6, 6\]"),
    "seen type": ({"seen": torch.ones(6, 6)}, "seen must be a contiguous bool"),
    "seen strides": ({"seen": torch.ones(6, 12, dtype=torch.bool)[:, ::2]}, "contiguous bool"),
    "scale": ({"scale": math.inf}, "scale"),
}


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_shared_attention_rejects(name: str) -> None:
    changes, message = BAD_ATTENTION[name]
    arguments: dict[str, Any] = {
        **dict.fromkeys("qkv", torch.randn(9, 8)),
        "cu_vision": torch.tensor([0, 2, 5]).int(),
        "cu_text": torch.tensor([0, 1, 4]).int(),
        **dict.fromkeys(("cu_vision_q", "cu_text_q", "positions_q")),
        "num_heads": 2,
        "scale": 0.5,
        "mask": "seq2seq",
    }
    OPS.shared_attention(**arguments)
    with pytest.raises(RuntimeError, match=message):
        OPS.shared_attention(**{**arguments, **changes})


PREFIX = torch.randn(4, 2, 1024)
MISPLACED = torch.randn(4 * 2 * 1024 + 1)[1:].view(4, 2, 1024)
BAD_CACHE: dict[str, tuple[dict[str, Any], str]] = {
    "q": ({"q": torch.randn(2, 8)}, r"contiguous \[S, n, C\]"),
    "q strides": ({"q": torch.randn(2, 8, 3).transpose(1, 2)}, r"contiguous \[S, n, C\]"),
    "q dtype": ({"q": torch.randn(2, 3, 8).half()}, "float32 or bfloat16"),
    "heads": ({"num_heads": 3}, "3 heads do not divide"),
    "k width": ({"k": torch.randn(4, 5, 9)}, r"\[B, N, 8\]"),
    "k dtype": ({"k": torch.randn(4, 5, 8).bfloat16()}, "same dtype"),
    "v strides": ({"v": torch.randn(4, 8, 5).transpose(1, 2)}, "stride 1"),
    "v keys": ({"v": torch.randn(4, 6, 8)}, "same shape"),
    "seen": ({"seen": torch.ones(2, 3, 6, dtype=torch.bool)}, r"\[2, 3, 5\]"),
    "seen type": ({"seen": torch.ones(2, 3, 5)}, "bool"),
    "samples": ({"samples": torch.tensor([0])}, "2 entries"),
    "samples type": ({"samples": torch.tensor([0, 1]).int()}, "int64"),
    "sample": ({"samples": torch.tensor([0, 4])}, r"samples\[1\] is 4, but there are 4"),
    "negative sample": ({"samples": torch.tensor([-1, 0])}, r"samples\[0\] is -1"),
    "scale": ({"scale": math.nan}, "scale"),
    "prefix keys": ({"prefix_keys": 0}, "prefix_keys must be positive"),
    "prefix of other keys": ({"prefix_keys": 40}, "as pack_keys packs 40 keys"),
    "prefix samples": ({"prefix": PREFIX[:3]}, r"prefix must be \[4, 2, 1024\]"),
    "prefix dtype": ({"prefix": PREFIX.bfloat16()}, "same dtype"),
    "prefix heads": ({"prefix": PREFIX[:, :1]}, r"prefix must be \[4, 2, 1024\]"),
    "prefix place": ({"prefix": MISPLACED}, "begin at a cache line"),
}


@pytest.mark.parametrize("name", BAD_CACHE)
def test_cached_attention_rejects(name: str) -> None:
    changes, message = BAD_CACHE[name]
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 3, 8),
        **dict.fromkeys("kv", torch.randn(4, 5, 8)),
        "seen": torch.ones(2, 3, 5, dtype=torch.bool),
        "samples": torch.tensor([3, 0]),
        "num_heads": 2,
        "scale": 0.5,
        "prefix": PREFIX,
        "prefix_keys": 7,
    }
    OPS.cached_attention(**arguments)
    with pytest.raises(RuntimeError, match=message):
        OPS.cached_attention(**{**arguments, **changes})


BAD_PATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"images": torch.randn(2, 3, 8, 12).half()}, "float32 or bfloat16"),
    "no batch": ({"images": torch.randn(3, 8, 12)}, r"\[B, K, H, W\]"),
    "strides": ({"images": torch.randn(2, 8, 12, 3).permute(0, 3, 1, 2)}, "contiguous"),
    "size": ({"images": torch.randn(2, 3, 8, 13)}, "multiples of the patch 4"),
    "patch": ({"patch": 0}, "multiples of the patch 0"),
    "weight": ({"packed": OPS.pack_weight(torch.randn(24, 47))}, r"shape \[24, 48\]"),
    "other dtype": ({"packed": OPS.pack_weight(torch.randn(24, 48).bfloat16())}, "this dtype"),
    "bias": ({"bias": torch.randn(23)}, r"bias must be contiguous with shape \[24\]"),
    "cls": ({"cls_token": torch.randn(1, 1, 24)}, r"cls_token must be \[C\]"),
    "mask token": ({"mask_token": torch.randn(25)}, "mask_token"),
    "positions": ({"positions": torch.randn(6, 24)}, r"\[7, 24\]"),
    "positions type": ({"positions": torch.randn(7, 24).bfloat16()}, "same dtype"),
    "masked": ({"masked": torch.zeros(2, 7, dtype=torch.bool)}, r"\[2, 6\]"),
    "masked type": ({"masked": torch.zeros(2, 6)}, "bool"),
}


@pytest.mark.parametrize("name", BAD_PATCHES)
def test_patch_embedding_rejects(name: str) -> None:
    changes, message = BAD_PATCHES[name]
    arguments: dict[str, Any] = {
        "images": torch.randn(2, 3, 8, 12),
        "packed": OPS.pack_weight(torch.randn(24, 48)),
        **dict.fromkeys(("bias", "cls_token", "mask_token"), torch.randn(24)),
        "positions": torch.randn(7, 24),
        "masked": torch.zeros(2, 6, dtype=torch.bool),
        "patch": 4,
    }
    OPS.patch_embedding(**arguments)
    with pytest.raises(RuntimeError, match=message):
        OPS.patch_embedding(**{**arguments, **changes})


def test_some_queries_need_positions_under_a_mask() -> None:
    q, kv = torch.randn(1, 4), torch.randn(3, 4)
    offsets = (cumulative([2]), cumulative([1]), cumulative([1]), cumulative([0]))
    OPS.shared_attention(q, kv, kv, *offsets, None, 1, 1.0, "bidirectional")
    for mask, seen in (("causal", None), ("bidirectional", torch.ones(3, 3, dtype=torch.bool))):
        with pytest.raises(RuntimeError, match="needs positions_q"):
            OPS.shared_attention(q, kv, kv, *offsets, None, 1, 1.0, mask, seen)


def test_the_product_loop_counts_its_operations_and_checks_its_operands() -> None:
    x, weight = torch.randn(40, 48), torch.randn(64, 48)
    packed = OPS.pack_weight(weight)
    once = OPS.product_loop(x, packed, 1)
    assert once > 0
    assert once % (2 * 48 * 32) == 0
    assert OPS.product_loop(x, packed, 3) == 3 * once
    with pytest.raises(RuntimeError, match=r"must be a weight \[64, 48\]"):
        OPS.product_loop(x, OPS.pack_weight(weight[:, :47]), 1)
    with pytest.raises(RuntimeError, match="needs rows"):
        OPS.product_loop(x, packed, 0)
