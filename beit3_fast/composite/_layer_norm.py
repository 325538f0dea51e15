"""LayerNorm whose parameters get right gradients from many rows, too.

On a CPU PyTorch adds up the gradients of a LayerNorm's weight and bias in the dtype of the rows. In bfloat16 a sum stands
still once it is 256 times as large as what is added: off by a quarter at 2,000 rows, by most of it at 10,000.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.derived import is_transformed, needs_grad


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.layer_norm over the last dimension of x [M, D]; differentiable once where sums have to be mended, else as ever."""
    plainly = torch.compiler.is_compiling() or is_transformed()
    if is_narrow(x) and needs_grad(weight, bias) and not plainly:
        y: Tensor = _LayerNorm.apply(x, weight, bias, eps)
        return y
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def is_narrow(x: Tensor) -> bool:
    """Whether PyTorch would add up rows of x in 16 bits."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def layer_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [M, D], weight and bias [D], given that of the result [M, D] and what native_layer_norm found."""
    shape = list(x.shape[-1:])
    plain = not is_narrow(x)
    dx, *sums = torch.ops.aten.native_layer_norm_backward(
        grad, x, shape, mean, rstd, weight, bias, [True, plain, plain]
    )
    dweight, dbias = sums if plain else parameter_gradients(grad, x, weight, bias, eps)
    return dx, dweight, dbias


def parameter_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, given that of the result [M, D]; sums in fp32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    dweight = normed.mul_(grad).sum(0)
    return dweight.to(weight.dtype), grad.sum(0, dtype=torch.float32).to(bias.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.ops.aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, rstd, weight, bias, [True, False, False]
        )
        return dx, *parameter_gradients(grad, x, weight, bias, ctx.eps), None
