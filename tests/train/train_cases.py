"""A run of seconds: a tiny model on a small world."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beit3_fast.checkpoint import read_checkpoint
from beit3_fast.config import SIZES, BEiT3Config
from beit3_fast.data import Masking, Processor, Tokenizer, preprocess_image
from beit3_fast.data.mixed import Mix, MixedData
from beit3_fast.data.patch_codes import PatchCodes
from beit3_fast.data.world import WorldSize, write_world
from beit3_fast.model import BEiT3ForPretraining
from beit3_fast.train import MaskedDataModelling, TrainOptions, TrainReport, read_log, train

CODES, PIXELS, PATCH = 16, 48, 8
# 10 scenes: an epoch of images ends within a micro-batch of three.
SIZE = WorldSize(train=10, val=6, test=2, texts=20, pixels=PIXELS)
OPTIONS = TrainOptions(
    steps=8,
    lr=2e-3,
    warmup_steps=3,
    accumulation=2,
    ema_decay=0.9,
    layer_decay=0.9,
    save_every=3,
    workers=0,
)


def make_world(folder: Path) -> Path:
    return write_world(folder, SIZE, seed=1)


def data(
    world: Path, mix: Mix | None = None, visual_tokens: Any = None, **options: Any
) -> MixedData:
    """``visual_tokens``: codes fitted to patches by default."""
    settings = json.loads((world / "world.json").read_text())
    processor = Processor(Tokenizer(world / "world.spm"), image_size=settings["pixels"])
    paths = sorted((world / "images/train").iterdir())[:200]
    images = [preprocess_image(path, settings["pixels"]) for path in paths]
    return MixedData(
        {
            "image": world / "imagenet.train.index.jsonl",
            "text": world / "text.train.jsonl",
            "pair": world / "coco_retrieval.train.jsonl",
        },
        mix or Mix(image=3, text=2, pair=2),
        processor,
        visual_tokens or PatchCodes.fit(images, CODES, PATCH),
        PATCH,
        Masking(min_block=4),
        **options,
    )


def config(world: Path, **changes: Any) -> BEiT3Config:
    fields: dict[str, Any] = {
        "embed_dim": 32,
        "num_heads": 2,
        "ffn_dim": 64,
        "img_size": PIXELS,
        "patch_size": PATCH,
        "vocab_size": Tokenizer(world / "world.spm").vocab_size,
        "max_text_positions": 66,
        "drop_path_rate": 0.2,
    }
    return SIZES["tiny"].replace(**{**fields, **changes})


def model(world: Path, seed: int = 0, **changes: Any) -> BEiT3ForPretraining:
    torch.manual_seed(seed)
    return BEiT3ForPretraining(config(world, **changes), CODES)


def small(world: Path, seed: int = 0) -> BEiT3ForPretraining:
    """With few tensors, which is what a checkpoint takes its time for."""
    return model(world, seed, attention="shared")


def run(
    world: Path,
    folder: Path,
    options: TrainOptions = OPTIONS,
    own: nn.Module | None = None,
    **others: Any,
) -> TrainReport:
    settings: dict[str, Any] = {"data": data(world), "objective": MaskedDataModelling()} | others
    return train(
        own or small(world),
        options=options,
        folder=folder,
        progress=False,
        **settings,
    )


CURVE = ("step", "loss", "image", "pair_image", "pair_text", "text", "lr", "grad_norm", "skipped")


def curve(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in CURVE) for line in read_log(folder)]


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / f"{name}.safetensors").state


class Watched(MaskedDataModelling):
    """Does ``what(call)`` before each micro-batch, counted from 1."""

    def __init__(self, what: Callable[[int], Any], spoil: tuple[int, ...] = ()) -> None:
        super().__init__()
        object.__setattr__(self, "state", [0, what, spoil])

    def __repr__(self) -> str:
        return repr(MaskedDataModelling())

    def __call__(self, model: nn.Module, batch: Any, totals: Any) -> Any:
        state: list[Any] = self.state  # type: ignore[attr-defined]
        state[0] += 1
        state[1](state[0])
        loss, terms = super().__call__(model, batch, totals)
        return (loss * float("nan") if state[0] in state[2] else loss), terms


def assert_close(folder: Path, whole: Path) -> None:
    """The same run but for the order in which numbers are added."""
    ours, theirs = curve(folder), curve(whole)
    assert len(ours) == len(theirs)
    for own, expected in zip(ours, theirs, strict=True):
        assert own == pytest.approx(expected, rel=1e-5)
    for name in ("model", "average"):
        own_state, state = weights(folder, name), weights(whole, name)
        assert own_state.keys() == state.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(own_state[key], tensor, rtol=1e-4, atol=2e-6, msg=key)
