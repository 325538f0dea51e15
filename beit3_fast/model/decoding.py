"""Decoding captions: keys and values of an image are computed once, all its captions are queries against them.

One cache a layer (``caption_cache.py``) holds, for every image, the image's keys and behind them those of every word that
any of its captions ever took, in the order of the steps. A caption is the set of words that it sees: choosing beams rearranges a small
bool table and no key. A step brings two rows a caption, the last word and a mask token that stands for the next; the
mask token's keys are overwritten by the next step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.model.batch import embed_padded
from beit3_fast.model.caption_cache import LayerCache
from beit3_fast.model.embedding import text_rows
from beit3_fast.model.encoder import attend, layer_norm, project
from beit3_fast.ops import (
    Measured,
    expert_linear,
    measured_shared_attention,
)

# Images are encoded as many at a time as give about this number of rows, see model/encoder.py.
_ROWS_AT_ONCE = 2048


class CaptionDecoder:
    """A ``generate.Decoder`` of a BEiT3ForCaptioning for images [S, 3, H, W] with ``width`` captions each.

    ``bos`` and ``mask`` are token ids, ``max_words`` bounds the words of a caption. Encodes the images at once.
    """

    def __init__(
        self, model: Any, images: Tensor, width: int, max_words: int, bos: int, mask: int
    ) -> None:
        self.model, self.encoder, self.impl = model, model.beit3.encoder, model.beit3.impl
        self.bos, self.mask, self.width = bos, mask, width
        self.device = images.device
        self.keep_is_free = images.device.type == "cpu"
        self.samples, self.num_samples = tuple(range(len(images))), len(images)
        self.pairs = any("C" in layer.ffn._modules for layer in self.encoder.layers)
        grid = model.beit3.vision_embed.grid_size(images)
        self.num_vision = grid[0] * grid[1] + 1
        # BOS, max_words - 1 steps' words of every caption, and the last step's mask tokens.
        self.words = 1 + max_words * width
        self.caches: list[LayerCache] = []
        step = max(1, _ROWS_AT_ONCE // self.num_vision)
        for start in range(0, len(images), step):
            self._encode(images[start : start + step], start)
        self.steps = self.used = 0
        self.seen = torch.zeros(len(images), 1, self.words, dtype=torch.bool, device=self.device)

    def start(self) -> Tensor:
        """Logits [S, V] of the first token."""
        words = torch.full((len(self.samples), 1), self.bos, device=self.device)
        return self._step(words)[:, 0]

    def step(self, words: Tensor, parents: Tensor) -> Tensor:
        """Logits [S, W, V] after ``words`` int64 [S, W], each added to the caption ``parents`` int64 [S, W]."""
        self.seen = self.seen.gather(1, parents[:, :, None].expand(-1, -1, self.words))
        return self._step(words)

    def keep(self, inputs: Tensor) -> None:
        """Go on with the images ``inputs`` int64 [S'] only; where that is free their cache stays where it is."""
        self.seen = self.seen[inputs]
        if self.keep_is_free:
            self.samples = tuple(self.samples[index] for index in inputs.tolist())
            return
        self.samples = tuple(range(len(inputs)))
        for cache in self.caches:
            cache.keep(inputs)

    def _step(self, words: Tensor) -> Tensor:
        batch, width = words.shape
        used, stop = self.used, self.used + 2 * width
        own = torch.arange(width, device=self.device)
        self.seen[:, own, used + own] = True
        # Rows: the words of all captions, then their mask tokens; each mask token sees what its word sees, and itself.
        seen = self.seen[:, :, :stop].repeat(1, 2, 1)
        seen[:, width + own, used + width + own] = True
        x = Measured(self._embed(words))
        layout = TokenLayout.from_lengths([0] * batch, [2 * width] * batch, self.device)
        if self.pairs:
            layout = replace(layout, text_only=0)
        last = len(self.encoder.layers) - 1
        for index, layer in enumerate(self.encoder.layers):
            q, k, v = project(layer, x, layout, "qkv", self.impl)
            self.caches[index].write_words(list(self.samples), used, k, v)
            q = q.unflatten(0, (batch, 2 * width))
            if index == last:
                q, seen = q[:, width:], seen[:, width:]
                rows = torch.arange(2 * batch * width, device=self.device).view(batch, -1)
                x = x.select(rows[:, width:].flatten())
                layout = replace(layout, text_lengths=(width,) * batch)
            o = self.caches[index].attend(q, seen, self.samples)
            x = attend(layer, o.flatten(0, 1), x.rows, layout, self.impl)
        self.steps, self.used = self.steps + 1, self.used + width
        asking = x.rows
        if self.encoder.layer_norm is not None:
            asking = layer_norm(self.encoder.layer_norm, asking, layout)
        head, bounds = self.model.mlm_head, (0, len(asking))
        logits = expert_linear(asking, [head.weight], [head.bias], bounds=bounds, impl=self.impl)
        return logits.unflatten(0, (batch, width))

    def _embed(self, words: Tensor) -> Tensor:
        """Rows [S * 2W, C]: words at this step's place, mask tokens at the next."""
        tokens = torch.cat([words, torch.full_like(words, self.mask)], dim=1)
        places = torch.full_like(tokens, self.steps)
        places[:, words.shape[1] :] += 1
        own, table = self.model.beit3.text_embed.weight, self.encoder.embed_positions.B.weight
        return text_rows(tokens.flatten(), places.flatten(), own, table)[1]

    def _encode(self, images: Tensor, first: int) -> None:
        """Fill the caches of the samples from ``first`` on with the keys and values of ``images``."""
        embedded = embed_padded(self.model.beit3, images, None)
        x, layout = Measured(embedded.rows), embedded.layout
        if self.pairs:
            layout = replace(layout, image_only=0)
        samples = slice(first, first + len(images))
        for index, layer in enumerate(self.encoder.layers):
            if index == len(self.encoder.layers) - 1:
                k, v = project(layer, x, layout, "kv", self.impl)
                self._cache(index, k).write_image(samples, k, v)
                return
            q, k, v = project(layer, x, layout, "qkv", self.impl)
            self._cache(index, k).write_image(samples, k, v)
            heads = layer.self_attn.num_heads
            o = measured_shared_attention(q, k, v, layout, num_heads=heads, impl=self.impl)
            x = attend(layer, o, x.rows, layout, self.impl)

    def _cache(self, layer: int, rows: Tensor) -> LayerCache:
        """The cache of a layer, which is made when its first keys ``rows`` [R, C] are there."""
        if layer == len(self.caches):
            heads = self.encoder.layers[layer].self_attn.num_heads
            shape = (self.num_samples, self.num_vision, self.words)
            self.caches.append(LayerCache(rows, *shape, heads, self.impl))
        return self.caches[layer]
