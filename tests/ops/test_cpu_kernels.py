"""The compiled CPU ops called directly, at every instruction-set level of this machine."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.ops import library
from beit3_fast.parity import op_parity

if not library.available():
    pytest.skip(f"the library {library.why_unavailable()}", allow_module_level=True)

OPS = torch.ops.beit3_fast
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EPS = 1e-5
LEVELS = ("portable", "avx512")


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def hard_values(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    x = randn(rows, columns, generator=generator)
    if kind == "mean":
        return x + 50 * randn(rows, 1, generator=generator).sign()
    if kind == "outlier":
        x[:, columns // 2] *= 300
        return x
    if kind == "constant":
        return x[:, :1].expand(rows, columns) * 7
    return x


class Linear:
    """The arguments of one expert_linear call, its formula in fp64 and plain PyTorch in its own dtype."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, int, int],
        experts: int = 1,
        *,
        norm: bool = True,
        activation: str = "none",
        residual: bool = False,
        gather: bool = False,
        packed: bool = True,
        values: str = "normal",
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        m, i, o = shape
        self.activation = activation
        # Slices of wider tensors: rows further apart than their length, at odd offsets.
        self.x = hard_values(values, m, i + 3, g).to(dtype)[:, 1 : i + 1]
        self.weights = [(randn(o, i, generator=g) / math.sqrt(i)).to(dtype) for _ in range(experts)]
        self.biases = [randn(o, generator=g).to(dtype) for _ in range(experts)]
        self.norm = [
            (1 + randn(i, generator=g) / 5).to(dtype) for _ in range(experts if norm else 0)
        ]
        self.shift = [(randn(i, generator=g) / 5).to(dtype) for _ in self.norm]
        self.residual = randn(m, o + 5, generator=g).to(dtype)[:, 2 : o + 2] if residual else None
        self.rows = torch.randperm(m, generator=g)[: (2 * m + 2) // 3] if gather else None
        count = m if self.rows is None else len(self.rows)
        cuts = torch.randint(0, count + 1, (experts - 1,), generator=g).sort().values.tolist()
        self.bounds = [0, *cuts, count]
        self.packed = [OPS.pack_weight(w) for w in self.weights] if packed else []

    def arguments(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "weights": self.weights,
            "packed": self.packed,
            "biases": self.biases,
            "norm_weights": self.norm,
            "norm_biases": self.shift,
            "residual": self.residual,
            "rows": self.rows,
            "bounds": self.bounds,
            "eps": EPS,
            "activation": self.activation,
        }

    def run(self, **changes: Any) -> Tensor:
        return OPS.expert_linear(**{**self.arguments(), **changes})

    def formula(self, dtype: torch.dtype) -> Tensor:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype)

        out = torch.zeros(len(self.x), len(self.weights[0]), dtype=dtype)
        rows = torch.arange(len(self.x)) if self.rows is None else self.rows
        for e, weight in enumerate(self.weights):
            r = rows[self.bounds[e] : self.bounds[e + 1]]
            y = cast(self.x[r])
            if self.norm:
                y = F.layer_norm(y, y.shape[1:], cast(self.norm[e]), cast(self.shift[e]), EPS)
            y = F.linear(y, cast(weight), cast(self.biases[e]))
            if self.activation == "gelu":
                y = F.gelu(y)
            out[r] = y if self.residual is None else y + cast(self.residual[r])
        return out

    def check(self) -> None:
        result = op_parity(self.run(), self.formula(self.x.dtype), self.formula(torch.float64))
        assert result.passed, result.reason


SHAPES = [
    (40, 1, 1),
    (1, 64, 160),
    (3, 40, 200),
    (5, 7, 3),
    (6, 96, 70),
    (13, 31, 95),
    (25, 65, 33),
]
SHAPES += [(37, 33, 144), (100, 768, 130), (197, 256, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_expert_linear_sizes(shape: tuple[int, int, int], dtype: str) -> None:
    for case in range(16):
        norm, gelu, residual, gather = (bool(case >> bit & 1) for bit in range(4))
        Linear(
            DTYPES[dtype],
            shape,
            experts=1 + case % 3,
            norm=norm,
            activation="gelu" if gelu else "none",
            residual=residual,
            gather=gather,
            packed=(case * 7) % 5 > 1,
            seed=case,
        ).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["mean", "outlier", "constant"])
def test_expert_linear_values(values: str, dtype: str) -> None:
    for shape in [(9, 768, 40), (30, 65, 40)]:
        Linear(DTYPES[dtype], shape, values=values, activation="gelu").check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_linear_without_rows(dtype: str) -> None:
    case = Linear(DTYPES[dtype], (4, 32, 48), experts=2)
    assert case.run(x=case.x[:0], bounds=[0, 0, 0]).shape == (0, 48)
    none = case.run(rows=torch.empty(0, dtype=torch.int64), bounds=[0, 0, 0])
    assert torch.equal(none, torch.zeros(4, 48, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_linear_rows_do_not_meet(dtype: str) -> None:
    """A row's result has the same bits alone, in any batch, on any number of threads."""
    case = Linear(DTYPES[dtype], (150, 130, 100), activation="gelu", residual=True)
    whole = case.run()
    assert case.residual is not None
    for first, last in [(0, 1), (3, 5), (10, 16), (0, 7), (50, 149)]:
        part = case.run(
            x=case.x[first:last],
            residual=case.residual[first:last],
            bounds=[0, last - first],
        )
        assert torch.equal(part, whole[first:last])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(case.run(), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(case.run(packed=[]), whole)


def test_gelu_of_special_values() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e30, -1e30, -5.0, -5.8, 1e-20])[:, None]
    y = OPS.expert_linear(
        x, [torch.ones(1, 1)], [], [], [], [], None, None, [0, len(x)], EPS, "gelu"
    ).flatten()
    assert y[0].isnan()
    assert y[1] == math.inf
    assert y[2:6].tolist() == [0, 0, pytest.approx(1e30), 0]
    truth = F.gelu(x[6:].double()).flatten()
    torch.testing.assert_close(y[6:].double(), truth, rtol=0, atol=2e-7)
    assert y[8] == pytest.approx(5e-21)


def test_a_bad_row_spoils_no_other() -> None:
    """Not a number in one row, and in the scratch memory that it leaves behind, stays in that row."""
    for dtype in DTYPES.values():
        case = Linear(dtype, (40, 70, 50))
        clean = case.run()
        x = case.x.clone()
        x[17] = math.nan
        spoilt = case.run(x=x)
        keep = torch.arange(40) != 17
        assert spoilt[17].isnan().all()
        assert torch.equal(spoilt[keep], clean[keep])
        case.run(x=torch.full_like(x, math.nan))
        assert torch.equal(case.run(), clean)


def test_parameters_may_stay_fp32() -> None:
    case = Linear(torch.bfloat16, (20, 64, 64))
    wide = case.run(
        biases=[t.float() for t in case.biases],
        norm_weights=[t.float() for t in case.norm],
        norm_biases=[t.float() for t in case.shift],
    )
    assert torch.equal(wide, case.run())


class Attention:
    """Packed q, k, v as slices of one tensor, for samples of the given lengths."""

    def __init__(
        self,
        dtype: torch.dtype,
        vision: list[int],
        text: list[int],
        heads: int,
        width: int,
        *,
        sharpness: float = 1.0,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.vision, self.text, self.heads = vision, text, heads
        rows = sum(vision) + sum(text)
        qkv = randn(rows, 3 * heads * width + 2, generator=g)[:, 1:-1]
        qkv[:, : heads * width] *= sharpness
        self.q, self.k, self.v = qkv.to(dtype).split(heads * width, dim=1)
        self.scale = width**-0.5

    def run(
        self, mask: str, *, chosen: tuple[list[list[int]], list[list[int]]] | None = None
    ) -> Tensor:
        offsets = (cumulative(self.vision), cumulative(self.text))
        q = self.q
        more: tuple[Tensor | None, ...] = (None, None, None)
        if chosen is not None:
            lengths = [[len(p) for p in part] for part in chosen]
            positions = torch.tensor([p for part in chosen for sample in part for p in sample])
            q = q[self.chosen_rows(chosen)]
            more = (cumulative(lengths[0]), cumulative(lengths[1]), positions.int())
        return OPS.shared_attention(
            q, self.k, self.v, *offsets, *more, self.heads, self.scale, mask
        )

    def chosen_rows(self, chosen: tuple[list[list[int]], list[list[int]]]) -> Tensor:
        starts = (cumulative(self.vision).tolist(), cumulative(self.text).tolist())
        first = (0, sum(self.vision))
        return torch.tensor(
            [
                first[part] + starts[part][s] + p
                for part in range(2)
                for s, sample in enumerate(chosen[part])
                for p in sample
            ],
            dtype=torch.int64,
        )

    def formula(self, mask: str, dtype: torch.dtype) -> Tensor:
        out = torch.zeros_like(self.q, dtype=dtype)
        vision_at, text_at = 0, sum(self.vision)
        for nv, nt in zip(self.vision, self.text, strict=True):
            rows = torch.cat(
                [torch.arange(vision_at, vision_at + nv), torch.arange(text_at, text_at + nt)]
            )
            vision_at, text_at, n = vision_at + nv, text_at + nt, nv + nt
            seen = torch.full((n,), n)
            if mask != "bidirectional":
                seen[nv:] = torch.arange(nv + 1, n + 1)
                seen[:nv] = nv if mask == "seq2seq" else torch.arange(1, nv + 1)
            q, k, v = (
                t[rows].to(dtype).unflatten(1, (self.heads, -1)).transpose(0, 1)
                for t in (self.q, self.k, self.v)
            )
            scores = (q @ k.mT) * self.scale
            scores = scores.masked_fill(torch.arange(n) >= seen[:, None], -math.inf)
            out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return out


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


LENGTHS = [
    ([5], [3]),
    ([1], [0]),
    ([0, 0], [1, 40]),
    ([197, 0, 30], [8, 9, 0]),
    ([50, 70, 32, 16], [33, 12, 0, 17]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bidirectional", "seq2seq", "causal"])
@pytest.mark.parametrize("size", [(3, 64), (2, 88), (1, 7), (2, 1), (1, 130)], ids=str)
def test_shared_attention(size: tuple[int, int], mask: str, dtype: str) -> None:
    for number, (vision, text) in enumerate(LENGTHS):
        for sharpness in (1.0, 40.0):
            case = Attention(DTYPES[dtype], vision, text, *size, sharpness=sharpness, seed=number)
            ours = case.run(mask)
            truth = case.formula(mask, torch.float64)
            result = op_parity(ours, case.formula(mask, DTYPES[dtype]), truth)
            assert result.passed, result.reason
            # Some queries alone: the same bits as among all.
            chosen = ([list(range(0, n, 3)) for n in vision], [list(range(1, n, 2)) for n in text])
            some = case.run(mask, chosen=chosen)
            assert torch.equal(some, ours[case.chosen_rows(chosen)])


def test_queries_without_keys_are_zero() -> None:
    for dtype in DTYPES.values():
        q, kv = torch.randn(3, 16).to(dtype), torch.randn(2, 16).to(dtype)
        offsets = (cumulative([0, 2]), cumulative([0, 0]), cumulative([2, 1]), cumulative([0, 0]))
        out = OPS.shared_attention(q, kv, kv, *offsets, None, 2, 0.3, "bidirectional")
        assert torch.equal(out[:2], torch.zeros(2, 16, dtype=dtype))
        assert (out[2] != 0).all()


def test_shared_attention_ignores_threads() -> None:
    case = Attention(torch.bfloat16, [500, 3], [20, 450], 1, 64)
    whole = case.run("causal")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(case.run("causal"), whole)
    finally:
        torch.set_num_threads(threads)


class Fence:
    """Copies tensors so that they end (or begin) at a page that nobody may touch."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.areas: list[tuple[int, int, mmap.mmap]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        page = mmap.PAGESIZE
        size = tensor.numel() * tensor.element_size()
        inside = -(-size // page) * page
        area = mmap.mmap(-1, inside + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for start in (base, base + page + inside):
            assert self.libc.mprotect(ctypes.c_void_p(start), page, 0) == 0
            self.areas.append((start, page, area))
        offset = page + (inside - size if self.at_end else 0)
        flat = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.view(tensor.shape).copy_(tensor)

    def open(self) -> None:
        for start, size, _ in self.areas:
            self.libc.mprotect(ctypes.c_void_p(start), size, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages without access")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_outside_its_tensor(dtype: str, at_end: bool) -> None:
    """A read past an end would end the process: sanitizers do not see masked vector loads."""
    fence = Fence(at_end)
    for shape in [(5, 33, 17), (13, 40, 100), (3, 7, 33), (26, 64, 64)]:
        for packed in (True, False):
            case = Linear(DTYPES[dtype], shape, activation="gelu", residual=True, packed=packed)
            wanted = case.run()
            names = ("weights", "packed", "biases", "norm", "shift")
            for name in names:
                setattr(case, name, [fence(t) for t in getattr(case, name)])
            assert case.residual is not None
            case.x, case.residual = fence(case.x), fence(case.residual)
            assert torch.equal(case.run(), wanted)
            OPS.pack_weight(case.weights[0])
    for width in (7, 64, 88):
        attention = Attention(DTYPES[dtype], [5, 33], [3, 0], 1, width)
        wanted = attention.run("causal")
        attention.q, attention.k, attention.v = map(fence, (attention.q, attention.k, attention.v))
        assert torch.equal(attention.run("causal"), wanted)
    fence.open()


def test_calls_from_many_threads() -> None:
    linears = [Linear(d, (20 + 9 * n, 40 + n, 70 - n)) for n in range(4) for d in DTYPES.values()]
    wanted = [case.run() for case in linears]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            if not torch.equal(linears[number].run(packed=[]), wanted[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(linears))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_pack_weight_says_what_it_holds() -> None:
    weight = torch.randn(64, 128)
    packed = OPS.pack_weight(weight)
    assert packed.dtype == weight.dtype
    assert packed.dim() == 1
    case = Linear(torch.float32, (4, 64, 128))
    assert case.packed[0].shape == packed.shape
    with pytest.raises(RuntimeError, match=r"packed\[0\] is not a weight of shape \[128, 64\]"):
        case.run(packed=[packed])
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


def test_some_queries_need_positions_under_a_mask() -> None:
    q, kv = torch.randn(1, 4), torch.randn(3, 4)
    offsets = (cumulative([2]), cumulative([1]), cumulative([1]), cumulative([0]))
    OPS.shared_attention(q, kv, kv, *offsets, None, 1, 1.0, "bidirectional")
    with pytest.raises(RuntimeError, match="needs positions_q"):
        OPS.shared_attention(q, kv, kv, *offsets, None, 1, 1.0, "causal")


@pytest.mark.skipif("BEIT3_FAST_CPU_ISA" in os.environ, reason="this is the inner run")
@pytest.mark.parametrize("level", LEVELS)
def test_lower_levels(level: str) -> None:
    """All of the above again in a process that may use no more than this level."""
    if level != "portable" and OPS.cpu_isa() == "portable":
        pytest.skip("this CPU has the portable level only")
    environment = {**os.environ, "BEIT3_FAST_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_level_is_what_was_asked_for() -> None:
    wish = os.environ.get("BEIT3_FAST_CPU_ISA")
    assert OPS.cpu_isa() in ("portable", "avx512", "avx512_bf16")
    assert wish is None or OPS.cpu_isa() == wish


def test_unknown_level_is_named() -> None:
    code = (
        "from beit3_fast.ops import library; library.load()\n"
        "import torch; torch.ops.beit3_fast.cpu_isa()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BEIT3_FAST_CPU_ISA": "avx9000"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "portable, avx512 or avx512_bf16, got 'avx9000'" in done.stderr
