"""Decoding steps as one graph: the same captions on memory that stays; the graphs themselves are for ``make gpu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import randomize
from torch import Tensor

from beit3_fast.model import captioning, create_model, step_graph
from beit3_fast.model.decoding import CaptionDecoder

GPU = torch.cuda.is_available()
MASK = 91
NAME = "beit3_tiny_patch16_32_captioning"


def model_of(**options: Any) -> Any:
    model = randomize(create_model(NAME, **options))
    with torch.no_grad():
        model.mlm_head.weight *= 4
        model.mlm_head.bias[2] += 2.0
    return model


def photos(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Recorder:
    """Plays ``record`` without a GPU: a replay runs the step again and writes its output where the first one was."""

    def __init__(self) -> None:
        self.captured = self.replays = 0

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        self.captured += 1
        outputs: list[Tensor] = []

        def replay() -> Tensor:
            self.replays += 1
            output = run()
            if outputs:
                outputs[0].copy_(output)
            else:
                outputs.append(output.clone())
            return outputs[0]

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Decoders that capture their steps, as on a GPU; one attention call for all images."""
    own = Recorder()

    class Capturing(CaptionDecoder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.graphs, self.keep_is_free = True, False

    monkeypatch.setattr(step_graph, "record", own)
    monkeypatch.setattr(captioning, "CaptionDecoder", Capturing)
    return own


@pytest.mark.parametrize("impl", ["auto", "composite", "reference"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_captions(
    beams: int, impl: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = model_of(impl=impl)
    options: dict[str, Any] = {"num_beams": beams, "max_length": 12, "mask_id": MASK}
    expected = model.caption(photos(5), **options)
    own = request.getfixturevalue("recorder")
    found = model.caption(photos(5), **options)
    assert [c[0].tokens for c in found] == [c[0].tokens for c in expected]
    assert [c[0].score for c in found] == pytest.approx([c[0].score for c in expected], abs=1e-5)
    assert own.captured >= 1
    assert own.replays > 2


def test_what_stays_after_images_left_is_captured_again(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beit3_fast.generate.decoder._STEPS_BETWEEN_QUESTIONS", 1)
    model = model_of()
    options: dict[str, Any] = {"num_beams": 3, "max_length": 14, "mask_id": MASK}
    found = model.caption(photos(9), **options)
    assert recorder.captured > 1
    monkeypatch.undo()
    expected = model.caption(photos(9), **options)
    assert [c[0].tokens for c in found] == [c[0].tokens for c in expected]


@torch.no_grad()
def test_rows_of_every_step_beside_steps_without_a_graph(recorder: Recorder) -> None:
    """Beams that cross; the graph's steps read the whole cache, of which the future is hidden."""
    model = model_of()
    plain = CaptionDecoder(model, photos(2), 2, 8, 0, MASK)
    captured = captioning.CaptionDecoder(model, photos(2), 2, 8, 0, MASK)
    assert torch.equal(captured.start(), plain.start())
    generator = torch.Generator().manual_seed(2)
    for step in range(7):
        words = torch.randint(3, 90, (2, 2), generator=generator)
        parents = torch.randint(2, (2, 2), generator=generator) * (step > 0)
        if step == 4:  # the same images on other memory
            plain.keep(torch.arange(2))
            captured.keep(torch.arange(2))
        expected = plain.step(words, parents)
        torch.testing.assert_close(captured.step(words, parents), expected, rtol=1e-4, atol=1e-5)
    assert (captured.steps, captured.used) == (plain.steps, plain.used)
    assert torch.equal(captured.seen, plain.seen)
    assert recorder.captured == 2
    assert recorder.replays == 6


@torch.no_grad()
def test_where_it_cannot_be_captured_steps_go_on(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuse(run: Any, device: torch.device) -> Any:
        calls.append(1)
        raise RuntimeError("planted: operation not permitted when stream is capturing")

    monkeypatch.setattr(step_graph, "record", refuse)
    model = model_of()
    options: dict[str, Any] = {"num_beams": 3, "max_length": 9, "mask_id": MASK}
    found = model.caption(photos(2), **options)
    monkeypatch.undo()
    assert found == model.caption(photos(2), **options)
    assert len(calls) == 1, "it is tried once"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu(dtype: torch.dtype, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(num_heads=1).to(dtype).cuda()
    options: dict[str, Any] = {"num_beams": beams, "max_length": 12, "mask_id": MASK}
    real, graphs = step_graph.record, []

    def spy(*arguments: Any) -> Any:
        graphs.append(real(*arguments))
        return graphs[-1]

    monkeypatch.setattr(step_graph, "record", spy)
    found = model.caption(photos(9).to(dtype).cuda(), **options)
    assert graphs, "a step was captured"
    monkeypatch.setattr("beit3_fast.model.decoding.try_to_capture", lambda *_: None)
    expected = model.caption(photos(9).to(dtype).cuda(), **options)
    scores = [c[0].score for c in expected]
    assert [c[0].score for c in found] == pytest.approx(
        scores, abs=1e-5 if dtype == torch.float32 else 0.05
    )
