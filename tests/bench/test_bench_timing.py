"""Interleaving, quantiles, ratios, ceilings and the count of the work."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit3_fast.config import SIZES
from beit3_fast.model.work import Product, encoder_work, linear_work
from beit3_fast.timing import Effort, interleave, quantiles, rates, speed_ups
from bench.ceilings import BareProducts, measure_ceilings
from bench.torchscale_heads import MODELS
from bench.workloads import parse_workload, step


def test_rounds_are_interleaved_and_warmup_is_not_counted() -> None:
    calls: list[str] = []
    ticks = itertools.count()
    samples = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        Effort(warmup=1, rounds=3, seconds=0.0),
        clock=lambda: float(next(ticks)),
    )
    assert "".join(calls) == "ab" + "ababab"
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_rounds_go_on_for_the_given_time_and_no_longer_than_most() -> None:
    ticks = itertools.count()
    clock = lambda: float(next(ticks))  # noqa: E731
    long = interleave({"a": int}, Effort(0, rounds=2, seconds=30.0, most=50), clock=clock)
    assert 5 < len(long["a"]) < 20
    most = interleave({"a": int}, Effort(0, rounds=2, seconds=1e9, most=4), clock=clock)
    assert len(most["a"]) == 4


def test_synchronization_is_part_of_each_sample() -> None:
    now = [0.0]

    def wait() -> None:
        now[0] += 5.0

    samples = interleave({"a": int}, Effort(0, 2, 0.0), synchronize=wait, clock=lambda: now[0])
    assert samples["a"] == [5.0, 5.0]


def test_quantiles_and_rates() -> None:
    q = quantiles([4.0, 1.0, 3.0, 2.0, 5.0, 6.0])
    assert (q.p20, q.p50, q.p80) == (2.0, 3.5, 5.0)
    r = rates([0.5, 1.0, 2.0], batch=8)
    assert r.p50 == 8.0
    assert r.p20 < r.p50 < r.p80
    with pytest.raises(ValueError, match="at least one"):
        quantiles([])


def test_speed_up_is_the_median_of_ratios_within_rounds() -> None:
    # The machine becomes ten times slower in the last rounds: the ratio of medians would say 20.
    ours, other = [1.0, 1.0, 10.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0, 20.0]
    assert speed_ups(ours, other).p50 == 2.0
    assert speed_ups([1.0, 2.0, 4.0], [4.0, 4.0, 4.0]).p50 == 2.0
    with pytest.raises(ValueError, match="same rounds"):
        speed_ups([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("size", "pixels", "text", "read", "expected"),
    [
        ("base", 224, 0, None, 35.1),
        ("base", 384, 0, None, 111.0),
        ("base", 480, 12, 1, 173.6),
        ("base", 480, 64, 1, 185.1),
        ("large", 224, 0, None, 123.1),
        ("large", 480, 12, 1, 612.0),
    ],
)
def test_counted_work_meets_the_published_figures(
    size: str, pixels: int, text: int, read: int | None, expected: float
) -> None:
    config = SIZES[size].replace(img_size=pixels)
    tokens = config.num_vision_tokens
    patches = 2 * (tokens - 1) * 3 * 16**2 * config.embed_dim
    rows = None if read is None else [read]
    flops = patches + encoder_work(config, tokens, [text], read=rows).flops
    assert flops / 1e9 == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ["image/tiny/32", "pair/tiny/64"])
def test_counted_work_is_what_torchscale_computes_without_padding(name: str) -> None:
    workload = parse_workload(name)
    inputs = workload.inputs(1)
    model = MODELS[workload.task.model](workload.config)
    with FlopCounterMode(display=False) as counter:
        step(model, workload, inputs)
    assert workload.flops(inputs) == counter.get_total_flops()


def test_work_does_not_grow_with_padding_and_counts_what_a_caption_may_see() -> None:
    config = SIZES["tiny"]
    one, other, both = (encoder_work(config, 5, texts).flops for texts in ([7], [3], [7, 3]))
    assert both == one + other
    bidirectional, causal = (encoder_work(config, 5, [7], seq2seq=s).flops for s in (False, True))
    # Of 12 x 12 scores the mask leaves 5 x 5 + 7 x 5 + 28.
    assert bidirectional - causal == config.num_layers * 4 * config.embed_dim * (144 - 88)
    assert linear_work(2, 3, 5, 7).flops == 2 * 2 * (3 * 5 + 5 * 7)


def test_ceilings_have_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.ceilings.MATMUL_SHAPES", ((64, 32, 48),))
    monkeypatch.setattr("bench.ceilings._COPY_BYTES", 1 << 20)
    found = measure_ceilings([torch.float32, torch.bfloat16], torch.device("cpu"), seconds=0.01)
    assert set(found["matmul_tflops"]) == {"float32", "bfloat16"}
    assert found["copy_gbps"] > 0


def test_bare_products_are_those_of_the_real_rows() -> None:
    workload = parse_workload("pair/tiny/64")
    config, inputs = workload.config, workload.inputs(3)
    work = workload.work(inputs)
    text = int((~inputs["text_padding_position"]).sum())
    width, ffn, layers = config.embed_dim, config.ffn_dim, config.num_layers
    assert Product(3 * 16, 3 * 16**2, width) in work.products
    for rows in (3 * config.num_vision_tokens, text):
        assert Product(rows, width, 3 * width, layers) in work.products
        assert Product(rows, width, width, layers) in work.products
        assert Product(rows, width, ffn, layers) in work.products
        assert Product(rows, ffn, width, layers) in work.products
    assert len(work.products) == 9
    products = BareProducts(work, torch.float32)
    with FlopCounterMode(display=False) as counter:
        products()
    assert len(products._calls) == 1 + 8 * layers
    assert counter.get_total_flops() <= sum(p.flops for p in work.products)


def test_last_layer_has_products_of_the_rows_that_are_read() -> None:
    workload = parse_workload("vqa/tiny/32")
    width, products = workload.config.embed_dim, workload.work(workload.inputs(4)).products
    assert Product(4, width, width, 2) in products
    assert Product(4 * workload.config.num_vision_tokens, width, 2 * width) in products
    assert Product(4, width, 2 * width) in products
    assert Product(4, 2 * width, 3129) in products


def test_dtypes_that_onednn_lacks_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not on this CPU")

    monkeypatch.setattr("bench.ceilings._packed_linear", refuse)
    work = parse_workload("image/tiny/32").work(parse_workload("image/tiny/32").inputs(1))
    BareProducts(work, torch.bfloat16)()
