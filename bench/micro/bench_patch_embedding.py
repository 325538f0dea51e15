"""patch_embedding alone: python -m pytest bench/micro/bench_patch_embedding.py

Images whole and with 40 % of their patches masked, and the same by PyTorch's convolution, as torchscale has it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.ops.patch_embedding import patch_embedding

from .conftest import Timed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Images, their pixels each way, C.
BATCHES = {
    "base": (8, 224, 768),
    "one image": (1, 224, 768),
    "480 pixels": (8, 480, 768),
    "large": (8, 224, 1024),
}


@pytest.mark.parametrize("impl", ["auto", "cpu", "composite", "plain PyTorch"])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embedding(timed: Timed, dtype: str, batch: str, share: float, impl: str) -> None:
    gen = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=gen)).to(DTYPES[dtype])

    count, pixels, width = BATCHES[batch]
    patches = (pixels // 16) ** 2
    images = random(count, 3, pixels, pixels)
    weight = random(width, 3, 16, 16, scale=768**-0.5)
    bias, cls_token, mask_token = random(width), random(width), random(width)
    positions = random(1 + patches, width)
    masked = torch.rand(count, patches, generator=gen) < share if share else None

    def by_convolution() -> Tensor:
        x = F.conv2d(images, weight, bias, stride=16).flatten(2).transpose(1, 2)
        if masked is not None:
            x = torch.where(masked[..., None], mask_token, x)
        return torch.cat([cls_token.expand(count, 1, -1), x], dim=1) + positions

    def ours() -> Tensor:
        own = (images, weight, bias, cls_token, mask_token, positions, masked)
        return patch_embedding(*own, impl=impl)

    flops = 2.0 * count * patches * 768 * width
    group = f"patch_embedding {batch} {dtype}, {share:.0%} masked"
    timed(group, flops, by_convolution if impl == "plain PyTorch" else ours)
