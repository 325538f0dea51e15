"""How fast a run says it is: counted work, measured time, a peak that is given or measured; the same for TensorBoard."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_cases import CODES, OPTIONS, config, data, model, run

from beit3_fast.data.mixed import Mix
from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.errors import ConfigError
from beit3_fast.model import BEiT3ForPretraining, BEiT3ForRetrieval, BEiT3ForVisualQuestionAnswering
from beit3_fast.train import MaskedDataModelling, TrainOptions, read_log
from beit3_fast.train import throughput as speed
from beit3_fast.train.throughput import Throughput

REFERENCE = "reference"


def pairs(count: int, tokens: int, pixels: int) -> PairBatch:
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(4, 90, (count, tokens), generator=draw)
    image = torch.randn(count, 3, pixels, pixels, generator=draw)
    return PairBatch(image, text, torch.zeros(count, tokens, dtype=torch.bool))


def forward_flops(model: torch.nn.Module, *inputs: Any, **options: Any) -> int:
    """What PyTorch counts, with attention written out."""
    model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(*inputs, **options)
    return counter.get_total_flops()


def test_counted_work_of_a_step_is_three_forwards_but_the_pixels(world: Path) -> None:
    own = config(world)
    batch, mixed = pairs(3, 7, own.image_shape[0]), data(world, Mix(image=2, text=2, pair=2))[0]
    pixels = 2 * (own.num_vision_tokens - 1) * 3 * own.patch_size**2 * own.embed_dim
    answering = BEiT3ForVisualQuestionAnswering(own.replace(normalize_output=False), 11, REFERENCE)
    flops = forward_flops(answering, batch.image, batch.tokens, batch.padding)
    assert answering.work(batch).flops == 3 * flops - 3 * pixels
    finding = BEiT3ForRetrieval(own, REFERENCE)
    flops = forward_flops(finding, batch.image, batch.tokens, batch.padding, only_infer=True)
    assert finding.work(batch).flops == 3 * flops - 3 * pixels
    masked = BEiT3ForPretraining(own, CODES, REFERENCE)
    assert masked.work(mixed).flops == 3 * forward_flops(masked, mixed) - 4 * pixels


def test_a_run_says_how_fast_it_is(world: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, peak_tflops=0.001)
    run(world, tmp_path, options)
    micro = [data(world)[n] for n in (14, 15)]
    flops = sum(model(world, attention="shared").work(batch).flops for batch in micro)
    last = read_log(tmp_path)[-1]
    seconds = 14 / last["samples_per_s"]
    assert last["mfu"] == pytest.approx(flops / seconds / 1e9, rel=1e-6)
    said = Throughput.said(last)
    assert said == f"{last['samples_per_s']:.1f} samples/s, MFU {last['mfu']:.1%}"
    assert Throughput.said({"samples_per_s": 2.0}) == "2.0 samples/s"


def test_several_devices_can_do_as_much_more(world: Path) -> None:
    options = TrainOptions(peak_tflops=0.5)
    one, four = (Throughput(model(world), options, devices) for devices in (1, 4))
    done = {"samples": 8.0, "flops": 1e12}
    assert one.of(done, 4.0) == {"samples_per_s": 2.0, "mfu": 0.5}
    assert four.of(done, 4.0) == {"samples_per_s": 2.0, "mfu": 0.125}


def test_the_peak_is_measured_once_and_draws_no_number_of_the_run(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_SIDE", {"cpu": 64})
    speed.measured_peak.cache_clear()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = Throughput(model(world), TrainOptions())
    assert first._peak is not None
    assert first._peak > 1e6
    assert Throughput(model(world), TrainOptions())._peak == first._peak
    torch.manual_seed(0)
    speed.measured_peak.cache_clear()
    speed.measured_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert Throughput(torch.nn.Linear(1, 1), TrainOptions()).done([]) == {"samples": 0}
    speed.measured_peak.cache_clear()


@pytest.mark.parametrize("quick", [torch.bfloat16, torch.float32, "expert_linear"])
def test_the_peak_is_of_the_fastest_product(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but one wait; PyTorch's own bfloat16 does where the processor has none."""
    bare, grouped, seconds = torch.mm, speed.expert_linear, 0.05

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds * (a.dtype != quick))
        return bare(a, b)

    def own(*operands: Any, **options: Any) -> torch.Tensor:
        assert operands[0].dtype == torch.bfloat16
        time.sleep(seconds * (quick != "expert_linear"))
        return grouped(*operands, **options)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(speed, "expert_linear", own)
    monkeypatch.setattr(speed, "_SIDE", {"cpu": 64})
    speed.measured_peak.cache_clear()
    assert speed.measured_peak(torch.device("cpu"), torch.bfloat16) > 2 * 64**3 / seconds * 2
    speed.measured_peak.cache_clear()


def test_tensorboard_gets_the_numbers_of_the_log(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.place, self.scalars, self.closed = (folder, purge_step), [], False
            made.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((step, name, value))

        def close(self) -> None:
            self.closed = True

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(world, tmp_path, replace(OPTIONS, tensorboard=True))
    (writer,) = made
    assert writer.place == (str(tmp_path / "tensorboard"), 1)
    assert writer.closed
    expected = [
        (line["step"], key, value)
        for line in read_log(tmp_path)
        for key, value in line.items()
        if key != "step"
    ]
    assert writer.scalars == expected


def test_tensorboard_that_is_not_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ConfigError, match=r"needs the package tensorboard .*pip install tensorboard"
    ):
        run(world, tmp_path, replace(OPTIONS, tensorboard=True), objective=MaskedDataModelling())
