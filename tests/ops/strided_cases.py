"""Calls of the Triton kernels on operands in memory of their own widths, and the check of results and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from op_cases import DTYPES, assert_near
from torch import Tensor
from triton_cases import DEVICE

from beit3_fast.parity import op_parity


def spread(t: Tensor, more: int) -> Tensor:
    """The same rows as a view of a tensor that is wider by ``more`` columns of NaN."""
    wide = t.new_full((t.shape[0], t.shape[1] + more), torch.nan)
    own = wide[:, more // 2 : more // 2 + t.shape[1]]
    return own.copy_(t)


def rounded(dtype: str, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(
        DTYPES[dtype]
    )


def results(call: Callable[..., Tensor], operands: list[Tensor], seed: Tensor) -> list[Tensor]:
    """The result, and the gradients of the operands; the upstream gradient is a view as well."""
    leaves = [t.detach().requires_grad_() for t in operands]
    y = call(*leaves)
    beside = y.new_zeros(len(y), 5)
    seeds = torch.cat([seed.to(y), beside], 1)
    gradients = torch.autograd.grad(torch.cat([y, beside], 1), leaves, seeds)
    return [t.detach().cpu() for t in (y, *gradients)]


def compare(call: Callable[..., Tensor], operands: list[Tensor], seed: Tensor) -> None:
    """``call(impl, *operands)`` by the parity rule; each operand on the device has a stride of its own."""
    moved = [
        spread(t.to(DEVICE), 3 + 8 * place) if t.dim() == 2 else t.to(DEVICE)
        for place, t in enumerate(operands)
    ]
    widths = [t.stride(0) for t in moved if t.dim() == 2]
    assert len(set(widths)) == len(widths)
    ours = results(lambda *own: call("triton", *own), moved, seed)
    plain = results(lambda *own: call("composite", *own), operands, seed)
    truth = results(
        lambda *own: call("reference", *own), [t.double() for t in operands], seed.double()
    )
    for place, own in enumerate(zip(ours, plain, truth, strict=True)):
        assert_near(op_parity(*own, gradient=place > 0), ("y", *range(len(operands)))[place])
