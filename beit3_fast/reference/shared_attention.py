"""shared_attention by its formula: one softmax over a sample's vision and text keys."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_fast.layout import TokenLayout


def visible_keys(
    mask: str,
    vision_query_positions: Tensor,
    text_query_positions: Tensor,
    num_vision_keys: int,
    num_text_keys: int,
) -> Tensor:
    """bool [Nq, Nk], True where a query may look: the mask structure of one sample written out.

    Queries are the vision queries, then the text queries; keys are the vision keys, then the text keys.
    "bidirectional": everything. "seq2seq": text sees the image and text up to itself, the image sees the
    image. "causal": everything up to itself in the order vision, text.
    """
    vision = vision_query_positions[:, None]
    text = text_query_positions[:, None]
    vision_keys = torch.arange(num_vision_keys, device=vision.device)[None, :]
    text_keys = torch.arange(num_text_keys, device=vision.device)[None, :]
    all_vision = vision_keys >= 0
    all_text = text_keys >= 0
    if mask == "bidirectional":
        blocks = ((vision >= 0) & all_vision, (vision >= 0) & all_text)
        lower = ((text >= 0) & all_vision, (text >= 0) & all_text)
    elif mask == "seq2seq":
        blocks = ((vision >= 0) & all_vision, (vision < 0) & all_text)
        lower = ((text >= 0) & all_vision, text_keys <= text)
    elif mask == "causal":
        blocks = (vision_keys <= vision, (vision < 0) & all_text)
        lower = ((text >= 0) & all_vision, text_keys <= text)
    else:
        raise ValueError(f"mask must be 'bidirectional', 'seq2seq' or 'causal', got {mask!r}")
    return torch.cat([torch.cat(blocks, dim=1), torch.cat(lower, dim=1)])


def sample_mask(mask: str | Tensor, keys: TokenLayout, queries: TokenLayout, sample: int) -> Tensor:
    """bool [Nq, Nk] for one packed sample; ``mask`` as in ``ops.shared_attention``."""
    nv, nt = keys.vision_lengths[sample], keys.text_lengths[sample]
    if queries.positions is None:
        vision_queries = torch.arange(nv, device=keys.device)
        text_queries = torch.arange(nt, device=keys.device)
    else:
        vision, text = queries.segments(sample)
        vision_queries, text_queries = queries.positions[vision], queries.positions[text]
    if isinstance(mask, str):
        return visible_keys(mask, vision_queries, text_queries, nv, nt)
    own = mask if mask.dim() == 2 else mask[keys.order[sample]]
    text_offset = max(keys.vision_lengths)
    query_index = torch.cat([vision_queries, text_queries + text_offset])
    key_index = torch.cat(
        [
            torch.arange(nv, device=keys.device),
            torch.arange(nt, device=keys.device) + text_offset,
        ]
    )
    return own[query_index.long()][:, key_index]


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
    """softmax(scale Q K^T) V per sample and head over both modalities. q [Rq, C], k and v [R, C] -> [Rq, C].

    A query without a visible key gives zeros. Computed in fp32, in fp64 for fp64 operands.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    vision_parts, text_parts = [], []
    for sample in range(keys.batch_size):
        vision, text = keys.segments(sample)
        own_k = torch.cat([k[vision], k[text]]).to(compute).unflatten(1, (num_heads, -1))
        own_v = torch.cat([v[vision], v[text]]).to(compute).unflatten(1, (num_heads, -1))
        vision_q, text_q = queries.segments(sample)
        own_q = torch.cat([q[vision_q], q[text_q]]).to(compute).unflatten(1, (num_heads, -1))
        visible = sample_mask(mask, keys, queries, sample)  # [Nq, Nk]
        o = attend(own_q, own_k, own_v, visible, scale)
        split = queries.vision_lengths[sample]
        vision_parts.append(o[:split])
        text_parts.append(o[split:])
    if not vision_parts:
        return q.clone()
    return torch.cat(vision_parts + text_parts).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """One sample: q [Nq, H, D], k and v [Nk, H, D], visible bool [Nq, Nk] -> [Nq, H * D]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    seen = visible.any(dim=1)[None, :, None]
    weights = torch.where(seen, scores, 0.0).softmax(dim=-1) * seen
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
