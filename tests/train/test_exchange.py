"""What two processes send each other, and when: sums of gradients, in float32, once a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from train_cases import OPTIONS, data, small

from beit3_fast.train import MaskedDataModelling, parallel
from beit3_fast.train.processes import joined

NAME = "beit3.encoder.layers.0.ffn.A.fc1.weight"
PRECISIONS = {"ddp": "float32", "fsdp2": "bfloat16"}


def gradients(world: Path, engine: str, rank: int) -> list[Tensor | None]:
    """Of one weight, as this process has it after each of its two micro-batches of a step."""
    found: list[Tensor | None] = []
    with joined() as processes:
        options = replace(OPTIONS, parallel=engine, precision=PRECISIONS[engine])
        own = small(world)
        run = parallel.engine_for(own, options, processes)
        for number in range(2):
            batch = data(world)[2 * rank + number]
            with run.micro_batch(last=number == 1):
                share, _ = MaskedDataModelling()(run.called, run.moved(batch), batch.counts)
                run.backward(share)
            gradient = own.get_parameter(NAME).grad
            found.append(None if gradient is None else parallel.local(gradient).clone())
    return found


@pytest.mark.parametrize("engine", PRECISIONS)
def test_gradients_are_exchanged_once_a_step(engine: str, world: Path, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        return gradients(world, engine, rank)

    (first, summed), (other, its_summed) = on_ranks(2, tmp_path, work)
    if engine == "ddp":
        assert not torch.equal(first, other), "before the last micro-batch each has its own"
        assert torch.equal(summed, its_summed)
        return
    assert first is None
    assert other is None, "the parts of a gradient are made by the exchange"
    both = torch.cat([summed, its_summed])
    assert both.dtype == torch.float32
    assert not torch.equal(both, both.bfloat16().float()), "it was added in bfloat16"
