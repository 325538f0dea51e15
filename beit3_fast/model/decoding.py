"""Decoding captions: keys and values of an image are computed once, all its captions are queries against them.

One cache a layer (``caption_cache.py``) holds, for every image, the image's keys and behind them those of every word that
any of its captions ever took, in the order of the steps. A caption is the set of words that it sees: choosing beams rearranges a small
bool table and no key. A step brings two rows a caption, the last word and a mask token that stands for the next; the
mask token's keys are overwritten by the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_fast.generate import Special
from beit3_fast.generate.decoder import words_of
from beit3_fast.layout import TokenLayout
from beit3_fast.model.batch import embed_padded
from beit3_fast.model.caption_cache import LayerCache
from beit3_fast.model.embedding import text_rows
from beit3_fast.model.encoder import attend, layer_norm, project
from beit3_fast.model.experts import layer_operands
from beit3_fast.model.step_graph import StepGraph, try_to_capture
from beit3_fast.ops import (
    Measured,
    expert_linear,
    head_top_k,
    measured_shared_attention,
)
from beit3_fast.ops.dispatch import autocast_enabled
from beit3_fast.ops.whole_layer import LayerOperands

# Images are encoded as many at a time as give about this number of rows, see model/encoder.py.
_ROWS_AT_ONCE = 2048


class _Moment(NamedTuple):
    """When a step takes place: after so many steps and places used, int or int64 [1] on the device, of ``stop`` places."""

    steps: int | Tensor
    used: int | Tensor
    stop: int


class _Shape(NamedTuple):
    """What all steps of S images with W captions each have in common; their rows are W words and W mask tokens an image."""

    layout: TokenLayout
    last_layout: TokenLayout  # of the mask tokens alone
    captions: Tensor  # int64 [W], their numbers
    asking: Tensor  # int64 [S * W], the mask tokens among all rows
    ahead: Tensor  # int64 [2W], how many places in front of the words'
    masks: Tensor  # int64 [S, W], the mask token
    operands: dict[int, LayerOperands | None]  # by layer, made with its first step


def head_logits(head: nn.Linear, rows: Tensor, impl: str) -> Tensor:
    """Logits [..., V] of rows [..., C]."""
    flat = rows.flatten(0, -2)
    logits = expert_linear(flat, [head.weight], [head.bias], bounds=(0, len(flat)), impl=impl)
    return logits.unflatten(0, rows.shape[:-1])


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
        self.graphs = images.device.type == "cuda" and not autocast_enabled("cuda")
        self.graph: StepGraph | None = None
        # Of the last step that was no replay: its kernels are compiled and chosen.
        self.ran: torch.Size | None = None
        self.shapes: dict[tuple[int, int], _Shape] = {}
        self.known: Tensor | None = None
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
        """Rows [S, C] that stand for the first token."""
        words = torch.full((len(self.samples), 1), self.bos, device=self.device)
        return self._step_by_step(words)[:, 0]

    def step(self, words: Tensor, parents: Tensor) -> Tensor:
        """Rows [S, W, C] after ``words`` int64 [S, W], each added to the caption ``parents`` int64 [S, W].

        On a GPU the second step of a shape is captured in a CUDA graph, which it and the following ones replay.
        """
        graph = self._captured(words, parents) if self.ran == words.shape else None
        if graph is not None:
            self.steps, self.used = self.steps + 1, self.used + words.shape[1]
            return graph(words, parents)
        self.seen = self._chosen(parents)
        return self._step_by_step(words)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits [..., V] of rows [..., C]."""
        return head_logits(self.model.mlm_head, rows, self.impl)

    def likeliest(self, rows: Tensor, count: int, special: Special | None) -> tuple[Tensor, Tensor]:
        """The ``count`` likeliest tokens of rows [..., C]: log p and ids [..., count]; ``special``: words only."""
        head = self.model.mlm_head
        if special is not None and self.known is None:
            self.known = words_of(len(head.weight), special, self.device)
        allowed = None if special is None else self.known
        operands = (rows.flatten(0, -2), head.weight, head.bias, count)
        log_p, ids = head_top_k(*operands, allowed=allowed, impl=self.impl)
        return log_p.unflatten(0, rows.shape[:-1]), ids.unflatten(0, rows.shape[:-1])

    def keep(self, inputs: Tensor) -> None:
        """Go on with the images ``inputs`` int64 [S'] only; where that is free their cache stays where it is."""
        self.seen, self.graph = self.seen[inputs], None
        if self.keep_is_free:
            self.samples = tuple(self.samples[index] for index in inputs.tolist())
            return
        self.samples = tuple(range(len(inputs)))
        for cache in self.caches:
            cache.keep(inputs)

    def _chosen(self, parents: Tensor) -> Tensor:
        """What the captions ``parents`` see, bool [S, W, words]."""
        return self.seen.gather(1, parents[:, :, None].expand(-1, -1, self.words))

    def _step_by_step(self, words: Tensor) -> Tensor:
        width = words.shape[1]
        rows = self._step(words, _Moment(self.steps, self.used, self.used + 2 * width))
        self.steps, self.used, self.ran = self.steps + 1, self.used + width, words.shape
        return rows

    def _captured(self, words: Tensor, parents: Tensor) -> StepGraph | None:
        """The graph of steps of this shape; where there can be none, none is asked for again."""
        if self.graphs and (self.graph is None or not self.graph.fits(words)):
            steps, used = (torch.tensor([n], device=self.device) for n in (self.steps, self.used))
            self.graph = try_to_capture(self.fixed_step(steps, used), words, parents)
            self.graphs = self.graph is not None
        return self.graph

    def fixed_step(self, steps: Tensor, used: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """``step`` without anything that changes from one to the next but what lies in memory.

        ``steps`` and ``used``, int64 [1], say how far decoding is; every call moves them on.
        """

        def run(words: Tensor, parents: Tensor) -> Tensor:
            self.seen.copy_(self._chosen(parents))
            rows = self._step(words, _Moment(steps, used, self.words))
            steps.add_(1)
            used.add_(words.shape[1])
            return rows

        return run

    def _step(self, words: Tensor, moment: _Moment) -> Tensor:
        """Rows [S, W, C] of the mask tokens behind ``words``; keys and ``seen`` are brought up to date."""
        batch, width = words.shape
        shape = self._shape(batch, width)
        own = (moment.used + shape.captions).expand(batch, -1)[:, :, None]
        self.seen.scatter_(2, own, True)
        # Rows: the words of all captions, then their mask tokens; each mask token sees what its word sees, and itself.
        seen = self.seen[:, :, : moment.stop].repeat(1, 2, 1)
        seen[:, width:].scatter_(2, own + width, True)
        x, layout = Measured(self._embed(words, moment.steps, shape)), shape.layout
        place = moment.used
        if isinstance(place, Tensor):
            place = place + self.caches[0].front
        for index in range(len(self.encoder.layers) - 1):
            x = self._layer(index, x, shape, layout, place, seen)
        layout = shape.last_layout
        x = self._layer(-1, x, shape, layout, place, seen[:, width:])
        asking = x.rows
        if self.encoder.layer_norm is not None:
            asking = layer_norm(self.encoder.layer_norm, asking, layout, self.impl)
        return asking.unflatten(0, (batch, width))

    def _layer(
        self,
        index: int,
        x: Measured,
        shape: _Shape,
        asked: TokenLayout,
        place: int | Tensor,
        seen: Tensor,
    ) -> Measured:
        """A layer on the rows x [S * 2W, C] of a step, for those that ``asked`` has: the last n of an image; ``seen`` [S, n, words]."""
        layer, cache, layout = self.encoder.layers[index], self.caches[index], shape.layout
        if cache.image is not None:
            if index not in shape.operands:
                shape.operands[index] = layer_operands(layer, layout, asked)
            operands = shape.operands[index]
            if operands is not None:
                y = cache.layer(x.rows, operands, place, seen, self.samples)
                if y is not None:
                    return Measured(y)
        q, k, v = project(layer, x, layout, "qkv", self.impl)
        q = q.unflatten(0, (len(seen), -1))
        if asked is not layout:
            q, x = q[:, -seen.shape[1] :], x.select(shape.asking)
        o = cache.attend(q, k, v, place, seen, self.samples)
        return attend(layer, o, x.rows, asked, self.impl)

    def _shape(self, batch: int, width: int) -> _Shape:
        """Made once: lists reach a device by copies, which no graph may hold."""
        if (batch, width) not in self.shapes:
            layout, last = (self._layout(batch, tokens) for tokens in (2 * width, width))
            captions = torch.arange(width, device=self.device)
            rows = torch.arange(2 * batch * width, device=self.device).view(batch, -1)
            ahead = torch.arange(2 * width, device=self.device) >= width
            masks = torch.full((batch, width), self.mask, device=self.device)
            asking = rows[:, width:].flatten()
            self.shapes[batch, width] = _Shape(
                layout, last, captions, asking, ahead.long(), masks, {}
            )
        return self.shapes[batch, width]

    def _layout(self, batch: int, tokens: int) -> TokenLayout:
        own = TokenLayout.from_lengths([0] * batch, [tokens] * batch, self.device)
        return replace(own, text_only=0) if self.pairs else own

    def _embed(self, words: Tensor, steps: int | Tensor, shape: _Shape) -> Tensor:
        """Rows [S * 2W, C]: words at this step's place, mask tokens at the next."""
        tokens, places = torch.cat([words, shape.masks], dim=1), steps + shape.ahead
        own, table = self.model.beit3.text_embed.weight, self.encoder.embed_positions.B.weight
        return text_rows(tokens.flatten(), places.repeat(len(words)), own, table)[1]

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
