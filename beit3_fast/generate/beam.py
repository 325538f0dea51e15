"""Beam search over the captions of many inputs at once; beams, scores and flags stay on the device.

The released search, restated as tensor operations: the best 3W continuations of W beams are walked in order; those
that end the caption are kept as results, the first W others are the next beams. A result of n words scores
sum(log p) / (n + 2) ** length_penalty (beginning and end count). An input is done when no continuation can beat its
worst result. Three habits of the released code are mended unless ``compat`` is set:

- at the length limit it scores one more word and drops it from the caption: here the word stays;
- with a negative length penalty it stops early, because it takes the longest caption for the best that can come;
- it may choose tokens that are no words (beginning, padding, mask, unused rows of the vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beit3_fast.generate.decoder import Decoder, dtype_of_scores, survivors
from beit3_fast.generate.options import CANDIDATES_PER_BEAM, Options, Special


@dataclass
class Results:
    """The best K captions of S inputs, best first.

    ``scores`` fp32 [S, K], fp64 where the model computes in it; ``tokens`` int64 [S, K, T], words only, mask behind them; ``lengths`` int64 [S, K];
    ``ended`` bool [S, K]: the end token was chosen, not the length limit met.
    """

    scores: Tensor
    tokens: Tensor
    lengths: Tensor
    ended: Tensor

    @classmethod
    def empty(cls, inputs: int, kept: int, words: int, fill: int, like: Tensor) -> Results:
        """No captions yet: every score is minus infinity, of the dtype and device of ``like``."""
        device = like.device
        return cls(
            torch.full((inputs, kept), float("-inf"), dtype=like.dtype, device=device),
            torch.full((inputs, kept, words), fill, device=device),
            torch.zeros(inputs, kept, dtype=torch.int64, device=device),
            torch.zeros(inputs, kept, dtype=torch.bool, device=device),
        )

    def best_with(self, other: Results) -> Results:
        """The best K of both; among equals the ones that are here already."""
        both = [torch.cat(pair, dim=1) for pair in zip(self._all(), other._all(), strict=True)]
        order = both[0].argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        return Results(*both).picked(order)

    def picked(self, places: Tensor) -> Results:
        """The captions at ``places`` int64 [S, K'] of every input."""
        return Results(*(_pick(tensor, places) for tensor in self._all()))

    def at(self, inputs: Tensor) -> Results:
        """Those of some inputs."""
        return Results(*(tensor[inputs] for tensor in self._all()))

    def put(self, inputs: Tensor, other: Results) -> None:
        """Replace those of some inputs, in place."""
        for own, new in zip(self._all(), other._all(), strict=True):
            own[inputs] = new

    def _all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.scores, self.tokens, self.lengths, self.ended


def beam_search(decoder: Decoder, options: Options, special: Special) -> Results:
    """The best ``options.num_return_sequences`` captions of every input of ``decoder``."""
    rows = decoder.start()[:, None]
    inputs, device, width = len(rows), rows.device, options.num_beams
    most_words = options.max_length - 2
    sums = torch.zeros(inputs, 1, dtype=dtype_of_scores(rows), device=device)
    tokens = torch.full((inputs, 1, most_words), special.mask, device=device)
    kept = options.num_return_sequences
    final, found = (Results.empty(inputs, kept, most_words, special.mask, sums) for _ in range(2))
    origin = torch.arange(inputs, device=device)
    done = torch.zeros(inputs, dtype=torch.bool, device=device)
    for before in range(most_words):
        last = before == most_words - 1
        scores, parents, words = _candidates(decoder, rows, sums, options, special)
        done |= found.scores[:, -1] >= scores[:, 0] / _longest(before, options)
        ends = words == special.eos
        # The walk stops at the candidate that fills the beams.
        walked = (~ends).cumsum(1) - (~ends).long() < width
        counts = (ends & walked) | last
        stays = _pick(tokens, parents)
        grown = stays.clone()
        grown[:, :, before] = words
        keeps_word = torch.zeros_like(ends) if options.compat else ~ends
        results = Results(
            scores / (before + 2) ** options.length_penalty,
            torch.where(keeps_word[:, :, None], grown, stays),
            keeps_word + before,
            ends,
        )
        results.scores.masked_fill_(~counts | done[:, None], float("-inf"))
        found = found.best_with(results)
        if last:
            break
        chosen = ends.int().argsort(dim=1, stable=True)[:, :width]
        sums, parents, words = (_pick(t, chosen) for t in (scores, parents, words))
        tokens = _pick(grown, chosen)
        live = survivors(decoder, done, before + 1)
        if live is not None:
            if not len(live):
                break
            final.put(origin, found)
            decoder.keep(live)
            found, origin, done = found.at(live), origin[live], done[live]
            sums, parents, words, tokens = (t[live] for t in (sums, parents, words, tokens))
        rows = decoder.step(words, parents)
    final.put(origin, found)
    return final


def _candidates(
    decoder: Decoder, rows: Tensor, sums: Tensor, options: Options, special: Special
) -> tuple[Tensor, Tensor, Tensor]:
    """The best 3W continuations [S, 3W] of rows [S, W, C], best first: sums of log p, beams, words."""
    count = CANDIDATES_PER_BEAM * options.num_beams
    best, words = decoder.likeliest(rows, count, None if options.compat else special)
    totals, places = (best + sums[:, :, None]).flatten(1).topk(count, dim=1)
    return totals, places // count, words.flatten(1).gather(1, places)


def _longest(words_before: int, options: Options) -> float:
    """What the best sum so far is divided by, at least, in any result that may still come."""
    tokens = options.max_length - 1
    if options.length_penalty < 0 and not options.compat:
        tokens = words_before + 2
    return float(tokens**options.length_penalty)


def _pick(tensor: Tensor, places: Tensor) -> Tensor:
    """tensor [S, N, ...] at places [S, M] -> [S, M, ...]."""
    if tensor.dim() == 2:
        return tensor.gather(1, places)
    return tensor.gather(1, places[:, :, None].expand(-1, -1, tensor.shape[2]))
