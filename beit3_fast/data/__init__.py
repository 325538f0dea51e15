"""From texts and images to what a BEiT-3 forward takes; knows no model."""

from __future__ import annotations

from beit3_fast.data.augment import Augment
from beit3_fast.data.batch import Batch
from beit3_fast.data.images import PRESETS, ImagePreset, load_image, preprocess_image
from beit3_fast.data.labels import read_labels
from beit3_fast.data.masked_batch import MaskedBatch, MaskedSample, masked_batch
from beit3_fast.data.masking import Masking
from beit3_fast.data.processor import Processor
from beit3_fast.data.tokenizer import Tokenizer, segments

__all__ = [
    "PRESETS",
    "Augment",
    "Batch",
    "ImagePreset",
    "MaskedBatch",
    "MaskedSample",
    "Masking",
    "Processor",
    "Tokenizer",
    "load_image",
    "masked_batch",
    "preprocess_image",
    "read_labels",
    "segments",
]
