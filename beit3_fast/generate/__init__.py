"""Decoding: beam search, greedy choice and sampling over the scores of a Decoder; knows no model."""

from beit3_fast.generate.caption import Caption, CaptionStep, caption_steps, captions
from beit3_fast.generate.decoder import Decoder
from beit3_fast.generate.options import Options, Special

__all__ = [
    "Caption",
    "CaptionStep",
    "Decoder",
    "Options",
    "Special",
    "caption_steps",
    "captions",
]
