"""shared_attention from scaled_dot_product_attention calls of PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.padded_layout import PaddedLayout
from beit3_fast.reference.shared_attention import sample_mask, visible_keys

# Tokens of a sample up to which, on a CPU, a call for it costs more than padding it.
_SHORT = 64


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: TokenLayout,
    queries: TokenLayout,
    num_heads: int,
    scale: float,
    mask: str | Tensor,
) -> Tensor:
    """Arguments and result as in ``beit3_fast.reference.shared_attention``; obeys autocast and autograd.

    Equally long samples of one modality take one batched call. Everything else takes one call per sample on a CPU,
    which neither pads nor (without a mask) materialises scores, and one padded call elsewhere, where launches
    cost more than padding. A mask tensor takes one call per sample, unless the layout is padded already.
    """
    if isinstance(mask, str) and queries is keys and keys.is_uniform and keys.num_rows:
        batch, tokens = keys.batch_size, keys.longest
        q, k, v = (
            t.view(batch, tokens, num_heads, t.shape[1] // num_heads).transpose(1, 2)
            for t in (q, k, v)
        )
        causal = mask == "causal" or (mask == "seq2seq" and keys.num_text_rows > 0)
        o = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
        return o.transpose(1, 2).reshape(batch * tokens, -1)
    if isinstance(keys, PaddedLayout) and isinstance(queries, PaddedLayout):
        return _equally_long(q, k, v, keys, queries, num_heads, scale, mask)
    rigid = q.device.type != "cpu" or torch.compiler.is_compiling()
    short = keys.longest <= _SHORT and queries.num_rows > 0
    if isinstance(mask, str) and (rigid or short):
        return padded_attention(q, k, v, keys, queries, num_heads, scale, mask)
    vision_parts, text_parts = [], []
    samples = zip(
        _heads(q, queries, num_heads),
        _heads(k, keys, num_heads),
        _heads(v, keys, num_heads),
        strict=True,
    )
    for sample, (own_q, own_k, own_v) in enumerate(samples):
        visible = None
        if mask != "bidirectional" if isinstance(mask, str) else True:
            visible = sample_mask(mask, keys, queries, sample)
        o = F.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=visible, scale=scale)
        o = o[0].transpose(0, 1).flatten(1)  # [Nq, C]
        if visible is not None:
            o = torch.where(visible.any(dim=1, keepdim=True), o, 0.0)
        vision, text = o.split([queries.vision_lengths[sample], queries.text_lengths[sample]])
        vision_parts.append(vision)
        text_parts.append(text)
    if not vision_parts:
        return q.clone()
    return torch.cat(vision_parts + text_parts)


def _equally_long(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: PaddedLayout,
    queries: PaddedLayout,
    num_heads: int,
    scale: float,
    mask: str | Tensor,
) -> Tensor:
    """shared_attention in one call on samples that are padded already."""

    def heads(rows: Tensor, layout: PaddedLayout) -> Tensor:
        parts = rows[: layout.num_vision_rows], rows[layout.num_vision_rows :]
        shape = (layout.batch_size, -1, num_heads, rows.shape[1] // num_heads)
        counts = (layout.num_vision, layout.num_text)
        own = [part.view(shape) for part, count in zip(parts, counts, strict=True) if count]
        return (own[0] if len(own) == 1 else torch.cat(own, dim=1)).transpose(1, 2)

    if queries.longest == 0 or keys.batch_size == 0:
        return q.new_zeros(q.shape)
    visible: Tensor | None = None
    if keys.valid is not None or mask != "bidirectional":
        visible = visible_places(keys, queries, mask)[:, None]
    o = F.scaled_dot_product_attention(
        heads(q, queries), heads(k, keys), heads(v, keys), attn_mask=visible, scale=scale
    )
    if visible is not None and (isinstance(mask, Tensor) or not keys.num_vision):
        o = torch.where(visible.any(dim=3, keepdim=True), o, 0.0)
    o = o.transpose(1, 2).flatten(2)  # [B, Nq, C]
    vision, text = o[:, : queries.num_vision], o[:, queries.num_vision :]
    return torch.cat([vision.flatten(0, 1), text.flatten(0, 1)])


def visible_places(keys: PaddedLayout, queries: PaddedLayout, mask: str | Tensor) -> Tensor:
    """bool [B or 1, Nq, N]: the keys that queries may see, by the mask and because they are no padding."""
    if isinstance(mask, Tensor):
        seen = mask[None] if mask.dim() == 2 else mask
        text = seen[:, keys.num_vision : keys.num_vision + queries.num_text]
        seen = torch.cat([seen[:, : queries.num_vision], text], dim=1)
    else:
        vision, text = (
            torch.arange(count, device=keys.device)
            for count in (queries.num_vision, queries.num_text)
        )
        seen = visible_keys(mask, vision, text, keys.num_vision, keys.num_text)[None]
    if keys.valid is None:
        return seen
    images = keys.valid.new_ones(keys.batch_size, keys.num_vision)
    return seen & torch.cat([images, keys.valid], dim=1)[:, None]


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: TokenLayout,
    queries: TokenLayout,
    num_heads: int,
    scale: float,
    mask: str,
) -> Tensor:
    """shared_attention in one call: samples padded to the longest, padding and structure as a bool mask."""
    (key_rows, key_valid), (query_rows, query_valid) = keys.padded_rows, queries.padded_rows
    if not query_rows.numel():
        return q.new_zeros(q.shape)
    visible = key_valid[:, None, :]
    if mask != "bidirectional":
        key_places, key_text = _places(keys)
        query_places, query_text = _places(queries, keys)
        earlier = key_places[:, None, :] <= query_places[:, :, None]
        if mask == "seq2seq":
            earlier = ~key_text[:, None, :] | (earlier & query_text[:, :, None])
        visible = visible & earlier
    padded_q, padded_k, padded_v = (
        t.index_select(0, rows.flatten())
        .view(*rows.shape, num_heads, t.shape[1] // num_heads)
        .transpose(1, 2)
        for t, rows in ((q, query_rows), (k, key_rows), (v, key_rows))
    )
    o = F.scaled_dot_product_attention(
        padded_q, padded_k, padded_v, attn_mask=visible[:, None], scale=scale
    )
    o = torch.where(visible.any(dim=2)[:, None, :, None], o, 0.0)  # [B, H, Nq, D]
    slots = query_valid.flatten().nonzero().flatten()
    of_row = torch.empty_like(slots).index_copy(0, query_rows.flatten()[slots], slots)
    return o.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, of_row)


def _places(layout: TokenLayout, keys: TokenLayout | None = None) -> tuple[Tensor, Tensor]:
    """int64 [B, N]: place of every padded slot in its sample's order vision, text; bool [B, N]: is text."""
    rows, _ = layout.padded_rows
    slots = torch.arange(rows.shape[1], device=layout.device)[None]
    own_vision, full_vision = (
        torch.tensor(lengths, device=layout.device)[:, None]
        for lengths in (layout.vision_lengths, (keys or layout).vision_lengths)
    )
    text = slots >= own_vision
    if layout.positions is None:
        return slots.expand_as(rows), text
    return layout.positions[rows] + text * full_vision, text


def _heads(rows: Tensor, layout: TokenLayout, num_heads: int) -> list[Tensor]:
    """[1, H, N, D]: the rows of each packed sample, vision first, by head.

    One split, whose gradient is one concatenation; that of a slice would be as large as all rows, for each sample.
    """
    parts = rows.split([*layout.vision_lengths, *layout.text_lengths])
    samples = []
    for vision, text in zip(parts[: layout.batch_size], parts[layout.batch_size :], strict=True):
        present = [part for part in (vision, text) if len(part)]
        own = present[0] if len(present) == 1 else torch.cat([vision, text])
        samples.append(
            own.unflatten(1, (num_heads, rows.shape[1] // num_heads)).transpose(0, 1).unsqueeze(0)
        )
    return samples
