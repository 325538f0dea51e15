"""What the compiled layers refuse: every argument is checked before memory is touched."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import library

if not library.available():
    pytest.skip(f"the library {library.why_unavailable()}", allow_module_level=True)

OPS = torch.ops.beit3_fast
C, F, ROWS = 32, 64, 10


@pytest.fixture(autouse=True)
def _registered() -> None:
    import_module("beit3_fast.ops.whole_layer")._ops()


def parameters(experts: int) -> dict[str, Any]:
    shapes = [(C, C)] * 4 * experts + [(F, C)] * experts + [(C, F)] * experts
    widths = [C] * 3 * experts + [F] * experts
    return {
        "packed": [OPS.pack_weight(torch.randn(shape)) for shape in shapes],
        "biases": [torch.randn(out) for out, _ in shapes],
        "norm_weights": [torch.randn(size) for size in widths],
        "norm_biases": [torch.randn(size) for size in widths],
        "eps": [1e-5] * 4,
    }


def encoder_arguments() -> dict[str, Any]:
    layout = TokenLayout.from_lengths([3, 0], [2, 5])
    return {
        "x": torch.randn(ROWS, C),
        **parameters(experts=2),
        "bounds": [0, 3, ROWS],
        "own_bounds": [0, 3, ROWS],
        "ffn_bounds": [0, 3, ROWS],
        "num_heads": 2,
        "last_weights": [],
        "last_biases": [],
        "last_eps": [],
        "last_bounds": [],
        "mask": "bidirectional",
        "cu_vision": layout.cu_vision,
        "cu_text": layout.cu_text,
    }


def normalised(rows: int = ROWS) -> dict[str, Any]:
    own = [torch.randn(C), torch.randn(C)]
    ends = {"last_eps": [1e-5, 0.1], "last_bounds": [0, 1, rows]}
    return {"last_weights": own, "last_biases": own, **ends}


def selected() -> dict[str, Any]:
    rows, own = TokenLayout.from_lengths([3, 0], [2, 5]).select("first", "first")
    bounds = [0, 1, 3]
    cu = {"cu_vision_q": own.cu_vision, "cu_text_q": own.cu_text, "positions_q": own.positions}
    return {"rows": rows, **cu, "own_bounds": bounds, "ffn_bounds": bounds}


def decoder_arguments() -> dict[str, Any]:
    k, v = torch.zeros(2, 3, 9, C)
    return {
        "x": torch.randn(4, C),
        **parameters(experts=1),
        "num_heads": 2,
        "k": k,
        "v": v,
        "place": 5,
        "seen": torch.ones(2, 1, 9, dtype=torch.bool),
        "samples": torch.tensor([2, 0]),
    }


def swapped(name: str, index: int, tensor: Tensor, experts: int = 2) -> dict[str, Any]:
    """A list of parameters with another one in it."""
    whole = parameters(experts)[name]
    return {name: [*whole[:index], tensor, *whole[index + 1 :]]}


def two_layers(experts: int = 2) -> dict[str, Any]:
    first, second = parameters(experts), parameters(experts)
    return {name: first[name] + second[name] for name in first}


NARROW = torch.randn(C - 1)
# Weights: two experts' queries, keys and values, their projections, fc1 and fc2.
BAD_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "vector": ({"x": torch.randn(C)}, "x must have 2 dimensions"),
    "dtype": ({"x": torch.randn(ROWS, C).double()}, "x must be float32 or bfloat16"),
    "other dtype": ({"x": torch.randn(ROWS, C).bfloat16()}, "of the dtype of x"),
    "no rows": ({"x": torch.randn(0, C)}, "x must not be empty"),
    "columns apart": ({"x": torch.randn(C, ROWS).T}, "stride 1"),
    "width": ({"x": torch.randn(ROWS, 2 * C)}, r"packed\[0\] is not a weight of shape \[64, 64\]"),
    "no packed": ({"packed": []}, "expected 12 weights"),
    "one bias more": ({"biases": [torch.randn(C)] * 13}, "and biases"),
    "no norms": ({"norm_weights": []}, "8 norms"),
    "no eps": ({"eps": []}, "4 eps for each layer"),
    "three eps": ({"eps": [1e-5] * 3}, "4 eps"),
    "eps": ({"eps": [1e-5, math.nan, 1e-5, 1e-5]}, "eps must be finite"),
    "a value's weight": (
        swapped("packed", 5, OPS.pack_weight(torch.randn(C, F))),
        r"packed\[5\] is not a weight of shape \[32, 32\]",
    ),
    "a plain weight": (swapped("packed", 7, torch.zeros(C * C)), r"packed\[7\] is not a weight"),
    "one in bf16": (
        swapped("packed", 6, OPS.pack_weight(torch.randn(C, C).bfloat16())),
        "every packed weight",
    ),
    "one in int8": (
        swapped("packed", 10, OPS.quantize_weight(torch.randn(C, F))),
        "every packed weight",
    ),
    "a key's bias": (swapped("biases", 1, NARROW), r"biases\[1\] must be contiguous with shape"),
    "a bias in bf16": (swapped("biases", 3, torch.randn(C).bfloat16()), "every bias"),
    "fc1's bias": (swapped("biases", 8, torch.randn(F - 1)), r"packed\[8\] is not a weight"),
    "fc1's second bias": (swapped("biases", 9, torch.randn(F - 1)), r"biases\[9\]"),
    "no vector": (swapped("biases", 8, torch.randn(())), r"a bias must be \[F\]"),
    "an inner norm": (swapped("norm_weights", 3, NARROW), r"norm_weights\[3\]"),
    "a norm of doubles": (swapped("norm_biases", 7, torch.randn(F).double()), r"norm_biases\[7\]"),
}
BAD_ENCODER: dict[str, tuple[dict[str, Any], str]] = {
    **BAD_PARAMETERS,
    "no bounds": ({"bounds": []}, "at least one expert"),
    "bounds end": ({"bounds": [0, 3, ROWS + 1]}, "bounds end at 11 but there are 10"),
    "bounds start": ({"bounds": [1, 3, ROWS]}, "start at 0"),
    "bounds fall": ({"ffn_bounds": [0, ROWS + 1, ROWS]}, "not decrease"),
    "fewer own bounds": ({"own_bounds": [0, ROWS]}, "must have 3 entries"),
    "heads": ({"num_heads": 3}, "3 heads do not divide a width of 32"),
    "no heads": ({"num_heads": 0}, "0 heads"),
    "mask": ({"mask": "diagonal"}, "mask must be"),
    "offsets end": ({"cu_text": torch.tensor([0, 2, 6]).int()}, "k has 10 rows"),
    "offsets fall": ({"cu_text": torch.tensor([0, 8, 7]).int()}, "must not decrease"),
    "offsets of another batch": ({"cu_text": torch.tensor([0, 7]).int()}, "3 entries"),
    "int64 offsets": ({"cu_vision": torch.tensor([0, 3, 3])}, "int32"),
    "queries' offsets": (selected() | {"cu_text_q": torch.tensor([0, 1, 3]).int()}, "q has 3 rows"),
    "rows of two layers": (selected() | two_layers(), "rows are those that one layer computes"),
    "weights of one layer": ({"eps": [1e-5] * 8}, "4 eps for each layer, got 12, 12, 8, 8 and 8"),
    "a last norm of other rows": (normalised(ROWS + 1), "last_bounds end at 11 but there are 10"),
    "a last norm of all rows": (selected() | normalised(), "last_bounds end at 10 but there are 3"),
    "a last norm's width": (normalised() | {"last_biases": [NARROW] * 2}, r"last_biases\[0\]"),
    "a last norm without weights": ({"last_biases": [torch.randn(C)]}, "for each expert"),
    "a last norm's eps": (normalised() | {"last_eps": [1e-5, math.inf]}, "eps must be finite"),
    "a last norm's bias": (normalised() | {"last_biases": [torch.randn(C)]}, "for each expert"),
    "rows alone": ({"rows": torch.tensor([0])}, "come together"),
    "queries' offsets alone": ({"cu_vision_q": torch.zeros(3).int()}, "come together"),
    "a row too far": (selected() | {"rows": torch.tensor([0, 3, ROWS])}, r"rows\[2\] is 10"),
    "a row below": (selected() | {"rows": torch.tensor([-1, 3, 5])}, r"rows\[0\] is -1"),
    "int32 rows": (selected() | {"rows": torch.tensor([0, 3, 5]).int()}, "int64"),
    "too many rows": (selected() | {"rows": torch.tensor([0, 1, 3, 5])}, "there are 4 rows"),
    "own bounds of all": (selected() | {"own_bounds": [0, 3, ROWS]}, "end at 10 but there are 3"),
    "a position": (selected() | {"positions_q": torch.tensor([3, 0, 0]).int()}, "positions_q"),
    "no positions": (selected() | {"positions_q": None, "mask": "causal"}, "needs positions_q"),
}
BAD_DECODER: dict[str, tuple[dict[str, Any], str]] = {
    "two experts": (parameters(experts=2), "expected 6 weights"),
    "a weight": (
        swapped("packed", 2, OPS.pack_weight(torch.randn(C, F)), experts=1),
        r"packed\[2\] is not a weight",
    ),
    "two layers": (two_layers(experts=1), "takes one layer, got 2"),
    "heads": ({"num_heads": 5}, "5 heads"),
    "no heads": ({"num_heads": 0}, "0 heads"),
    "another dtype": ({"k": torch.zeros(3, 9, C).bfloat16()}, "k must be a CPU tensor of the same"),
    "another width": ({"v": torch.zeros(3, 9, 2 * C)}, "v must be"),
    "unlike": ({"v": torch.zeros(3, 8, C)}, "the same shape"),
    "too late": ({"place": 8}, "2 rows from 8 on do not fit into 9 places"),
    "too early": ({"place": -1}, "do not fit"),
    "seen of others": ({"seen": torch.ones(2, 1, 8, dtype=torch.bool)}, "seen must be"),
    "seen by none": ({"seen": torch.ones(2, 0, 9, dtype=torch.bool)}, "seen must name"),
    "seen by more": ({"seen": torch.ones(2, 3, 9, dtype=torch.bool)}, "seen must name"),
    "a sample too far": ({"samples": torch.tensor([3, 0])}, r"samples\[0\] is 3"),
    "three sequences": ({"samples": torch.tensor([0, 1, 2])}, "divide the 4 rows"),
    "no sequence": ({"samples": torch.tensor([], dtype=torch.int64)}, "divide the 4 rows"),
    "int32 samples": ({"samples": torch.tensor([2, 0]).int()}, "int64"),
    "a prefix": ({"prefix": torch.zeros(3, 2, 7), "prefix_keys": 4}, "prefix must be"),
}


def test_the_arguments_as_they_are() -> None:
    own = encoder_arguments()
    assert OPS.encoder_layers(**own).shape == (ROWS, C)
    assert OPS.encoder_layers(**(own | selected())).shape == (3, C)
    assert OPS.encoder_layers(**(own | two_layers())).shape == (ROWS, C)
    assert OPS.encoder_layers(**(own | normalised())).shape == (ROWS, C)
    assert OPS.encoder_layers(**(own | selected() | normalised(3))).shape == (3, C)
    assert OPS.decoder_layer(**decoder_arguments()).shape == (2, C)


@pytest.mark.parametrize("name", BAD_ENCODER)
def test_encoder_layers_rejects(name: str) -> None:
    changes, message = BAD_ENCODER[name]
    with pytest.raises(RuntimeError, match=f"encoder_layers: .*{message}"):
        OPS.encoder_layers(**(encoder_arguments() | changes))


@pytest.mark.parametrize("name", BAD_DECODER)
def test_decoder_layer_rejects(name: str) -> None:
    changes, message = BAD_DECODER[name]
    own = decoder_arguments() | changes
    with pytest.raises(RuntimeError, match=f"decoder_layer: .*{message}"):
        OPS.decoder_layer(**own)
    if name != "a weight":
        assert not own["k"].any()
        assert not own["v"].any()
