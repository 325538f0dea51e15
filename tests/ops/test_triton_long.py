"""The Triton kernels at the lengths of large images and the classes of the models' heads, with the shipped tiles."""

from __future__ import annotations

import pytest
import torch
from strided_cases import compare, rounded
from torch import Tensor
from triton_cases import DEVICE

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import masked_linear_cross_entropy, shared_attention

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("lengths", "mask", "width", "dtype"),
    [
        (((901,), (0,)), "bidirectional", 64, "fp16"),
        (((901, 0), (8, 5)), "seq2seq", 88, "fp32"),
        (((2305,), (0,)), "bidirectional", 88, "fp16"),
        (((2305,), (12,)), "causal", 64, "fp16"),
    ],
)
def test_attention(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], mask: str, width: int, dtype: str
) -> None:
    layouts = {own: TokenLayout.from_lengths(*lengths, own) for own in ("cpu", DEVICE)}
    count = layouts["cpu"].num_rows

    def call(impl: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = layouts[q.device.type]
        return shared_attention(q, k, v, layout, num_heads=1, mask=mask, impl=impl)

    q, k, v, seed = (rounded(dtype, count + i, width)[:count] for i in range(4))
    compare(call, [2 * q, k, v + 1], seed)


@pytest.mark.parametrize(("classes", "dtype"), [(64010, "fp32"), (8192, "fp16")])
def test_head(classes: int, dtype: str) -> None:
    """Of 64,010 classes in fp16 some weights have gradients below its normal numbers, whose direction is rounding."""
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:37]
    targets = torch.arange(37) * (classes // 37)
    targets[-1] = classes - 1

    def call(impl: str, *operands: Tensor) -> Tensor:
        index = (own.to(operands[0].device) for own in (rows, targets))
        return masked_linear_cross_entropy(*operands, *index, reduction="none", impl=impl)[:, None]

    operands = [rounded(dtype, *shape) for shape in ((60, 48), (classes, 48), (classes,))]
    compare(call, operands, rounded(dtype, 37, 1))
