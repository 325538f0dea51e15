"""The cost model by hand, its floors and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_fast.config import SIZES
from beit3_fast.errors import ConfigError
from beit3_fast.model.work import (
    Product,
    Work,
    attention_scores,
    embedding_work,
    encoder_work,
    linear_work,
    training_work,
)
from bench import events, roofline
from bench import report as reports
from bench.cost_model import (
    GPUS,
    Cost,
    Rates,
    attention_backward_cost,
    attention_cost,
    cross_entropy_backward_cost,
    cross_entropy_cost,
    floor,
    gpu,
    launches,
    linear_backward_costs,
    linear_cost,
    measured,
    patch_embedding_cost,
    tile_share,
    workload_floor,
)

FACTS = Rates({"bfloat16": 790.0}, 4300.0, "measured elsewhere")


def test_a_product_by_hand() -> None:
    # 3 rows of 5 numbers, 7 outputs: 3 * 5 + 7 * 5 + 3 * 7 numbers, 3 * 7 more for the residual.
    assert linear_cost(Product(3, 5, 7), 2.0) == Cost(2 * 3 * 5 * 7, 2 * (15 + 35 + 21))
    assert linear_cost(Product(3, 5, 7, residual=True), 2.0).bytes == 2 * (15 + 35 + 42)
    assert linear_cost(Product(3, 5, 7, times=4), 2.0) == Cost(4 * 210, 4 * 142)
    # Float8 operands, a result in both forms, a residual in bf16.
    eighth = linear_cost(Product(3, 5, 7, residual=True), 1.0, 3.0)
    assert eighth.bytes == 15 + 35 + 3 * 21 + 2 * 21


def test_gradients_of_a_product_by_hand() -> None:
    # Rows [3, 5], weights [7, 5], result [3, 7]: each launch reads two of them and writes the third's gradient.
    of_rows, of_weights = linear_backward_costs(Product(3, 5, 7), 2.0)
    assert of_rows == of_weights == Cost(210, 2 * (15 + 35 + 21))
    # GELU's slope is that at the pre-activation, 3 x 7 numbers more.
    assert linear_backward_costs(Product(3, 5, 7), 2.0, gelu=True)[0].bytes == 2 * (15 + 35 + 42)
    assert linear_backward_costs(Product(3, 5, 7, times=4), 2.0)[1] == Cost(840, 8 * 71)


def test_an_attention_by_hand() -> None:
    # Two samples of 3 tokens and 8 columns: two products of 3 x 3 x 8, four tensors of 6 x 8.
    assert attention_cost(2 * 9, 6, 8, "bfloat16") == Cost(2 * 2 * 2 * 9 * 8, 2 * 4 * 6 * 8)
    # Scores again, then the slopes of probabilities, queries, keys and values; five tensors read and three written.
    backward = attention_backward_cost(2 * 9, 6, 8, "bfloat16")
    assert backward == Cost(5 * 2 * 2 * 9 * 8, 2 * 8 * 6 * 8)


@pytest.mark.parametrize(("vision", "text"), [(3, 0), (0, 4), (5, 3)])
def test_scores_of_a_mask_are_those_that_the_op_lets_through(vision: int, text: int) -> None:
    place = torch.arange(vision + text)
    earlier = place[None, :] <= place[:, None]
    seen = {
        "bidirectional": torch.ones_like(earlier),
        "causal": earlier,
        "seq2seq": earlier | (place < vision)[None, :],
    }
    for mask, allowed in seen.items():
        assert attention_scores(vision, text, mask) == int(allowed.sum())
    with pytest.raises(ConfigError, match="bidirectional, seq2seq or causal, got 'prefix'"):
        attention_scores(vision, text, "prefix")


def test_a_head_by_hand() -> None:
    # 3 rows of 5 numbers, 7 classes: the logits are not written; their gradient needs them again.
    assert cross_entropy_cost(3, 5, 7, "bfloat16") == Cost(210, 2 * (15 + 35))
    assert cross_entropy_backward_cost(3, 5, 7, "bfloat16") == Cost(3 * 210, 2 * 2 * (15 + 35))


def test_a_patch_embedding_by_hand() -> None:
    # Two images of 2 x 2 patches of 16 x 16 x 3: pixels and weights in, positions of one image in, rows out.
    config = SIZES["tiny"]
    cost = patch_embedding_cost(config, 2, "bfloat16")
    assert cost == Cost(2 * 8 * 768 * 64, 2 * (8 * 768 + 64 * 768 + 4 * 64 + 8 * 64))


def test_a_workload_by_hand() -> None:
    config = SIZES["tiny"]
    width, ffn, layers = config.embed_dim, config.ffn_dim, config.num_layers
    work = encoder_work(config, 5, [7, 2])
    found = launches(work, "bfloat16")
    rows = 5 + 5 + 7 + 2
    # Both experts are one launch: their rows together, their weights each.
    assert found[0] == Cost(
        layers * 2.0 * rows * width * 3 * width,
        layers * 2.0 * (rows * width + 2 * width * 3 * width + rows * 3 * width),
    )
    fc2 = 2.0 * (rows * ffn + 2 * width * ffn + 2 * rows * width)
    assert found[3].bytes == layers * fc2
    assert found[4] == Cost(layers * 4.0 * width * (144 + 49), layers * 2.0 * 4 * rows * width)
    assert len(found) == 5
    assert sum(cost.flops for cost in found) == work.flops
    rates = Rates({"bfloat16": 1e-3}, 1e3, "by hand")
    assert workload_floor(work, rates, "bfloat16") == pytest.approx(work.flops / 1e9)
    slow = Rates({"bfloat16": 1e9}, 1.0, "by hand")
    assert workload_floor(work, slow, "bfloat16") == pytest.approx(
        sum(c.bytes for c in found) / 1e9
    )


def test_the_last_layer_moves_what_is_read() -> None:
    config = SIZES["tiny"]
    width, layers = config.embed_dim, config.num_layers
    work = encoder_work(config, 5, [7], read=[2])
    assert work.attention_values == 4 * width * (layers - 1) * 12 + 2 * width * (12 + 2)
    pixels = embedding_work(config, 1)
    step = training_work(pixels, work)
    assert step.attention_values == 3 * work.attention_values
    assert step.flops == 2 * pixels.flops + 3 * work.flops
    # The floor has the scores that the op makes again, as the op's own row has.
    one = encoder_work(config, 5, [0, 0])
    attention = launches(training_work(Work(), one), "bfloat16")[-1]
    scores, rows, width = 2 * 25 * config.num_layers, 10 * config.num_layers, config.embed_dim
    of_ops = attention_cost(scores, rows, width, "bfloat16")
    assert attention == of_ops + attention_backward_cost(scores, rows, width, "bfloat16")
    # Of a residual only the forward reads something.
    residuals = [product.residual for product in step.products]
    assert sum(residuals) == sum(product.residual for product in work.products)


def test_giant_multiplies_its_shared_and_its_third_weights_once() -> None:
    tiny = SIZES["tiny"].replace(num_layers=4, attention="shared", vl_expert_layers=3)
    width, ffn = tiny.embed_dim, tiny.ffn_dim
    pairs = encoder_work(tiny, 5, [7, 2])
    rows, own = 5 + 5 + 7 + 2, (5 + 5, 7 + 2)
    assert pairs.products[0] == Product(rows, width, 3 * width, 4)
    assert Product(own[0], width, ffn, 1) in pairs.products
    assert Product(rows, width, ffn, 3) in pairs.products
    assert pairs.flops == encoder_work(SIZES["tiny"].replace(num_layers=4), 5, [7, 2]).flops
    read = encoder_work(tiny, 5, [7, 2], read=[1, 1])
    assert Product(rows, width, ffn, 2) in read.products
    images = encoder_work(tiny, 5, [0, 0])
    assert {product.rows for product in images.products} == {10}


def test_a_chain_of_linear_layers() -> None:
    assert linear_work(3, 5, 7, 2).products == (Product(3, 5, 7), Product(3, 7, 2))


def test_floors_are_those_of_an_independent_reckoning() -> None:
    """21,725 images a second for base at 224 pixels with five kernels a layer, which another sheet says."""
    config, batch = SIZES["base"], 256
    work = embedding_work(config, batch) + encoder_work(config, 197, [0] * batch)
    assert batch / workload_floor(work, FACTS, "bfloat16") == pytest.approx(21_725, rel=0.01)
    qkv = floor(linear_cost(Product(50_432, 768, 2304), 2.0), FACTS, "bfloat16")
    assert (qkv.products, qkv.memory) == (
        pytest.approx(226e-6, rel=0.005),
        pytest.approx(73e-6, rel=0.01),
    )
    short = floor(attention_cost(197 * 197, 197, 768, "bfloat16"), FACTS, "bfloat16")
    assert short.bound == "memory"
    assert short.seconds == pytest.approx(0.28e-6, rel=0.02)


def test_a_measured_ceiling_takes_the_place_of_the_sheet() -> None:
    sheet = GPUS["h200"].rates
    found = measured({"matmul_tflops": {"bfloat16": 700.0}, "copy_gbps": 4100.0}, sheet)
    assert found is not None
    assert (found.tflops["bfloat16"], found.tflops["float8"], found.gbps) == (700.0, 1978.9, 4100.0)
    assert "measured: bfloat16, memory" in found.source
    assert measured({"matmul_tflops": {}, "copy_gbps": None}) is None
    assert measured({"matmul_tflops": {}, "copy_gbps": None}, sheet) == sheet
    for spoiled in ({"copy_gbps": "x"}, {"matmul_tflops": {"bfloat16": [1]}}, {"copy_gbps": -1}):
        with pytest.raises(ConfigError, match="must be a positive number or null, got"):
            measured(spoiled, sheet)
    with pytest.raises(ConfigError, match="matmul_tflops must be an object, got 3"):
        measured({"matmul_tflops": 3}, sheet)
    with pytest.raises(ConfigError, match="a100, h100"):
        gpu("h300")
    with pytest.raises(ConfigError, match="no rate of float8"):
        floor(Cost(1, 1), GPUS["a100"].rates, "float8")


def test_the_useful_part_of_tiles_is_read_from_the_shipped_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = {"block_q": 64, "block_k": 64, "whole": 224}
    long = {"block_q": 128, "block_k": 64}
    tiles = {"shared_attention": {"short": short, "long": long}}
    backward = {"block_q": 32, "block_k": 64}
    tiles["shared_attention"] |= {"wide long": {"block_q": 64, "block_k": 64}, "backward": backward}
    monkeypatch.setattr("bench.cost_model._tiles.read", lambda name: tiles)
    assert tile_share(197, "sm_90") == pytest.approx(197 * 197 / (256 * 224))
    assert tile_share(577, "sm_90") == pytest.approx(577 * 577 / (640 * 640))
    assert tile_share(901, "sm_90") == pytest.approx(901 * 901 / (1024 * 960))
    assert tile_share(577, "sm_90", head_width=88) == pytest.approx(577 * 577 / (640 * 640))
    assert tile_share(197, "sm_90", backward=True) == pytest.approx(197 * 197 / (224 * 256))
    short["whole"] = 0
    assert tile_share(197, "sm_90") == pytest.approx(197 * 197 / (256 * 256))


def test_the_sheet_lists_every_op_mask_and_size() -> None:
    rows = roofline.op_rows(GPUS["h200"].rates)
    for size in ("base", "large", "giant"):
        named = " ".join(row["op"] for row in rows if row["size"] == size)
        for words in (
            "patch embedding",
            "gradient of rows",
            "gradient of weights",
            "attention backward",
            "seq2seq",
            "causal",
            "64,010 classes, backward",
            "8,192 classes",
        ):
            assert words in named


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--workload", "vqa/tiny/32", "--batch", "2"]
    assert roofline.main(["--gpu", "a100", *own]) == 0
    shown = capsys.readouterr().out
    assert "A100" in shown
    assert "vqa/tiny/32" in shown
    report = {"schema": 1, "environment": {}, "results": [], "ratios": []}
    ceilings = {"matmul_tflops": {"bfloat16": 500.0}, "copy_gbps": 3000.0}
    (tmp_path / "report.json").write_text(json.dumps(report | {"ceilings": ceilings}))
    command = ["--gpu", "h200", *own, "--json", "--report", str(tmp_path / "report.json")]
    assert roofline.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tflops"]["bfloat16"], found["gbps"]) == (500.0, 3000.0)
    assert found["workloads"][0]["floor_ms"] > 0
    assert roofline.main(["--workload", "image/giant/224", "--batch", "1"]) == 0
    assert "image/giant/224" in capsys.readouterr().out
    assert roofline.main(["--gpu", "h300", *own]) == 2
    assert "unknown GPU" in capsys.readouterr().err


def test_the_document_holds_what_the_command_says() -> None:
    text = roofline.DOCUMENT.read_text(encoding="utf-8")
    rates = GPUS["h200"].rates
    for rows in (roofline.op_rows(rates), roofline.tile_rows()):
        for line in roofline._table(rows):
            assert line in text


@pytest.mark.full
def test_the_document_is_current() -> None:
    assert roofline.DOCUMENT.read_text(encoding="utf-8") == roofline.document()


def test_a_report_sets_the_time_beside_the_floor() -> None:
    row: dict[str, Any] = {
        "workload": "image/base/224",
        "runtime": "beit3_fast",
        "impl": "cuda",
        "dtype": "bfloat16",
        "device": "cuda",
        "batch": 1,
        "samples_per_s": {"p20": 1.0, "p50": 1.0, "p80": 1.0},
        "latency_ms": 12.5,
        "floor_ms": 9.25,
        "peak_memory_mib": None,
        "ceiling_fraction": None,
        "parity": {"max_abs": 0.0, "rel_rms": 0.0, "baseline_rel_rms": 0.0, "passed": True},
    }
    header, line = reports.rows({"results": [row], "ratios": []})
    assert line[header.index("floor ms")] == "9.25"
    assert line[header.index("ms")] == "12.5"


class Stream:
    """CUDA events on a clock that calls move; each wait is noted."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []  # type: float, list[str]

    def event(self, enable_timing: bool) -> Stream.Event:
        assert enable_timing
        return Stream.Event(self)

    class Event:
        def __init__(self, stream: Stream) -> None:
            self.stream, self.at = stream, 0.0

        def record(self) -> None:
            self.at = self.stream.now

        def synchronize(self) -> None:
            self.stream.log.append("wait")

        def elapsed_time(self, other: Stream.Event) -> float:
            return 1e3 * (other.at - self.at)


def test_a_round_on_a_gpu_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: stream.log.append("start"))

    def call(name: str, seconds: float) -> None:
        stream.log.append(name)
        stream.now += seconds

    calls = {"a": lambda: call("a", 2.0), "b": lambda: call("b", 3.0)}
    effort = events.Effort(warmup=1, rounds=2, seconds=0.0)
    samples = events.timed_rounds(calls, effort, torch.device("cuda"))
    assert samples == {"a": [2.0, 2.0], "b": [3.0, 3.0]}
    assert stream.log == ["a", "b", "start", "a", "b", "wait", "a", "b", "wait"]


def test_work_adds_what_attention_moves() -> None:
    both = Work((), 1.0, 2.0) + Work((), 3.0, 4.0)
    assert (both.attention, both.attention_values) == (4.0, 6.0)
