"""The check of the operands of expert_linear: one fault in each call, beside calls without any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from beit3_fast.errors import ShapeError
from beit3_fast.ops import Norm, library
from beit3_fast.ops.operands import check
from beit3_fast.ops.packed_weight import pack, quantize

Call = dict[str, Any]
M, I, O = 5, 8, 6


def call(**changes: Any) -> Call:
    """Two experts; a stacked and a whole weight would not fit one another."""
    vectors = [torch.ones(I)] * 2
    return {
        "x": torch.ones(M, I),
        "weights": [(torch.ones(2, I), torch.ones(4, I)), (torch.ones(3, I), torch.ones(3, I))],
        "biases": [(torch.ones(2), torch.ones(4)), torch.ones(O)],
        "bounds": (0, 3, M),
        "norm": Norm(vectors, vectors),
        "activation": "gelu",
        "residual": torch.ones(M, O),
    } | changes


def refused(own: Call) -> bool:
    try:
        check(**own, parts=None, width=0, rows=None)
    except ShapeError:
        return True
    return False


GOOD: dict[str, Callable[[], Call]] = {
    "everything": call,
    "nothing": lambda: call(biases=None, norm=None, activation=None, residual=None),
    "one expert": lambda: call(
        weights=[torch.ones(O, I)],
        biases=None,
        bounds=[0, M],
        norm=Norm([torch.ones(I)], [torch.ones(I)]),
    ),
    "no rows": lambda: call(x=torch.ones(0, I), bounds=(0, 0, 0), residual=torch.ones(0, O)),
}
_vectors = [torch.ones(I)] * 2
_weights = call()["weights"]
BAD: list[Call] = [
    call(x=None),
    call(x=[[1.0]]),
    call(x=torch.ones(M)),
    call(x=torch.ones(M, I, 1)),
    call(x=torch.ones(M, I, dtype=torch.int32)),
    call(x=torch.ones(M, I).half()),
    call(x=torch.ones(M, I, device="meta")),
    call(x=torch.ones(M, 0), weights=[torch.ones(O, 0)] * 2, norm=None),
    call(weights=[]),
    call(weights=None),
    call(weights=torch.ones(2, O, I)),
    call(weights="ab"),
    call(weights=[torch.ones(O, I), None]),
    call(weights=[torch.ones(O, I), ()]),
    call(weights=[torch.ones(O, I), torch.ones(O, I + 1)]),
    call(weights=[torch.ones(O, I), torch.ones(O + 1, I)]),
    call(weights=[torch.ones(O, I), torch.ones(O, I, 1)]),
    call(weights=[torch.ones(O, I), torch.ones(O * I)]),
    call(weights=[torch.ones(O, I), torch.ones(O, I).double()]),
    call(weights=[torch.ones(O, I), torch.ones(O, I, device="meta")]),
    call(weights=[torch.ones(0, I)] * 2, biases=None, residual=None),
    call(weights=_weights[:1]),
    call(biases=[torch.ones(O)]),
    call(biases=[torch.ones(O), None]),
    call(biases=torch.ones(2, O)),
    call(biases=[torch.ones(O), torch.ones(O + 1)]),
    call(biases=[torch.ones(O), torch.ones(O, 1)]),
    call(biases=[torch.ones(O), torch.ones(O).bfloat16()]),
    call(biases=[torch.ones(O), torch.ones(O, device="meta")]),
    call(norm=_vectors),
    call(norm=Norm(_vectors[:1], _vectors)),
    call(norm=Norm(_vectors, [torch.ones(I), torch.ones(I + 1)])),
    call(norm=Norm(_vectors, [torch.ones(I), torch.ones(1, I)])),
    call(norm=Norm(_vectors, [torch.ones(I), None])),  # type: ignore[list-item]
    call(norm=Norm(_vectors, [torch.ones(I), torch.ones(I, device="meta")])),
    call(norm=Norm(_vectors, _vectors, -1e-5)),
    call(norm=Norm(_vectors, _vectors, float("nan"))),
    call(norm=Norm(_vectors, _vectors, "1e-5")),  # type: ignore[arg-type]
    call(activation="relu"),
    call(activation=0),
    call(bounds=(0, M)),
    call(bounds=(0, 3, M, M)),
    call(bounds=(1, 3, M)),
    call(bounds=(0, 4, 3)),
    call(bounds=(0, 3, M + 1)),
    call(bounds=(0, -1, M)),
    call(bounds=(0, 3.0, M)),
    call(bounds={0, 3, M}),
    call(bounds=torch.tensor([0, 3, M])),
    call(residual=torch.ones(M, O + 1)),
    call(residual=torch.ones(1, O)),
    call(residual=torch.ones(M, O).double()),
    call(residual=torch.ones(M, O, device="meta")),
    call(residual=0.0),
]


@pytest.mark.parametrize("name", GOOD)
def test_what_fits_passes(name: str) -> None:
    assert not refused(GOOD[name]())


@pytest.mark.parametrize("number", range(len(BAD)))
def test_one_fault_is_refused(number: int) -> None:
    assert refused(BAD[number])


@pytest.mark.skipif(not library.available(), reason="needs the compiled library")
def test_packed_weights() -> None:
    plain = torch.ones(O, I)
    for one in (pack(plain), quantize(plain, torch.float32)):
        assert not refused(call(weights=[one, one]))
    assert refused(call(weights=[pack(plain), quantize(plain, torch.float32)]))
