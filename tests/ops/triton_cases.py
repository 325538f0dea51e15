"""What every test of the Triton kernels needs: the interpreter on a CPU, the device itself on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
from cuda_cases import device_for
from torch import Tensor

from beit3_fast.ops import triton_kernels

pytest.importorskip("triton", reason="triton is not installed")

T = TypeVar("T")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
device_for(triton_kernels.why_unavailable("cuda"))  # raises where the interpreter will not do
TARGETS = [("triton", "fp32"), ("triton", "fp16")]
if DEVICE == "cuda":
    TARGETS.append(("triton", "bf16"))  # the interpreter multiplies bf16 wrongly


def _numbers_of_one_element() -> None:
    """Triton 3.6 turns arrays of one element into loop bounds by int(), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if DEVICE == "cpu":
    _numbers_of_one_element()
    triton_kernels.reset()
_reason = triton_kernels.why_unavailable(DEVICE)
if _reason is not None:
    pytest.skip(f"triton: it {_reason}", allow_module_level=True)


def one_target_each(cases: Sequence[T]) -> list[T]:
    """Of cases that name each shape for every target in turn, one for each shape: the targets alternate."""
    width = len(TARGETS)
    return [case for place, case in enumerate(cases) if place // width % width == place % width]


def moments(x: Tensor, width: int) -> Tensor:
    """fp64 [M, T, 2]: mean and sum of squared deviations of the parts of every row."""
    parts = [part.double() for part in x.split(width, dim=1)]
    means = [part.mean(1, keepdim=True) for part in parts]
    squares = [(p - m).square().sum(1) for p, m in zip(parts, means, strict=True)]
    return torch.stack([torch.cat(means, 1), torch.stack(squares, 1)], dim=2)
