"""One word after another: the likeliest (greedy), or drawn at random (temperature, top-k, top-p)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_fast.generate.beam import Results
from beit3_fast.generate.decoder import Decoder, dtype_of_scores, survivors, words_of
from beit3_fast.generate.options import Options, Special


class Chosen(NamedTuple):
    """The next words int64 [S, W] of the inputs ``origin`` [S], and their log p [S, W], as ``dtype_of_scores`` has it."""

    words: Tensor
    log_p: Tensor
    origin: Tensor


def choose_words(
    decoder: Decoder, options: Options, special: Special, generator: torch.Generator | None = None
) -> Iterator[Chosen]:
    """Every step's words, the end token too; inputs whose captions have all ended leave."""
    rows = decoder.start()[:, None]
    inputs, device = len(rows), rows.device
    origin = torch.arange(inputs, device=device)
    ended = torch.zeros(inputs, options.width, dtype=torch.bool, device=device)
    same = torch.arange(options.width, device=device).expand(inputs, -1)
    for step in range(options.max_length - 2):
        words, log_p = _choose(decoder, rows, options, special, generator)
        words = words.masked_fill(ended, special.pad)
        yield Chosen(words, log_p, origin)
        ended = ended | (words == special.eos)
        if step == options.max_length - 3:
            return
        live = survivors(decoder, ended.all(1), step + 1)
        if live is not None:
            if not len(live):
                return
            decoder.keep(live)
            words, ended, origin, same = (t[live] for t in (words, ended, origin, same))
        rows = decoder.step(words, same if step else torch.zeros_like(same))


def sample(
    decoder: Decoder, options: Options, special: Special, generator: torch.Generator | None = None
) -> Results:
    """``options.width`` captions of every input of ``decoder``, best first; scored like those of a beam search."""
    results: Results | None = None
    for step, (words, log_p, origin) in enumerate(
        choose_words(decoder, options, special, generator)
    ):
        if results is None:
            results = Results.empty(
                len(words), options.width, options.max_length - 2, special.mask, log_p
            )
            results.scores.zero_()
        going = ~results.ended[origin]
        ends = words == special.eos
        results.scores[origin] += log_p * going
        is_word = going & ~ends
        own = results.tokens[origin]
        own[:, :, step] = torch.where(is_word, words, special.mask)
        results.tokens[origin] = own
        results.lengths[origin] += is_word
        results.ended[origin] |= ends
    assert results is not None
    # Beginning and, where it was chosen, end count: what was cut has one word more and no end.
    counted = results.lengths + 1 + results.ended
    results.scores /= counted**options.length_penalty
    order = results.scores.argsort(dim=1, descending=True, stable=True)
    return results.picked(order)


def _choose(
    decoder: Decoder,
    rows: Tensor,
    options: Options,
    special: Special,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Words [S, W] for rows [S, W, C], and the model's own log p of them, whatever they were drawn from.

    The rows of the first step, [S, 1, C], are those of all captions.
    """
    if not options.sample:
        log_p, words = decoder.likeliest(rows, 1, special)
        return words[..., 0], log_p[..., 0]
    logits = decoder.logits(rows).to(dtype_of_scores(rows)).expand(-1, options.width, -1)
    known = words_of(logits.shape[-1], special, logits.device)
    scores = logits.masked_fill(~known, float("-inf"))
    words = _draw(scores / options.temperature, options, generator)
    total = logits.logsumexp(dim=-1)
    return words, scores.gather(-1, words[..., None])[..., 0] - total


def _draw(scores: Tensor, options: Options, generator: torch.Generator | None) -> Tensor:
    count = scores.shape[-1] if options.top_k is None else min(options.top_k, scores.shape[-1])
    best, words = scores.topk(count, dim=-1)
    p = best.softmax(dim=-1)
    if options.top_p is not None:
        # The likeliest words whose probabilities sum up to top_p, the one that reaches it included.
        p = p.masked_fill(p.cumsum(-1) - p >= options.top_p, 0.0)
    # No number is drawn from NaN, on a GPU not even an error comes back; the score of such a word is NaN, too, and is seen.
    p = p.masked_fill(p.isnan(), 1.0)
    drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
    return words.gather(-1, drawn.view(*p.shape[:-1], 1))[..., 0]
