"""Inputs for the op tests: hard values, hard layouts, and what plain PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import Norm, library
from beit3_fast.parity import Parity

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = [
    ("reference", "fp32"),
    ("reference", "bf16"),
    ("reference", "fp16"),
    ("composite", "fp32"),
    ("composite", "bf16"),
    ("composite", "fp16"),
    ("cpu", "fp32"),
    ("cpu", "bf16"),
]
Names = list[tuple[str, int]]
IMPLS = ("reference", "composite", "cpu")


def need(impl: str) -> None:
    """Skip with the reason where an implementation cannot run."""
    if impl == "cpu" and not library.available():
        pytest.skip(f"cpu: the library {library.why_unavailable()}")


class Rotation:
    """Deals the values of each factor from a shuffled deck of its own, one deck for each target.

    All values of a factor have come once before one comes again, and no two factors go in step: pairs are met
    soon without the product of all factors.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.decks: dict[Any, list[Any]] = {}

    def next(self, target: Any, factors: dict[str, Sequence[Any]]) -> dict[str, Any]:
        return {name: self.deal((target, name), values) for name, values in factors.items()}

    def deal(self, deck: Any, values: Sequence[Any]) -> Any:
        if not self.decks.get(deck):
            order = torch.randperm(len(values), generator=self.generator).tolist()
            self.decks[deck] = [values[i] for i in order]
        return self.decks[deck].pop()


def values(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """fp32 [rows, columns] of one kind; never only N(0, 1)."""
    x = torch.randn(rows, columns, generator=generator)
    if kind == "normal":
        return x
    if kind == "small":
        return x * 1e-3
    if kind == "large":
        return x * 100.0
    if kind == "mean":
        return x + 50.0
    if kind == "outliers":
        for column in range(0, columns, max(columns // 3, 1)):
            x[:, column] *= 10.0 ** (3 + column % 2)
        return x
    if kind == "constant":
        # Exact in every dtype, so that every mean is too: what is left is the variance of zero.
        constant = torch.randint(-64, 64, (rows, 1), generator=generator) / 8.0
        return constant.expand(rows, columns).clone()
    raise ValueError(kind)


def lay(x: Tensor, layout: str) -> Tensor:
    """The same values as ``x`` [M, C] in other memory."""
    rows, columns = x.shape
    if layout == "contiguous":
        return x
    if layout == "sliced":
        wide = torch.full((rows, columns + 13), float("nan"), dtype=x.dtype)
        wide[:, 5 : 5 + columns] = x
        return wide[:, 5 : 5 + columns]
    if layout == "every second row":
        tall = torch.full((2 * rows, columns), float("nan"), dtype=x.dtype)
        tall[::2] = x
        return tall[::2]
    if layout == "transposed":
        return x.T.contiguous().T
    raise ValueError(layout)


def assert_near(parity: Parity, what: object) -> None:
    """Fail with the figures where the parity rule is broken."""
    assert parity.passed, f"{what}: {parity.reason}"


# expert_linear

SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "one row": ((0, 1), 64, 64),
    "no rows": ((0, 0), 64, 32),
    "no rows, two experts": ((0, 0, 0), 24, 40),
    "first expert empty": ((0, 0, 7), 64, 96),
    "last expert empty": ((0, 7, 7), 96, 64),
    "middle expert empty": ((0, 5, 5, 12), 48, 48),
    "three experts": ((0, 3, 10, 31), 72, 40),
    "primes": ((0, 59, 113), 61, 53),
    "odd": ((0, 5, 12), 35, 33),
    "197 and 19": ((0, 197, 216), 64, 192),
    "577": ((0, 577), 32, 48),
    "64 and 197": ((0, 64, 261), 88, 88),
    "one feature": ((0, 3, 5), 1, 1),
    "deep": ((0, 2, 9), 770, 24),
    "as deep as fc2": ((0, 5, 9), 3072, 16),
    "wide": ((0, 4, 9), 24, 771),
    "tile edges": ((0, 15, 31, 64), 100, 50),
}


class LinearCase(NamedTuple):
    """One call of expert_linear."""

    impl: str
    dtype: str
    shape: str
    inputs: str
    layout: str
    bias: bool
    norm: bool
    gelu: bool
    residual: bool
    rows: bool
    stacked: bool
    grad_mode: bool

    @property
    def name(self) -> str:
        flags = ("bias", "norm", "gelu", "residual", "rows", "stacked", "grad_mode")
        on = "+".join(flag for flag in flags if getattr(self, flag))
        return f"{self.impl}-{self.dtype}-{self.shape}-{self.inputs}-{self.layout}-{on}"


LINEAR_FACTORS: dict[str, Sequence[Any]] = {
    "inputs": ("normal", "small", "large", "mean", "outliers", "constant"),
    "layout": ("contiguous", "sliced", "every second row", "transposed"),
    "bias": (True, False),
    "norm": (True, False),
    "gelu": (True, False),
    "residual": (True, False),
    "rows": (True, False),
    "stacked": (True, False),
    "grad_mode": (True, False),
}


def linear_cases(repeats: int, targets: Sequence[tuple[str, str]] = TARGETS) -> list[LinearCase]:
    """``repeats`` cases for each shape and target, the other factors in rotation."""
    rotation = Rotation()
    return [
        LinearCase(impl, dtype, shape, **rotation.next((impl, dtype), LINEAR_FACTORS))
        for _, shape, (impl, dtype) in product(range(repeats), SHAPES, targets)
    ]


class LinearOperands(NamedTuple):
    """Tensors of one call, in the dtype of the case."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor] | None
    norm: Norm | None
    residual: Tensor | None
    rows: Tensor | None
    bounds: tuple[int, ...]

    def leaves(self) -> dict[str, Tensor]:
        """Every floating-point tensor by name."""
        named = {"x": self.x}
        named |= {f"weights[{e}]": w for e, w in enumerate(self.weights)}
        named |= {f"biases[{e}]": b for e, b in enumerate(self.biases or ())}
        if self.norm is not None:
            named |= {f"norm.weights[{e}]": g for e, g in enumerate(self.norm.weights)}
            named |= {f"norm.biases[{e}]": b for e, b in enumerate(self.norm.biases)}
        if self.residual is not None:
            named["residual"] = self.residual
        return named

    def map(self, change: Any) -> LinearOperands:
        """The same call with every floating-point tensor changed."""
        return self._replace(
            x=change(self.x),
            weights=[change(w) for w in self.weights],
            biases=None if self.biases is None else [change(b) for b in self.biases],
            norm=None
            if self.norm is None
            else Norm(
                [change(g) for g in self.norm.weights],
                [change(b) for b in self.norm.biases],
                self.norm.eps,
            ),
            residual=None if self.residual is None else change(self.residual),
        )


def linear_operands(case: LinearCase) -> LinearOperands:
    """Rounded operands; the same ones for the same case."""
    dtype = DTYPES[case.dtype]
    bounds, inner, out = SHAPES[case.shape]
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    count, experts = bounds[-1], len(bounds) - 1
    total, rows = count, None
    if case.rows:
        total = count + 3
        rows = torch.randperm(total, generator=generator)[:count]

    def rounded(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale + shift).to(dtype)

    x = values(case.inputs, total, inner, generator).to(dtype)
    norm = None
    if case.norm:
        gammas = [rounded(inner, scale=0.5, shift=1.0) for _ in range(experts)]
        eps = (1e-5, 1e-2)[generator.initial_seed() % 2]
        norm = Norm(gammas, [rounded(inner, scale=0.5) for _ in range(experts)], eps)
    return LinearOperands(
        x=lay(x, case.layout),
        weights=[rounded(out, inner, scale=inner**-0.5) for _ in range(experts)],
        biases=[rounded(out) for _ in range(experts)] if case.bias else None,
        norm=norm,
        residual=lay(rounded(total, out), case.layout) if case.residual else None,
        rows=rows,
        bounds=bounds,
    )


def stacks(parts: list[Tensor], stacked: bool) -> list[Any]:
    """Each weight or bias whole, or as a tuple of pieces along O as query, key and value are."""
    return [tuple(part.tensor_split(3)) if stacked else part for part in parts]


def plain_linear(operands: LinearOperands, gelu: bool) -> Tensor:
    """expert_linear as a few lines of ordinary PyTorch in the operands' own dtype."""
    x, weights, biases, norm, residual, rows, bounds = operands
    index = torch.arange(x.shape[0]) if rows is None else rows
    y = x.new_zeros(x.shape[0], weights[0].shape[0])
    for expert, weight in enumerate(weights):
        own = index[bounds[expert] : bounds[expert + 1]]
        h = x[own]
        if norm is not None:
            gamma, beta = norm.weights[expert], norm.biases[expert]
            h = F.layer_norm(h, (x.shape[1],), gamma, beta, norm.eps)
        h = F.linear(h, weight, None if biases is None else biases[expert])
        if gelu:
            h = F.gelu(h)
        if residual is not None:
            h = residual[own] + h
        y = y.index_copy(0, own, h)
    return y


# shared_attention

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one vision token": ((1,), (0,)),
    "one text token": ((0,), (1,)),
    "one of each": ((1,), (1,)),
    "no samples": ((), ()),
    "an empty sample": ((5, 0, 4), (2, 0, 0)),
    "images": ((5, 5, 5), (0, 0, 0)),
    "images of two sizes": ((5, 10, 5), (0, 0, 0)),
    "197": ((197,), (0,)),
    "577 and 23": ((577,), (23,)),
    "pairs": ((5, 5, 5), (3, 7, 1)),
    "mixed": ((5, 0, 5, 5, 0), (3, 4, 0, 6, 1)),
    "texts": ((0, 0, 0, 0), (1, 9, 32, 5)),
    "primes": ((59,), (113,)),
    "tile edges": ((16, 15, 31, 33), (1, 1, 1, 0)),
}
HEADS = ((1, 64), (2, 88), (3, 7), (4, 16), (2, 13), (1, 1))
MASKS = ("bidirectional", "seq2seq", "causal")
PEAKS = {"peaked": 4.0, "saturated": 100.0}
SELECTIONS = ("all", "first none", "first first", "none all", "all none", "none some")


class AttentionCase(NamedTuple):
    """One call of shared_attention."""

    impl: str
    dtype: str
    tokens: str
    heads: tuple[int, int]
    mask: str
    selection: str
    inputs: str
    layout: str
    grad_mode: bool

    @property
    def name(self) -> str:
        width = f"{self.heads[0]}x{self.heads[1]}"
        parts = (self.tokens, width, self.mask, self.selection, self.inputs, self.layout)
        return "-".join((self.impl, self.dtype, *parts, "grad" if self.grad_mode else "no_grad"))


ATTENTION_FACTORS: dict[str, Sequence[Any]] = {
    "heads": HEADS,
    "mask": (*MASKS, "tensor [N, N]", "tensor [B, N, N]"),
    "selection": SELECTIONS,
    "inputs": ("normal", "saturated", "mean", "outliers", "small"),
    "layout": ("fused", "contiguous", "transposed"),
    "grad_mode": (True, False),
}


def attention_cases(
    repeats: int, targets: Sequence[tuple[str, str]] = TARGETS, inputs: Sequence[str] = ()
) -> list[AttentionCase]:
    """``repeats`` cases for each layout and target; the cpu implementation has no mask tensors."""
    rotation = Rotation()
    cases = []
    for _, tokens, (impl, dtype) in product(range(repeats), LAYOUTS, targets):
        factors = dict(ATTENTION_FACTORS)
        if inputs:
            factors["inputs"] = inputs
        if impl == "cpu":
            factors["mask"] = MASKS
        cases.append(AttentionCase(impl, dtype, tokens, **rotation.next((impl, dtype), factors)))
    return cases


class AttentionOperands(NamedTuple):
    """One call: rows in the dtype of the case, the layouts of keys and queries, and the mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    queries: TokenLayout | None
    mask: str | Tensor


def attention_operands(case: AttentionCase) -> AttentionOperands:
    """Rounded operands; the same ones for the same case."""
    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    layout = TokenLayout.from_lengths(*LAYOUTS[case.tokens])
    heads, head_dim = case.heads
    width, count = heads * head_dim, layout.num_rows
    kind = "normal" if case.inputs in PEAKS else case.inputs
    q, k, v = (values(kind, count, width, generator) for _ in range(3))
    if case.inputs == "mean":
        q = (
            q - 50.0
        )  # on both sides of a score it would only hide the scores under their own rounding
    q = q * PEAKS.get(case.inputs, 1.0)
    queries = None
    if case.selection != "all":
        vision, text = case.selection.split()
        chosen: Any = text
        if text == "some":
            chosen = torch.rand(layout.num_text_rows, generator=generator) < 0.5
        selection = layout.select(vision, chosen)  # type: ignore[arg-type]
        q, queries = q[selection.rows], selection.layout
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if case.layout == "fused":
        k, v = torch.cat([k, v], dim=1).chunk(2, dim=1)
        q = lay(q, "sliced")
    elif case.layout == "transposed":
        q, k, v = (lay(t, "transposed") for t in (q, k, v))
    mask: str | Tensor = case.mask
    if case.mask.startswith("tensor"):
        tokens = max(layout.vision_lengths, default=0) + max(layout.text_lengths, default=0)
        batch = (layout.batch_size,) if "B" in case.mask else ()
        mask = torch.rand(*batch, tokens, tokens, generator=generator) < 0.6
        mask[..., ::5, :] = False  # queries that see nothing
    return AttentionOperands(q, k, v, layout, queries, mask)


def visible_keys(
    mask: str | Tensor, sample: int, queries: Names, keys: Names, first_text: int
) -> Tensor:
    """bool [Nq, Nk]: who may look at whom in a caller's sample, queries and keys named (modality, place)."""
    (text_query, query), (text_key, key) = (
        (
            torch.tensor([kind == "text" for kind, _ in names], dtype=torch.bool),
            torch.tensor([place for _, place in names], dtype=torch.int64),
        )
        for names in (queries, keys)
    )
    if isinstance(mask, Tensor):
        own = mask if mask.dim() == 2 else mask[sample]
        return own[query + text_query * first_text][:, key + text_key * first_text]
    if mask == "bidirectional":
        return torch.ones(len(queries), len(keys), dtype=torch.bool)
    earlier = key[None, :] <= query[:, None]
    of_text = ~text_key[None, :] | earlier
    of_vision = ~text_key[None, :] & (earlier | (mask == "seq2seq"))
    return torch.where(text_query[:, None], of_text, of_vision)


def in_turn(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, backwards: bool = False) -> Tensor:
    """Attention whose scores add up feature after feature, as the inner loop of a matrix product does."""
    scores = q.new_zeros(*q.shape[:-1], k.shape[-2])
    features = range(q.shape[-1])
    for feature in reversed(features) if backwards else features:
        scores = torch.addcmul(scores, q[..., feature, None], k[..., None, :, feature])
    scores = (scores * q.shape[-1] ** -0.5).masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ v


def plain_attention(operands: AttentionOperands, heads: int, truth: Tensor | None = None) -> Tensor:
    """shared_attention sample by sample with PyTorch's own attention, in the operands' own dtype.

    With a ``truth`` and in fp32: the farthest from it of three orders of summation, element by element. A
    saturated softmax turns on the last bit of a score, and one order may have it right by luck.
    """
    plain = _plain_attention(operands, heads, F.scaled_dot_product_attention)
    if truth is None or plain.dtype != torch.float32:
        return plain
    others = [
        _plain_attention(operands, heads, partial(in_turn, backwards=b)) for b in (False, True)
    ]
    orders = torch.stack([plain, *others])
    farthest = (orders.double() - truth).abs().nan_to_num(0.0).argmax(0, keepdim=True)
    return orders.gather(0, farthest)[0]


def _plain_attention(
    operands: AttentionOperands, heads: int, attention: Callable[..., Tensor]
) -> Tensor:
    q, k, v, layout, queries, mask = operands
    selected = queries is not None
    queries = layout if queries is None else queries
    first_text = max(layout.vision_lengths, default=0)
    out = q.new_zeros(q.shape)
    for sample in range(layout.batch_size):
        key_rows, key_names = rows_and_names(layout, sample)
        query_rows, query_names = rows_and_names(queries, sample)
        if selected:
            assert queries.positions is not None
            query_names = [
                (kind, int(queries.positions[row]))
                for row, (kind, _) in zip(query_rows, query_names, strict=True)
            ]
        if not query_rows or not key_rows:
            continue
        visible = visible_keys(mask, layout.order[sample], query_names, key_names, first_text)
        own_q, own_k, own_v = (
            t[rows].unflatten(1, (heads, -1)).transpose(0, 1)[None]
            for t, rows in ((q, query_rows), (k, key_rows), (v, key_rows))
        )
        o = attention(own_q, own_k, own_v, attn_mask=visible)
        o = torch.where(visible.any(1)[:, None], o[0].transpose(0, 1).flatten(1), 0.0)
        out = out.index_copy(0, torch.tensor(query_rows), o)
    return out


def rows_and_names(layout: TokenLayout, sample: int) -> tuple[list[int], Names]:
    """Packed rows of a packed sample, vision first, and (modality, place) of each."""
    vision_start = sum(layout.vision_lengths[:sample])
    text_start = sum(layout.vision_lengths) + sum(layout.text_lengths[:sample])
    vision, text = layout.vision_lengths[sample], layout.text_lengths[sample]
    rows = [*range(vision_start, vision_start + vision), *range(text_start, text_start + text)]
    names = [("vision", i) for i in range(vision)] + [("text", i) for i in range(text)]
    return rows, names
