"""A small SentencePiece model for tests, trained in a second."""

from __future__ import annotations

import io
import struct
from os import PathLike
from pathlib import Path
from typing import Any

SENTENCES = (
    "A red motorcycle leans on its stand in a garage full of shelves and tools.",
    "A cat with big green eyes looks into the camera.",
    "A pagoda with red pillars rises above dark trees beside the lake.",
    "A red cup of coffee stands on a wooden table.",
    "The woman in the orange suit smiles before the flag.",
    "A white rocket stands on its pad at night.",
    "One large flower in full bloom, its petals folded like paper.",
    "What colour is the cup on the table?",
    "How many coins are in the last row?",
    "Is there a jug behind the quiet fox, or just a zebra?",
)


def tiny_sentencepiece_bytes(vocab_size: int = 90, **options: Any) -> bytes:
    """The content of a unigram model with ``vocab_size`` pieces and SentencePiece's default special ids."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "unigram",
        "vocab_size": vocab_size,
        "num_threads": 1,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, **{**settings, **options}
    )
    return model.getvalue()


def train_tiny_sentencepiece(path: str | PathLike[str], vocab_size: int = 90) -> Path:
    """Write a model to ``path``; with 90 pieces it has 92 token ids and fits the tiny model's 100."""
    Path(path).write_bytes(tiny_sentencepiece_bytes(vocab_size))
    return Path(path)


def with_pieces(model: bytes, names: list[str]) -> bytes:
    """``model`` with ordinary pieces of a very low score behind its own, as protobuf has it."""
    return model + b"".join(
        _field(1, _field(1, name.encode()) + struct.pack("<Bf", 2 << 3 | 5, -100.0))
        for name in names
    )


def _field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content
