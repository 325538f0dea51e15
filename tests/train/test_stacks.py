"""The layers of every model that is trained here are known: to checkpointing, to FSDP2 and to the count of work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_throughput import forward_flops
from tokenizer_runs import OPTIONS as TOKENIZER_OPTIONS
from tokenizer_runs import images, teach, tokenizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from train_cases import OPTIONS, data, run, small, weights

from beit3_fast.errors import ConfigError
from beit3_fast.model import encoder
from beit3_fast.model.stack import layers_of
from beit3_fast.model.vision_transformer import _Block
from beit3_fast.train import TrainOptions, parallel, read_log, train
from beit3_fast.train.objective import MaskedDataModelling
from beit3_fast.train.processes import joined

PRETRAINING = replace(OPTIONS, steps=1, accumulation=1)
TOKENIZER = replace(TOKENIZER_OPTIONS, steps=1, accumulation=1)
KINDS: dict[str, tuple[Callable[..., Any], TrainOptions, Any, str]] = {
    "pretraining": (run, PRETRAINING, encoder, "_feed_forward"),
    "tokenizer": (teach, TOKENIZER, _Block, "_feed_forward"),
}


def calls(owner: Any, name: str, patch: pytest.MonkeyPatch) -> list[str]:
    """Gets an item with every call of a function."""
    call, made = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(name)
        return call(*arguments, **options)

    patch.setattr(owner, name, counted)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_computes_again(
    kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, options, owner, name = KINDS[kind]
    made = calls(owner, name, monkeypatch)
    counts = {}
    for again in ("none", "ffn", "layer", 2):
        made.clear()
        work(world, tmp_path / str(again), replace(options, checkpoint_activations=again))
        counts[again] = len(made)
        ours, plain = weights(tmp_path / str(again)), weights(tmp_path / "none")
        assert all(torch.equal(ours[key], tensor) for key, tensor in plain.items())
    layers = len(layers_of({"pretraining": small(world), "tokenizer": tokenizer()}[kind]))
    assert counts["ffn"] == counts["layer"] == counts["none"] + layers
    assert counts[2] == counts["none"] + layers // 2


def test_a_model_without_layers_has_nothing_to_compute_again(world: Path, tmp_path: Path) -> None:
    options = TrainOptions(steps=1, checkpoint_activations="layer")
    with pytest.raises(ConfigError, match="nothing of Linear can be recomputed, it has no layers"):
        train(nn.Linear(1, 1), data(world), MaskedDataModelling(), options, tmp_path)


def test_every_layer_is_a_unit_of_fsdp2(world: Path, tmp_path: Path) -> None:
    options = TrainOptions(parallel="fsdp2", precision="bfloat16")

    def units(_: int) -> list[dict[str, Any]]:
        found = []
        with joined() as processes:
            for own in (small(world), tokenizer()):
                parallel.Sharded(own, options, processes)
                found.append(
                    {
                        n: type(m).__name__
                        for n, m in own.named_modules()
                        if isinstance(m, FSDPModule)
                    }
                )
        return found

    (found,) = on_ranks(1, tmp_path, units)
    for own, names in zip((small(world), tokenizer()), found, strict=True):
        assert set(names) == {"", *layers_of(own)}
    assert [len(names) for names in found] == [1 + 2, 1 + 3]


def test_a_tokenizer_in_parts(world: Path, tmp_path: Path) -> None:
    whole = replace(TOKENIZER_OPTIONS, steps=2, ema_decay=None)
    parts = replace(whole, parallel="fsdp2", checkpoint_activations="layer")

    def work(_: int) -> None:
        with joined():
            teach(world, tmp_path / "whole", whole)
            teach(world, tmp_path / "parts", parts)
            teach(world, tmp_path / "half", replace(parts, precision="bfloat16"))

    on_ranks(2, tmp_path / "ranks", work)
    expected, ours, half = (
        [line["reconstruction"] for line in read_log(tmp_path / name)]
        for name in ("whole", "parts", "half")
    )
    assert ours == pytest.approx(expected, rel=1e-5)
    assert half == pytest.approx(expected, rel=2e-2)
    assert half != ours


def test_the_work_of_a_tokenizer_s_step(world: Path, tmp_path: Path) -> None:
    """Three forwards, but the pixels need no gradient, and the choice of codes none of its own."""
    own, batch = tokenizer(), images(world)[0]
    for side in (own.encoder, own.decoder):
        side.impl = "reference"
    patches, width = batch.num_samples * 36, own.config.embed_dim
    pixels = 2 * patches * 3 * own.config.patch_size**2 * width
    choice = 2 * patches * own.config.code_dim * own.config.num_codes
    assert own.work(batch).flops == 3 * forward_flops(own, batch.images) - pixels - 2 * choice
    teach(world, tmp_path, replace(TOKENIZER, peak_tflops=0.001))
    line = read_log(tmp_path)[-1]
    flops = own.work(batch).flops
    assert line["mfu"] == pytest.approx(flops * line["samples_per_s"] / 4 / 1e9, rel=1e-6)
