"""Products in 8 bits in a report: ceilings of their own, peers in 8 bits, errors side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beit3_fast.model.work import Product, Work
from beit3_fast.timing import Effort
from bench import ceilings, measure, peers, run
from bench import report as reports
from bench.baselines import OURS, REFERENCE, RUNTIMES
from bench.runtime import Runtime, int8_parity
from bench.speeds import peer_ratios, speed
from bench.workloads import Workload

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
OURS_INT8, PEER = f"{OURS}-int8", "openvino-int8"
CASE = {"workload": "image/tiny/32", "dtype": "bfloat16", "batch": 2}
WORK = Work(products=(Product(1000, 1000, 1000),), attention=1e9)


def measured_ceilings(**more: float) -> dict[str, Any]:
    return {
        "matmul_tflops": {"bfloat16": 2.0, **more},
        "tile_loop_tflops": {"bfloat16": 4.0, **{k: 2 * v for k, v in more.items()}},
        "copy_gbps": 1e6,
    }


def test_fractions_are_of_the_rates_of_the_products_and_attention_is_in_the_rows_dtype() -> None:
    seconds = 2e9 / 2e12 + 1e9 / 2e12
    plain = speed(CASE, WORK, "bfloat16", [seconds], measured_ceilings(), [seconds / 2])
    assert plain["ceiling_fraction"] == pytest.approx(1.0)
    assert plain["tile_loop_fraction"] == pytest.approx(0.5)
    assert plain["onednn_fraction"] == pytest.approx(0.5)
    seconds = 2e9 / 8e12 + 1e9 / 2e12
    rounded = speed(CASE, WORK, "int8", [seconds], measured_ceilings(int8=8.0), None)
    assert rounded["ceiling_fraction"] == pytest.approx(1.0)
    assert rounded["tile_loop_fraction"] == pytest.approx(0.5)
    assert rounded["floor_ms"] == pytest.approx(1e3 * seconds, rel=1e-3)


def test_without_a_rate_of_the_products_there_is_no_fraction() -> None:
    found = speed(CASE, WORK, "int8", [1e-3], measured_ceilings(), None)
    names = ("ceiling_fraction", "tile_loop_fraction", "floor_ms", "onednn_fraction")
    assert [found[name] for name in names] == [None] * 4


def test_ceilings_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MATMUL_SHAPES", ((64, 32, 48),))
    monkeypatch.setattr(ceilings, "_FC1_SHAPE", (64, 32, 48))
    monkeypatch.setattr(ceilings, "_COPY_BYTES", 1 << 16)
    for without in (False, True):
        if without:
            monkeypatch.setattr(ceilings, "onednn_multiplies", lambda dtype: False)
        found = ceilings.measure_ceilings([torch.int8], torch.device("cpu"), seconds=0.01)
        assert found["matmul_tflops"]["int8"] > 0
        assert found["tile_loop_tflops"]["int8"] > 0
        fc1 = found["expert_linear_fc1"]["int8"]
        assert fc1["tflops"] > 0
        assert fc1["tile_loop_fraction"] > 0


def test_fc1_and_the_tile_loop_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 operations in 2 seconds beside 400 in 1, in rounds that were slowed down by different factors; medians."""
    monkeypatch.setattr(ceilings, "_FC1_SHAPE", (3, 5, 10))

    def in_turn(calls: Any, effort: Effort) -> dict[str, list[float]]:
        assert list(calls) == ["fc1", "loop"]
        assert calls["loop"]() == 400
        slower = (1, 2, 4, 2, 2)
        return {"fc1": [2.0 * by for by in slower], "loop": [1.0 * by for by in slower]}

    monkeypatch.setattr(ceilings, "interleave", in_turn)
    found = ceilings.measure_fc1(torch.float32, lambda repeats: 200 * repeats, 0.01)
    assert found == {"tflops": 300 / 4 / 1e12, "tile_loop_fraction": 0.375}


def test_bare_products_in_int8_are_those_of_onednn() -> None:
    if not ceilings.onednn_multiplies(torch.int8):
        pytest.skip("oneDNN has no int8 products here")
    weight = ceilings._random(48, 32, torch.int8)
    x = ceilings._random_rows(Product(64, 32, 48)) // 2  # AVX2 adds pairs of products in 16 bits
    assert torch.equal(ceilings._int8_linear(weight)(x), x.float() @ weight.float().T)


def test_an_absent_operator_is_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(weight: torch.Tensor) -> None:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    monkeypatch.setattr(ceilings, "_int8_linear", absent)
    ceilings.onednn_multiplies.cache_clear()
    try:
        assert not ceilings.onednn_multiplies(torch.int8)
        assert ceilings.onednn_multiplies(torch.bfloat16)
    finally:
        ceilings.onednn_multiplies.cache_clear()


def test_int8_is_set_beside_int8_within_the_rounds() -> None:
    # The quotient of the medians would say 2 / 10.
    samples = {
        OURS: [4.0] * 3,
        OURS_INT8: [1.0, 10.0, 10.0],
        REFERENCE: [9.0] * 3,
        PEER: [2.0, 2.0, 20.0],
    }
    (row,) = peer_ratios(CASE, samples)
    assert row == {
        **CASE,
        "runtime": OURS_INT8,
        "against": PEER,
        "median": 2.0,
        "p20": pytest.approx(0.92),
        "p80": 2.0,
    }


def report_of(ours: float, peer: float) -> dict[str, Any]:
    """What the wording is made from: a row of ours and one of the peer with these errors, and a plain row."""
    return {
        "results": [
            {**CASE, "runtime": name, "products": to, "parity": {"rel_rms": e, "passed": True}}
            for name, to, e in (
                (OURS, "bfloat16", 0.01),
                (OURS_INT8, "int8", ours),
                (PEER, "int8", peer),
            )
        ]
    }


def test_the_verdict_names_the_errors_in_8_bits() -> None:
    said = peers.verdict(report_of(0.031, 0.035))
    assert said.startswith(
        "every row without rounded products is in parity; relative errors in int8"
    )
    assert "are 3.1e-02 to 3.5e-02, where the rule is at most 0.06" in said
    assert "above" not in said
    assert "1 of ours above that of a peer (marked)" in peers.verdict(report_of(0.036, 0.035))
    plain = report_of(0.031, 0.035)
    plain["results"] = plain["results"][:1]
    assert peers.verdict(plain) == "every row is in parity"


def rounded_stand_in(by: float) -> Runtime:
    """torchscale with its output's LayerNorm off by a factor, as if in int8."""

    def build(workload: Workload, weights: Any, dtype: torch.dtype, device: torch.device) -> Any:
        model: nn.Module = RUNTIMES[REFERENCE].build(workload, weights, dtype, device)
        with torch.no_grad():
            norm = getattr(model, "encoder").layer_norm.A  # noqa: B009
            norm.weight.mul_(1 + by)
            norm.bias.mul_(1 + by)
        return model

    return Runtime("a stand-in", build, lambda _: "-", judge=int8_parity, products="int8")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No seconds of measuring, no processes for the memory."""
    monkeypatch.setattr(measure, "measure_peak", lambda probe: 1.0)
    monkeypatch.setattr(ceilings, "MATMUL_SHAPES", ((64, 32, 48),))
    monkeypatch.setattr(ceilings, "_FC1_SHAPE", (64, 32, 48))
    monkeypatch.setattr(ceilings, "_COPY_BYTES", 1 << 16)
    for pace in run.EFFORTS:
        monkeypatch.setitem(run.EFFORTS, pace, Effort(0, 3, 0.0))
    monkeypatch.setattr(run, "physical_cores", torch.get_num_threads)


@pytest.mark.usefixtures("quick")
def test_a_report_with_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RUNTIMES, PEER, rounded_stand_in(0.004))
    names = (OURS, OURS_INT8, REFERENCE, PEER)
    chosen = ("--workloads", "image/tiny/32", "--dtypes", "fp32", "--batch", "2", "--runtimes")
    assert run.main(["--out", str(tmp_path), *chosen, *names]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"float32", "int8"} == report["ceilings"]["matmul_tflops"].keys()
    rows = {row["runtime"]: row for row in report["results"]}
    assert [rows[name]["products"] for name in names] == ["float32", "int8", "float32", "int8"]
    assert all(row["tile_loop_fraction"] > 0 for row in rows.values())
    assert rows[OURS_INT8]["ceiling_fraction"] > 0
    bare = {row["products"] for row in report["ceilings"]["onednn_products"]}
    assert bare == {"float32", *(["int8"] if ceilings.onednn_multiplies(torch.int8) else [])}
    assert {row["against"] for row in report["ratios"]} == set(names) - {OURS}
    (peer,) = report["peer_ratios"]
    assert (peer["runtime"], peer["against"]) == (OURS_INT8, PEER)
    text = (tmp_path / "report.md").read_text()
    for shown in (text, capsys.readouterr().out):
        assert "8 bits against 8 bits" in shown
        assert f"OVER {PEER}" in shown
        assert "of tile loop" in shown
        assert "every row without rounded products is in parity" in shown
    assert "every row is in parity" not in text

    earlier = copy.deepcopy(report)
    earlier["peer_ratios"][0]["median"] /= 2
    changes = reports.comparison(report, earlier)
    assert any(f"{OURS_INT8}'s ratio to {PEER}" in line and "+100.0%" in line for line in changes)


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("**/report.json")), ids=lambda p: p.parent.name
)
def test_committed_reports_of_any_version_are_read(path: Path) -> None:
    old = reports.load(path)
    assert len(reports.rows(old)) > len(old["results"])
    assert "Ceilings" in reports.text(old)
    assert reports.markdown(old)
    assert len(reports.comparison(old, old)) > len(old["results"])
