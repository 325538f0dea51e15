"""A plain vision transformer on the two ops, by the parameter names of BEiT v2's: encoder and decoder of its tokenizer.

Pre-norm blocks without inner norms, a class token, absolute positions, LayerNorm with epsilon 1e-6, queries and values with
a bias and keys without; the last norm is called fc_norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from beit3_fast.errors import ShapeError
from beit3_fast.layout import TokenLayout
from beit3_fast.model.stack import Stack, computed
from beit3_fast.model.work import Product, Work
from beit3_fast.ops import Norm, expert_linear, patch_embedding, shared_attention

_EPS = 1e-6
_STD = 0.02


class _PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)


class _Attention(nn.Module):
    k_bias: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("k_bias", torch.zeros(embed_dim), persistent=False)
        self.proj = nn.Linear(embed_dim, embed_dim)


class _MLP(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)


class _Block(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=_EPS)
        self.attn = _Attention(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim, eps=_EPS)
        self.mlp = _MLP(embed_dim)

    def forward(
        self, x: Tensor, layout: TokenLayout, num_heads: int, impl: str, recompute: str = "none"
    ) -> Tensor:
        given = (x, layout, num_heads, impl, recompute == "ffn")
        return computed(self._whole, *given, again=recompute == "layer")

    def _whole(
        self, x: Tensor, layout: TokenLayout, num_heads: int, impl: str, recompute_ffn: bool
    ) -> Tensor:
        x = self._attend(x, layout, num_heads, impl)
        return computed(self._feed_forward, x, impl, again=recompute_ffn)

    def _attend(self, x: Tensor, layout: TokenLayout, num_heads: int, impl: str) -> Tensor:
        attn = self.attn
        # FSDP2 casts parameters, but no buffers.
        k_bias = attn.k_bias.to(attn.q_bias.dtype)
        biases = (attn.q_bias, k_bias, attn.v_bias)
        qkv = _linear(x, attn.qkv.weight, biases, norm=self.norm1, impl=impl)
        q, k, v = qkv.chunk(3, dim=1)
        o = shared_attention(q, k, v, layout, num_heads=num_heads, impl=impl)
        return _linear(o, attn.proj.weight, attn.proj.bias, residual=x, impl=impl)

    def _feed_forward(self, x: Tensor, impl: str) -> Tensor:
        mlp = self.mlp
        h = _linear(x, mlp.fc1.weight, mlp.fc1.bias, norm=self.norm2, activation="gelu", impl=impl)
        return _linear(h, mlp.fc2.weight, mlp.fc2.bias, residual=x, impl=impl)


class VisionTransformer(Stack):
    """images [B, in_chans, H, W] -> rows of their patches [B, patches, embed_dim]."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        num_heads: int,
        depth: int,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.img_size, self.num_heads, self.impl = img_size, num_heads, impl
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        patches = (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.patch_embed = _PatchEmbed(in_chans, embed_dim, patch_size)
        self.blocks = nn.ModuleList([_Block(embed_dim) for _ in range(depth)])
        self.fc_norm = nn.LayerNorm(embed_dim, eps=_EPS)
        self._init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """Raises ShapeError for images that are not of the size of the positions."""
        if images.shape[2:] != (self.img_size, self.img_size):
            raise ShapeError(
                f"images must be [B, C, {self.img_size}, {self.img_size}], got {list(images.shape)}; resize them"
            )
        token, proj = self.cls_token[0, 0], self.patch_embed.proj
        # No patch is masked, so what would stand for one is not read.
        embedded = patch_embedding(
            images, proj.weight, proj.bias, token, token, self.pos_embed[0], impl=self.impl
        )
        batch, tokens, width = embedded.shape
        layout = TokenLayout.from_lengths([tokens] * batch, [0] * batch, images.device)
        x = embedded.flatten(0, 1)
        recompute = self.recompute if self.training else ()
        for depth, block in enumerate(self.blocks):
            again = recompute[depth] if recompute else "none"
            x = block(x, layout, self.num_heads, self.impl, again)
        return self.fc_norm(x.view(batch, tokens, width)[:, 1:])

    def in_order(self) -> nn.ModuleList:
        """See Stack."""
        return self.blocks

    def work(self, images: int) -> tuple[Work, Work]:
        """What a forward on so many images needs: the projection of their patches, and the blocks."""
        _, in_chans, side, _ = self.patch_embed.proj.weight.shape
        tokens, width = self.pos_embed.shape[1:]
        rows, depth = images * tokens, len(self.blocks)
        patches = Product(images * (tokens - 1), in_chans * side**2, width)
        products = (
            Product(rows, width, 3 * width, depth),
            Product(rows, width, width, depth, residual=True),
            Product(rows, width, 4 * width, depth),
            Product(rows, 4 * width, width, depth, residual=True),
        )
        attention, values = 4.0 * rows * tokens * width * depth, 4.0 * rows * width * depth
        return Work((patches,)), Work(products, attention, values)

    def _init_weights(self) -> None:
        """BEiT's: a normal of 0.02, and the last product of a branch the smaller, the higher its block."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=_STD)
        blocks = [block for block in self.blocks if isinstance(block, _Block)]
        with torch.no_grad():
            for number, block in enumerate(blocks, 1):
                for linear in (block.attn.proj, block.mlp.fc2):
                    linear.weight.div_(math.sqrt(2 * number))


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | tuple[Tensor, ...],
    *,
    norm: nn.LayerNorm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    impl: str,
) -> Tensor:
    return expert_linear(
        x,
        [weight],
        [bias],
        bounds=(0, len(x)),
        norm=None if norm is None else Norm([norm.weight], [norm.bias], norm.eps),
        activation=activation,
        residual=residual,
        impl=impl,
    )
