"""BEiT-3 written down once more, sample by sample and head by head in fp64, to hold the model against.

It knows a state dictionary with the official names and nothing of layouts, ops or padding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.config import BEiT3Config


class Sample(NamedTuple):
    """Rows of one sample, fp64: vision [Nv, C] and text [Nt, C] after every layer, embeddings first."""

    states: list[tuple[Tensor, Tensor]]
    vision: Tensor
    text: Tensor


class Formula:
    """The backbone as a function of one image [3, H, W] and one sentence [Nt]."""

    def __init__(self, state: dict[str, Tensor], config: BEiT3Config, prefix: str = "") -> None:
        self.state = {
            name.removeprefix(prefix): t.double()
            for name, t in state.items()
            if name.startswith(prefix)
        }
        self.config = config

    def __call__(
        self,
        image: Tensor | None,
        tokens: Tensor | None,
        mask: str = "bidirectional",
        masked: Tensor | None = None,
    ) -> Sample:
        width = self.config.embed_dim
        nothing = torch.zeros(0, width, dtype=torch.float64)
        vision = nothing if image is None else self.embed_image(image.double(), masked)
        text = nothing if tokens is None else self.embed_text(tokens)
        pair = len(vision) > 0 and len(text) > 0
        states = [(vision, text)]
        for layer in range(self.config.num_layers):
            vision, text = self.layer(f"encoder.layers.{layer}", vision, text, mask, pair)
            states.append((vision, text))
        if self.config.normalize_output:
            vision = self.norm("encoder.layer_norm", "A", vision)
            text = self.norm("encoder.layer_norm", "B", text)
        return Sample(states, vision, text)

    def embed_image(self, image: Tensor, masked: Tensor | None) -> Tensor:
        patch, table = self.config.patch_size, self.state["encoder.embed_positions.A.weight"]
        weight = self.state["vision_embed.proj.weight"]
        rows, columns = image.shape[1] // patch, image.shape[2] // patch
        embedded = [self.state["vision_embed.cls_token"][0, 0] + table[2]]
        grid = table[3:].unflatten(0, self.config.grid_size)
        if self.config.grid_size != (rows, columns):
            channels_first = grid.permute(2, 0, 1)[None]
            resized = F.interpolate(channels_first, size=(rows, columns), mode="bicubic")
            grid = resized[0].permute(1, 2, 0)
        for i in range(rows):
            for j in range(columns):
                window = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
                x = (weight * window).sum((1, 2, 3)) + self.state["vision_embed.proj.bias"]
                if masked is not None and masked[i * columns + j]:
                    x = self.state["vision_embed.mask_token"][0, 0]
                embedded.append(x + grid[i, j])
        return torch.stack(embedded)

    def embed_text(self, tokens: Tensor) -> Tensor:
        table = self.state["encoder.embed_positions.B.weight"]
        words = self.state["text_embed.weight"]
        rows = [words[int(token)] + table[place + 2] for place, token in enumerate(tokens)]
        return torch.stack(rows) if rows else words[:0]

    def get(self, name: str, expert: str, leaf: str) -> Tensor:
        """An expert's own tensor, or the one that all experts share."""
        own = f"{name}.{expert}.{leaf}"
        return self.state[own] if own in self.state else self.state[f"{name}.{leaf}"]

    def norm(self, name: str, expert: str, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = ((x - mean) ** 2).mean(-1, keepdim=True) + self.config.layer_norm_eps
        normed = (x - mean) / spread**0.5
        return normed * self.get(name, expert, "weight") + self.get(name, expert, "bias")

    def linear(self, name: str, expert: str, x: Tensor) -> Tensor:
        return x @ self.get(name, expert, "weight").T + self.get(name, expert, "bias")

    def layer(
        self, name: str, vision: Tensor, text: Tensor, mask: str, pair: bool
    ) -> tuple[Tensor, Tensor]:
        attention = f"{name}.self_attn"
        normed = [
            (self.norm(f"{name}.self_attn_layer_norm", expert, x), expert)
            for x, expert in ((vision, "A"), (text, "B"))
            if len(x)
        ]
        q, k, v = (
            torch.cat([self.linear(f"{attention}.{which}_proj", e, x) for x, e in normed])
            for which in "qkv"
        )
        joined = self.attend(q, k, v, len(vision), mask)
        out = []
        pieces = ((vision, "A", joined[: len(vision)]), (text, "B", joined[len(vision) :]))
        for x, expert, o in pieces:
            if not len(x):
                out.append(x)
                continue
            o = self.norm(f"{attention}.inner_attn_ln", expert, o)
            x = x + self.linear(f"{attention}.out_proj", expert, o)
            fused = pair and f"{name}.ffn.C.fc1.weight" in self.state
            out.append(x + self.feed_forward(name, "C" if fused else expert, x))
        return out[0], out[1]

    def feed_forward(self, name: str, expert: str, x: Tensor) -> Tensor:
        x = self.norm(f"{name}.final_layer_norm", expert, x)
        own = f"{name}.ffn.{expert}"
        h = x @ self.state[f"{own}.fc1.weight"].T + self.state[f"{own}.fc1.bias"]
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        h = self.norm(f"{own}.ffn_layernorm", "", h)
        return h @ self.state[f"{own}.fc2.weight"].T + self.state[f"{own}.fc2.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_vision: int, mask: str) -> Tensor:
        heads, width = self.config.num_heads, self.config.embed_dim
        size = width // heads
        out = torch.zeros_like(q)
        for row in range(len(q)):
            seen = [key for key in range(len(k)) if self.sees(row, key, num_vision, mask)]
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                scores = k[seen, own] @ q[row, own] / math.sqrt(size)
                weights = torch.exp(scores - scores.max())
                out[row, own] = (weights / weights.sum()) @ v[seen, own]
        return out

    def sees(self, row: int, key: int, num_vision: int, mask: str) -> bool:
        if mask == "bidirectional":
            return True
        if mask == "seq2seq" and row < num_vision:
            return key < num_vision
        return key <= row or key < num_vision <= row
