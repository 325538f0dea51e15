"""A run of seconds: a tiny visual tokenizer and a teacher that sees colours and edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.data.image_data import ImageData
from beit3_fast.data.image_files import list_images
from beit3_fast.model.visual_tokenizer import VisualTokenizer, create_visual_tokenizer
from beit3_fast.train import TrainOptions, TrainReport, train
from beit3_fast.train.distillation import VisualTokenizerDistillation

PIXELS, PATCH, WIDTH = 48, 8, 12
OPTIONS = TrainOptions(
    steps=8, lr=2e-3, warmup_steps=2, accumulation=2, ema_decay=0.9, save_every=3
)


class ColoursAndEdges:
    """The means of the colours in each quarter of a patch: [B, 3, H, W] -> [B, patches, 12]."""

    identity = "colours and edges"

    def __call__(self, images: Tensor) -> Tensor:
        quarters = F.avg_pool2d(images, PATCH // 2)
        return F.unfold(quarters, 2, stride=2).transpose(1, 2)


def tokenizer(seed: int = 0, **changes: Any) -> VisualTokenizer:
    torch.manual_seed(seed)
    shape = {"img_size": PIXELS, "embed_dim": 32, "num_heads": 2, "num_codes": 24, "code_dim": 8}
    return create_visual_tokenizer("vqkd_tiny", **{**shape, "teacher_dim": WIDTH, **changes})


def images(world: Path, batch_size: int = 4, **options: Any) -> ImageData:
    paths = list_images(world / "imagenet.train.index.jsonl")
    return ImageData(paths, batch_size, PIXELS, **options)


def teach(
    world: Path,
    folder: Path,
    options: TrainOptions = OPTIONS,
    own: VisualTokenizer | None = None,
    **others: Any,
) -> TrainReport:
    settings: dict[str, Any] = {
        "data": images(world),
        "objective": VisualTokenizerDistillation(ColoursAndEdges()),
    }
    return train(
        own or tokenizer(),
        options=options,
        folder=folder,
        progress=False,
        **{**settings, **others},
    )
