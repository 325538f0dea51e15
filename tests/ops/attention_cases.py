"""Inputs for the tests of shared_attention, and what plain PyTorch makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from op_cases import DTYPES, TARGETS, Rotation, lay, values
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import shared_attention

Names = list[tuple[str, int]]
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
    """``repeats`` cases for each layout and target."""
    rotation = Rotation()
    cases = []
    for _, tokens, (impl, dtype) in product(range(repeats), LAYOUTS, targets):
        factors = dict(ATTENTION_FACTORS)
        if inputs:
            factors["inputs"] = inputs
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

    def on(self, device: str) -> AttentionOperands:
        """The same call on a device."""

        def moved(layout: TokenLayout) -> TokenLayout:
            places = None if layout.positions is None else layout.positions.to(device)
            return replace(layout, device=torch.device(device), positions=places)

        q, k, v = (t.to(device) for t in self[:3])
        queries = None if self.queries is None else moved(self.queries)
        return AttentionOperands(q, k, v, moved(self.layout), queries, self.mask)


def attention_operands(
    case: AttentionCase,
    layouts: Mapping[str, tuple[Sequence[int], Sequence[int]]] = LAYOUTS,
    draw: int = 0,
) -> AttentionOperands:
    """Rounded operands; the same ones for the same draw of a case, which names one of the layouts."""
    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)) + draw)
    layout = TokenLayout.from_lengths(*layouts[case.tokens])
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
    return farthest([plain, *others], truth)


def farthest(results: Sequence[Tensor], truth: Tensor) -> Tensor:
    """Of several results the one that is farthest from the truth, element by element."""
    stacked = torch.stack([*results])
    place = (stacked.double() - truth).abs().nan_to_num(0.0).argmax(0, keepdim=True)
    return stacked.gather(0, place)[0]


class _FromWhatIsSaved(torch.autograd.Function):
    """Attention in fp64 whose backward pass has, as FlashAttention's, no more than the output and a log-sum-exp.

    The weights come from scores and a log-sum-exp in fp32 (both in base 2), the sums of P dP from the rounded output.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        scores = (q.double() @ k.double().mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~attn_mask, float("-inf"))
        out = (scores.softmax(-1).nan_to_num(0.0) @ v.double()).to(q.dtype)
        log2_scores = (scores / math.log(2)).float()
        lse = (scores.logsumexp(-1, keepdim=True) / math.log(2)).float()
        ctx.save_for_backward(q, k, v, (log2_scores - lse).exp2().nan_to_num(0.0), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, weights, out = (t.double() for t in ctx.saved_tensors)
        wide = grad.double()
        scores = weights * (wide @ v.mT - (wide * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        gradients = (scores @ k, scores.mT @ q, weights.mT @ wide)
        dq, dk, dv = (t.to(grad.dtype) for t in gradients)
        return dq, dk, dv, None


def from_what_is_saved(operands: AttentionOperands, heads: int) -> Tensor:
    """shared_attention whose gradients are as exact as what FlashAttention saves allows."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        return _FromWhatIsSaved.apply(q, k, v, attn_mask)

    return _plain_attention(operands, heads, attention)


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


def run_attention(operands: AttentionOperands, case: AttentionCase, impl: str) -> Tensor:
    """The op on the operands of a case."""
    q, k, v, layout, queries, mask = operands
    heads = case.heads[0]
    return shared_attention(q, k, v, layout, num_heads=heads, mask=mask, queries=queries, impl=impl)
