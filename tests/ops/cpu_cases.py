"""Calls of the compiled CPU ops with their formula in fp64 and plain PyTorch in the same dtype."""

from __future__ import annotations

import math
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


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def hard_values(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    x = randn(rows, columns, generator=generator)
    if kind == "mean":
        return x + 50 * randn(rows, 1, generator=generator).sign()
    if kind == "outlier":
        x[:, columns // 2] *= 300
        return x
    if kind == "spike":  # a mean thousands of deviations away, exact in bf16
        x = torch.full((rows, columns), 64.0)
        x[:, columns // 3] += 0.5
        return x
    if kind == "steps":  # a mean 700 deviations away, exact in bf16
        return 100.0 + 0.5 * (x > 1.28)
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
        self,
        mask: str,
        *,
        chosen: tuple[list[list[int]], list[list[int]]] | None = None,
        seen: Tensor | None = None,
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
            q, self.k, self.v, *offsets, *more, self.heads, self.scale, mask, seen
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

    def formula(self, mask: str, dtype: torch.dtype, seen: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(self.q, dtype=dtype)
        vision_at, text_at = 0, sum(self.vision)
        for sample, (nv, nt) in enumerate(zip(self.vision, self.text, strict=True)):
            rows = torch.cat(
                [torch.arange(vision_at, vision_at + nv), torch.arange(text_at, text_at + nt)]
            )
            vision_at, text_at, n = vision_at + nv, text_at + nt, nv + nt
            first = torch.full((n,), n)
            if mask != "bidirectional":
                first[nv:] = torch.arange(nv + 1, n + 1)
                first[:nv] = nv if mask == "seq2seq" else torch.arange(1, nv + 1)
            hidden = torch.arange(n) >= first[:, None]
            if seen is not None:
                places = torch.arange(n)
                places[nv:] += max(self.vision) - nv
                own = seen if seen.dim() == 2 else seen[sample]
                hidden |= ~own[places][:, places]
            q, k, v = (
                t[rows].to(dtype).unflatten(1, (self.heads, -1)).transpose(0, 1)
                for t in (self.q, self.k, self.v)
            )
            scores = (q @ k.mT) * self.scale
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
            out[rows] = (weights @ v).transpose(0, 1).flatten(1)
        return out


class Cached:
    """A few queries a sequence against the first ``keys`` of a longer cache of three samples; query 0 of the first sees none."""

    def __init__(
        self,
        dtype: torch.dtype,
        keys: int,
        queries: int,
        samples: list[int],
        heads: int,
        width: int,
        sharpness: float = 1.0,
    ) -> None:
        g = torch.Generator().manual_seed(keys)
        self.samples, self.heads, self.keys = samples, heads, keys
        self.front = 0
        q = sharpness * randn(len(samples), queries, heads * width, generator=g)
        self.q = q.to(dtype)
        self.cache = randn(2, 3, keys + 5, heads * width + 2, generator=g).to(dtype)
        self.seen = torch.rand(len(samples), queries, keys, generator=g) > 0.3
        self.seen[0, 0] = False
        self.scale = width**-0.5

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows further apart than their length, at odd offsets."""
        k, v = self.cache[:, :, : self.keys, 1:-1]
        return self.q, k, v

    def run(self) -> Tensor:
        own, (q, k, v) = torch.tensor(self.samples), self.operands
        tail = (self.seen[:, :, self.front :].contiguous(), own, self.heads, self.scale)
        if not self.front:
            return OPS.cached_attention(q, k, v, *tail)
        first, rest = slice(self.front), slice(self.front, None)
        packed = OPS.pack_keys(k[:, first], v[:, first], self.heads)
        return OPS.cached_attention(q, k[:, rest], v[:, rest], *tail, packed, self.front)

    def pack(self, count: int) -> None:
        """The first ``count`` keys come packed, and every row sees them."""
        self.front = count
        self.seen[:, :, :count] = True

    def formula(self, dtype: torch.dtype) -> Tensor:
        q, k, v = (
            t.to(dtype).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for t in (self.operands[0], *(t[self.samples] for t in self.operands[1:]))
        )
        scores = (q @ k.mT * self.scale).masked_fill(~self.seen[:, None], -math.inf)
        return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).flatten(2)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
