"""The options of a caption, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from beit3_fast.errors import ConfigError

# The released beam search looks at this many candidates a beam.
CANDIDATES_PER_BEAM = 3

# Sums of log p from 1e-7, the least that fp32 rounds to, up to 1e7, times or over 1024 tokens to this power, are normal numbers
# of fp32: none becomes nothing or infinite, and their order stays.
_MOST_PENALTY = 10.0


@dataclass(frozen=True)
class Special:
    """Ids that are no words: ``bos`` begins a caption, ``eos`` ends it, ``mask`` stands for the next word.

    Ids above ``mask`` are unused rows of the embedding table.
    """

    bos: int
    pad: int
    eos: int
    mask: int


@dataclass(frozen=True)
class Options:
    """How captions are chosen; the fields are described at ``BEiT3ForCaptioning.caption``.

    Raises ConfigError for values that make no sense and for options that contradict each other.
    """

    num_beams: int = 3
    max_length: int = 32
    length_penalty: float = 0.6
    num_return_sequences: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_length", "num_return_sequences", "top_k", "seed"):
            value = getattr(self, name)
            if isinstance(value, np.integer):
                object.__setattr__(self, name, int(value))
        for name in ("length_penalty", "temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, np.floating):
                object.__setattr__(self, name, float(value))
        _integer("num_beams", self.num_beams, 1)
        _integer("max_length", self.max_length, 3)
        _integer("num_return_sequences", self.num_return_sequences, 1)
        _number("length_penalty", self.length_penalty)
        if not abs(self.length_penalty) <= _MOST_PENALTY:
            raise ConfigError(
                f"length_penalty must be from -{_MOST_PENALTY:g} to {_MOST_PENALTY:g}, got {self.length_penalty!r}; "
                "beyond that the scores of long captions leave fp32"
            )
        # An integer would raise lengths to integers, which end at 2**63.
        object.__setattr__(self, "length_penalty", float(self.length_penalty))
        _number("temperature", self.temperature)
        for name in ("sample", "compat"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not 1e-4 <= self.temperature <= 1e4:
            raise ConfigError(
                f"temperature must be from 0.0001 to 10000, got {self.temperature!r}; leave sample=True out for the "
                "likeliest words"
            )
        if self.top_k is not None:
            _integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            _number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ConfigError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        if self.sample:
            self._check_sampling()
        else:
            self._check_search()

    def _check_sampling(self) -> None:
        if self.num_beams != 1:
            raise ConfigError(
                f"sample=True draws words one by one and takes num_beams=1, got num_beams={self.num_beams}; "
                "num_return_sequences asks for several captions"
            )
        if self.compat:
            raise ConfigError("compat=True is the released beam search, which does not sample")

    def _check_search(self) -> None:
        drawn = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": None}
        changed = [name for name, value in drawn.items() if getattr(self, name) != value]
        if changed:
            raise ConfigError(f"{', '.join(changed)} needs sample=True with num_beams=1")
        if self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"num_return_sequences must be at most num_beams = {self.num_beams} without sample=True, "
                f"got {self.num_return_sequences}"
            )

    @property
    def searches(self) -> bool:
        """Whether beams are kept; the released search keeps one even where only one is asked for."""
        return not self.sample and (self.num_beams > 1 or self.compat)

    @property
    def width(self) -> int:
        """Captions of an image that are decoded at once."""
        return self.num_return_sequences if self.sample else self.num_beams

    def check_model(self, vocab_size: int, positions: int, special: Special) -> None:
        """Raises ConfigError where a model's vocabulary or text positions are too few for these options."""
        if self.max_length > positions:
            raise ConfigError(
                f"max_length must be at most {positions}, the text positions of this model, got {self.max_length}"
            )
        if not 3 < special.mask < vocab_size:
            raise ConfigError(
                f"the mask token's id must be in [4, {vocab_size}), got {special.mask}; "
                "use the SentencePiece file that the model was trained with"
            )
        words = special.mask - 2
        if CANDIDATES_PER_BEAM * self.num_beams > words:
            raise ConfigError(
                f"num_beams must be at most {words // CANDIDATES_PER_BEAM} for a vocabulary of {words} words, "
                f"got {self.num_beams}"
            )


def _integer(name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name} must be an integer from {least} to {most}, got {value!r}")


def _number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e300:
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
