"""The compiled CPU ops on rows that lie further than 2^31 bytes and numbers from the first one.

Results are as near as their rows: a far one would have to be written as a whole.
"""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from cpu_cases import DTYPES, OPS, Attention, Linear
from torch import Tensor

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="asks Linux for room without memory"
)
# Bytes from row to row: more than an int32 holds, as is the number of the last row's first element.
ROWS, APART = 5, 1 << 31
_NORESERVE = 0x4000


class Far:
    """Puts rows APART bytes from each other, of which only the pages that are written take memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        room = mmap.mmap(-1, (ROWS - 1) * APART + (1 << 20), flags)
        self.memory = torch.frombuffer(room, dtype=dtype)
        self.taken = 0

    def __call__(self, rows: Tensor) -> Tensor:
        stride = APART // self.memory.element_size()
        own = self.memory.as_strided(rows.shape, (stride, 1), self.taken)
        self.taken += rows.shape[1] + 3
        return own.copy_(rows)


@pytest.fixture(params=DTYPES)
def far(request: pytest.FixtureRequest) -> Far:
    return Far(DTYPES[request.param])


@pytest.mark.parametrize("gather", [False, True], ids=["all", "named"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_expert_linear(norm: bool, gather: bool, far: Far) -> None:
    case = Linear(far.dtype, (ROWS, 40, 70), experts=2, norm=norm, residual=True, gather=gather)
    if case.rows is not None:
        case.rows = torch.tensor([4, 0, 3, 2])
        case.bounds = [0, 3, 4]
    assert case.residual is not None
    apart = {"x": far(case.x), "residual": far(case.residual)}
    assert torch.equal(case.run(**apart), case.run())
    int8 = [OPS.quantize_weight(weight) for weight in case.weights]
    assert torch.equal(case.run(**apart, packed=int8), case.run(packed=int8))


def test_weights(far: Far) -> None:
    case = Linear(far.dtype, (7, 40, ROWS))
    apart = far(case.weights[0])
    for pack in (OPS.pack_weight, OPS.pack_transposed, OPS.quantize_weight):
        assert torch.equal(pack(apart), pack(case.weights[0])), pack
    assert torch.equal(case.run(weights=[apart], packed=[]), case.run())


@pytest.mark.parametrize("mask", ["bidirectional", "causal"])
def test_shared_attention(mask: str, far: Far) -> None:
    case = Attention(far.dtype, [2, 0], [1, 2], 2, 64)
    wanted = case.run(mask)
    case.q, case.k, case.v = far(case.q), far(case.k), far(case.v)
    assert torch.equal(case.run(mask), wanted)


@pytest.mark.parametrize("rows_of", ["a sample", "all samples"])
def test_cached_attention(rows_of: str, far: Far) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ROWS, 128, generator=draw).to(far.dtype) for _ in range(3))
    axis = 0 if rows_of == "a sample" else 1
    samples = torch.zeros(1, dtype=torch.int64) if axis == 0 else torch.arange(ROWS)
    seen = torch.ones(len(samples), ROWS // len(samples), ROWS if axis == 0 else 1) > 0

    def run(k: Tensor, v: Tensor) -> list[Tensor]:
        tail = (seen, samples, 2, 0.125)
        packed = OPS.pack_keys(k, v, 2)
        return [OPS.cached_attention(q.view(*seen.shape[:2], 128), k, v, *tail), packed]

    near = run(k.unsqueeze(axis), v.unsqueeze(axis))
    apart = run(far(k).unsqueeze(axis), far(v).unsqueeze(axis))
    assert all(map(torch.equal, apart, near))


def test_patches(far: Far) -> None:
    """All patches of a high image are masked but the last ones, which alone are read."""
    side, count = 256, 2
    patches = APART // side**2 + count
    room = far.memory.as_strided((patches * side, side), (side, 1))
    seen = room[-count * side :].copy_(torch.randn(count * side, side) / side)
    packed = OPS.pack_weight(torch.randn(1, side**2).to(far.dtype))
    token, masked = torch.zeros(1, dtype=far.dtype), torch.ones(1, patches, dtype=torch.bool)
    masked[:, -count:] = False

    def run(images: Tensor, masked: Tensor | None) -> Tensor:
        tokens = (None, token, token, None)
        return OPS.patch_embedding(images[None, None], packed, *tokens, masked, side)[0][-count:]

    assert torch.equal(run(room, masked), run(seen, None))
