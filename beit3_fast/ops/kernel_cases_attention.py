"""The calls of ``kernel_cases`` for shared_attention: both forms of the forward pass, the gradients, padded batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.composite import shared_attention as composite_attention
from beit3_fast.composite.shared_attention import visible_places
from beit3_fast.float8 import Quantized, dequantize, quantize
from beit3_fast.layout import Pick, TokenLayout
from beit3_fast.ops import cuda_kernels, triton_kernels
from beit3_fast.ops.kernel_cases_float8 import moments, statistics_parity
from beit3_fast.padded_layout import PaddedLayout
from beit3_fast.parity import Parity, op_parity
from beit3_fast.reference import shared_attention as attention_formula


class _Case(NamedTuple):
    """Rows of the samples, heads, their width (both of the models), mask, the queries that are selected."""

    vision: tuple[int, ...]
    text: tuple[int, ...]
    heads: int
    width: int
    mask: str
    selected: tuple[Pick, Pick] | None = None
    # Texts keep the length of the longest, the rest is padding.
    padded: bool = False

    @property
    def name(self) -> str:
        """Mask, width of a head, lengths, and whether there is padding."""
        lengths = (self.vision, self.text)
        return f"{self.mask}, {self.width} wide, {lengths}{', padded' * self.padded}"

    def call(self, device: str) -> _Call:
        """The call on a device."""
        keys = self._padded(device) if self.padded else self._packed(device)
        queries = keys.select(*self.selected).layout if self.selected else keys
        return _Call(keys, queries, self.heads, self.width**-0.5, self.mask)

    def _packed(self, device: str) -> TokenLayout:
        return TokenLayout.from_lengths(self.vision, self.text, device)

    def _padded(self, device: str) -> TokenLayout:
        longest = max(self.text)
        valid = torch.arange(longest) < torch.tensor(self.text)[:, None]
        where = torch.device(device)
        return PaddedLayout(len(self.text), self.vision[0], longest, where, valid.to(where))


_CASES = (
    _Case((5, 0, 17), (3, 4, 0), 2, 64, "bidirectional"),
    _Case((33, 9), (13, 2), 1, 88, "seq2seq"),
    _Case((17,), (6,), 1, 64, "causal"),
    # Text queries behind a part of the image: their places are not those in the selection.
    _Case((6, 3), (5, 7), 1, 64, "seq2seq", ("first", "all")),
)
_ON_TRITON = (
    *_CASES,
    _Case((9, 9), (2, 7), 1, 64, "bidirectional", padded=True),
    _Case((6, 3), (5, 7), 1, 88, "seq2seq", ("first", "all")),
)
# fp32 has one class of tiles for all lengths, as the backward pass has.
_LONG = (
    _Case((270,), (10,), 1, 64, "causal"),
    _Case((270,), (10,), 1, 88, "seq2seq"),
    _Case((261, 261), (7, 3), 1, 64, "bidirectional", padded=True),
)
# CUDA kernels have up to 64, 128, 200 and 256 keys at once, else steps of 128, of which the last may have 32, 80 or all.
# More rows show more of the order in which they work.
_ON_CUDA = (
    *_CASES,
    _Case((90, 40), (10, 0), 2, 64, "seq2seq"),
    _Case((197,) * 5, (0, 3, 1) + (0,) * 2, 4, 64, "bidirectional"),
    _Case((197,) * 9, (0, 12, 3) * 3, 4, 64, "bidirectional"),
    _Case((400, 0, 130), (70, 70, 9), 3, 64, "causal"),
    _Case((577, 500), (0, 20), 2, 64, "bidirectional"),
    _Case((90, 40), (10, 0), 2, 88, "causal"),
    _Case((197,) * 3, (0, 3, 1), 2, 88, "bidirectional"),
    _Case((240, 130), (10, 0), 2, 88, "seq2seq"),
    _Case((577, 250), (23, 0), 2, 88, "seq2seq"),
)


def shared_attention(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The forward pass, and the row statistics that it leaves."""
    parities = {}
    cases = _ON_TRITON if dtype == torch.float32 else (*_ON_TRITON, *_LONG)
    for case, *results in _attention(dtype, device, cases):
        for place, name in enumerate(("o", "statistics")):
            own = (result[place] for result in results)
            parities[f"{name}, {case.name}"] = op_parity(*own)
    return parities


def shared_attention_backward(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The forward pass again, and the gradients of query, key and value."""
    parities = {}
    for case, *results in _attention(dtype, device, _ON_TRITON, with_grad=True):
        for place, name in enumerate(("o", "dq", "dk", "dv")):
            own = (result[place] for result in results)
            parities[f"{name}, {case.name}"] = op_parity(*own, gradient=place > 0)
    return parities


def cuda_shared_attention(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The forward pass and the row statistics that it leaves, in CUDA C++."""
    parities = {}
    for case, *own in _attention(dtype, device, _ON_CUDA, kernel=_on_cuda):
        o, left = own[0]
        parities[f"o, {case.name}"] = op_parity(*(each[0] for each in own))
        statistics = statistics_parity(left, o, o.shape[1] // left.shape[1])
        parities[f"statistics, {case.name}"] = statistics
    if dtype is torch.bfloat16 and cuda_kernels.attention_rounds(device):
        for case, *own in _attention(dtype, device, _ON_CUDA, kernel=_in_8_bits_on_cuda):
            (ours,), (plain, _), (truth, _) = own
            rounded = dequantize(quantize(plain))
            parities[f"in 8 bits, {case.name}"] = op_parity(ours, rounded, truth)
    return parities


class _Call(NamedTuple):
    """A call of an attention: its layouts are on the operands' device."""

    layout: TokenLayout
    queries: TokenLayout  # ``layout``, or that of a selection of its rows
    heads: int
    scale: float
    mask: str

    @property
    def valid(self) -> Tensor | None:
        """bool [B, Nt] where the batch is padded."""
        return self.layout.valid if isinstance(self.layout, PaddedLayout) else None

    def rows(self) -> tuple[Any, ...]:
        """The arguments of the GPU ops that say where rows lie."""
        keys, own = self.layout, self.queries
        selected = (None,) * 3 if own is keys else (own.cu_vision, own.cu_text, own.positions)
        return (keys.cu_vision, keys.cu_text, *selected)

    def numbers(self) -> tuple[Any, ...]:
        """Those behind them, but for the last."""
        return (self.layout.longest, self.queries.longest, self.heads, self.scale, self.mask)


def _on_triton(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, ...]:
    valid = None if call.valid is None else call.valid.flatten()
    own = (*call.rows(), valid, *call.numbers())
    o, _, left = triton_kernels.shared_attention(q, k, v, *own, True)
    return o, left


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, ...]:
    return cuda_kernels.shared_attention(q, k, v, *call.rows(), *call.numbers(), True)[:2]


def _in_8_bits_on_cuda(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, ...]:
    own = (*call.rows(), *call.numbers(), False, quantize(v).scales)
    _, _, *rounded = cuda_kernels.shared_attention(q, k, v, *own)
    return (dequantize(Quantized(*rounded)),)


def _plain(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, ...]:
    o = composite_attention.shared_attention(q, k, v, *call)
    return o, moments(o.detach(), q.shape[1] // call.heads)


def _formula(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, ...]:
    mask: str | Tensor = call.mask
    if isinstance(call.layout, PaddedLayout) and call.valid is not None:
        mask = visible_places(call.layout, call.layout, mask)
    o = attention_formula.shared_attention(
        q, k, v, call.layout, call.queries, call.heads, call.scale, mask
    )
    return o, moments(o.detach(), q.shape[1] // call.heads)


def _attention(
    dtype: torch.dtype,
    device: str,
    cases: tuple[_Case, ...],
    *,
    with_grad: bool = False,
    kernel: Callable[[Tensor, Tensor, Tensor, _Call], tuple[Tensor, ...]] = _on_triton,
) -> list[Any]:
    """The case, and for kernel, plain PyTorch and formula: o, and dq, dk, dv or the statistics of o."""
    generator, results = torch.Generator().manual_seed(0), []
    for case in cases:
        here, there = (case.call(where) for where in ("cpu", device))
        queries, keys = here.queries.num_rows, here.layout.num_rows
        q, k, v, seed = (
            torch.randn(rows, case.heads * case.width, generator=generator).to(dtype)
            for rows in (queries, keys, keys, queries)
        )
        operands = [2 * q, k, v + 1]  # peaked, as trained attention is
        wide = [t.double() for t in operands]
        moved = [t.to(device) for t in operands]
        found = [
            _with_gradients(kernel, moved, there, seed.to(device), with_grad),
            _with_gradients(_plain, operands, here, seed, with_grad),
            _with_gradients(_formula, wide, here, seed.double(), with_grad),
        ]
        results.append((case, *found))
    return results


def _with_gradients(
    attention: Callable[[Tensor, Tensor, Tensor, _Call], tuple[Tensor, ...]],
    operands: list[Tensor],
    call: _Call,
    seed: Tensor,
    with_grad: bool,
) -> list[Tensor]:
    q, k, v = (t.detach().requires_grad_(with_grad) for t in operands)
    o, *left = attention(q, k, v, call)
    others = torch.autograd.grad(o, (q, k, v), seed) if with_grad else left
    return [t.detach().cpu() for t in (o, *others)]
