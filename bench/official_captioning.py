"""The released captioning procedure on torchscale: the truth for our beam search, and its baseline.

Restated from the official evaluation code (facts only): the image is repeated for every beam and encoded that often,
a step feeds the last word and a mask token, every beam has its own cache, both rows meet the vocabulary, and the
candidates are walked in Python, one ``.item()`` at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BOS, PAD, EOS = 0, 1, 2
_CANDIDATES_PER_BEAM = 3

State = dict[int, dict[str, Tensor]]


class OfficialCaption(NamedTuple):
    """Words without the beginning, the end or the placeholder of the end, and their normalised score."""

    tokens: tuple[int, ...]
    score: float


def official_caption_step(
    model: Any, image: Tensor | None, text_ids: Tensor, state: State, text_len: int
) -> Tensor:
    """One call of the released captioning decoder: logits [B, new tokens, V]; ``state`` is extended."""
    num_image = model.beit3.vision_embed.num_position_embeddings()
    total = num_image + text_len
    seen = torch.zeros(total, total, dtype=torch.long)
    seen[:, :num_image] = 1
    seen[num_image:, num_image:] = torch.ones(text_len, text_len, dtype=torch.long).tril()
    blocked, positions, padding = 1 - seen, None, torch.zeros_like(text_ids)
    for index in range(len(model.beit3.encoder.layers)):
        state.setdefault(index, {})
    if image is None:
        new = text_ids.shape[1]
        blocked = blocked[-new:]
        positions = torch.arange(text_len, text_len + new).unsqueeze(0)
    out = model.beit3(
        textual_tokens=text_ids,
        visual_tokens=image,
        text_padding_position=None if image is None else padding,
        attn_mask=blocked,
        incremental_state=state,
        positions=positions,
    )["encoder_out"]
    return model.mlm_head(out if image is None else out[:, num_image:])


def reorder_cache(state: State, beams: Tensor) -> None:
    """What the released beam search does after a step: follow the beams, forget the mask token."""
    for cache in state.values():
        for key in cache:
            cache[key] = cache[key].index_select(0, beams)[:, :, :-1, :]


class _Hypotheses:
    """The best captions of one image so far."""

    def __init__(self, kept: int, max_length: int, length_penalty: float) -> None:
        self.kept, self.length_penalty = kept, length_penalty
        self.longest = max_length - 1
        self.found: list[tuple[float, list[int]]] = []
        self.worst = 1e9

    def add(self, ids: list[int], log_p: float) -> None:
        score = log_p / len(ids) ** self.length_penalty
        if len(self.found) >= self.kept and score <= self.worst:
            return
        self.found.append((score, ids))
        if len(self.found) > self.kept:
            by_score = sorted((own, index) for index, (own, _) in enumerate(self.found))
            del self.found[by_score[0][1]]
            self.worst = by_score[1][0]
        else:
            self.worst = min(score, self.worst)

    def is_done(self, best_log_p: float) -> bool:
        if len(self.found) < self.kept:
            return False
        return self.worst >= best_log_p / self.longest**self.length_penalty


@torch.no_grad()
def official_captions(
    model: Any,
    image: Tensor,
    mask_id: int,
    num_beams: int = 3,
    max_length: int = 32,
    length_penalty: float = 0.6,
    kept: int = 1,
) -> list[list[OfficialCaption]]:
    """Captions of image [B, 3, H, W] by a captioning model of ``bench.torchscale_heads.MODELS``, the ``kept`` best first."""
    batch, length = len(image), 2
    image = image.repeat_interleave(num_beams, dim=0)
    text = torch.tensor([[BOS, mask_id]]).repeat(batch * num_beams, 1)
    results = torch.full((batch * num_beams, max_length), mask_id)
    results[:, 0] = BOS
    hypotheses = [_Hypotheses(kept, max_length, length_penalty) for _ in range(batch)]
    sums = torch.zeros(batch, num_beams)
    sums[:, 1:] = -1e9
    sums = sums.flatten()
    done = [False] * batch
    state: State = {}
    while length <= max_length:
        logits = official_caption_step(model, image if length == 2 else None, text, state, length)
        scores = F.log_softmax(logits[:, 1], dim=-1)
        vocabulary = scores.shape[-1]
        totals = (scores + sums[:, None]).view(batch, num_beams * vocabulary)
        best, places = totals.topk(_CANDIDATES_PER_BEAM * num_beams, dim=1)
        beams: list[tuple[float, int, int]] = []
        for sample in range(batch):
            done[sample] = done[sample] or hypotheses[sample].is_done(best[sample].max().item())
            own: list[tuple[float, int, int]] = []
            if not done[sample]:
                for place, score in zip(places[sample], best[sample], strict=True):
                    beam = sample * num_beams + int((place // vocabulary).item())
                    word = int((place % vocabulary).item())
                    if length + 1 == max_length or (word == EOS and length + 1 <= max_length):
                        hypotheses[sample].add(results[beam, :length].tolist(), score.item())
                    else:
                        own.append((score.item(), word, beam))
                    if len(own) == num_beams:
                        break
            beams += own or [(0.0, PAD, 0)] * num_beams
        sums = torch.tensor([score for score, _, _ in beams])
        words = torch.tensor([word for _, word, _ in beams])
        order = torch.tensor([beam for _, _, beam in beams])
        results = results[order]
        reorder_cache(state, order)
        text = torch.stack([words, torch.full_like(words, mask_id)], dim=1)
        results[:, length - 1] = words
        length += 1
        if all(done):
            break
    return [
        [
            # The last id is the mask token, which stands for the end.
            OfficialCaption(tuple(ids[1:-1]), score)
            for score, ids in sorted(own.found, key=lambda found: found[0], reverse=True)
        ]
        for own in hypotheses
    ]


@torch.no_grad()
def official_score(
    model: Any, image: Tensor, mask_id: int, words: Sequence[int], length_penalty: float = 0.6
) -> float:
    """The score that ``official_captions`` gives to these words of image [1, 3, H, W], where the length ended them.

    The released search counts one word more than it keeps: the likeliest after the last.
    """
    text, total = torch.tensor([[BOS, mask_id]]), 0.0
    state: State = {}
    for length, word in enumerate([*words, None], 2):
        logits = official_caption_step(model, image if length == 2 else None, text, state, length)
        log_p = F.log_softmax(logits[0, 1], dim=-1)
        total += float(log_p.max() if word is None else log_p[word])
        reorder_cache(state, torch.zeros(1, dtype=torch.long))
        text = torch.tensor([[word or 0, mask_id]])
    return total / (len(words) + 2) ** length_penalty
