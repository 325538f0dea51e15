"""The figures of single ops in small: every group runs, counts its work, and says why a call did not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import DEVICE, on_device  # noqa: F401
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.timing import Effort
from bench.micro import figures

CPU = torch.device("cpu")
ONCE = Effort(0, 1, 0.0, 1)


@pytest.mark.parametrize("figure", figures.GROUPS)
def test_every_group_runs_in_small(figure: str, tmp_path: Path) -> None:
    pytest.importorskip("triton_cases")
    path = tmp_path / "out" / "figure.json"
    assert figures.main([figure, "--device", "cpu", "--small", "--out", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["figure"] == figure
    rows = {row["runtime"]: row for row in content["rows"]}
    assert set(figures.IMPLS) < set(rows)
    for impl in ("triton", "composite"):
        assert rows[impl]["ms"] > 0, rows[impl]
        assert (rows[impl]["tflops"] is None) == (figure == "latency")
    assert "CUDA" in rows["cuda"]["reason"] or "cuda" in rows["cuda"]["reason"]


def test_what_is_timed_gives_the_same_answer() -> None:
    pytest.importorskip("triton_cases")
    images = figures.attention_groups(CPU, True)[0]
    for group in (*figures.product_groups(CPU, True), images):
        truth = group.calls["composite"]()
        torch.testing.assert_close(group.calls["triton"](), truth, atol=1e-2, rtol=1e-2)
    # [B, H, N, D], where ours has a row for each token.
    found = images.calls["sdpa-flash"]().transpose(1, 2).flatten(0, 1).flatten(1)
    torch.testing.assert_close(found, images.calls["composite"](), atol=1e-2, rtol=1e-2)


def test_the_work_is_that_of_the_useful_operations() -> None:
    product = figures.product_groups(CPU, True)[0]
    assert product.flops == 2 * 37 * 32 * 64
    attention = figures.attention_groups(CPU, True)[1]
    assert attention.flops == 4 * 2 * 17 * 17 * 2 * 64


def test_a_call_that_cannot_run_is_a_row_with_its_reason() -> None:
    def absent() -> None:
        raise ModuleNotFoundError("flash_attn is not installed")

    group = figures.Group("some", 10.0, {"here": int, "there": absent})
    here, there = figures.measure(group, CPU, ONCE)
    assert here["ms"] is not None
    assert there["ms"] is None
    assert there["reason"] == "flash_attn is not installed"


def test_operands_lie_on_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numbers ("meta"), as no other device may be at hand."""
    devices: set[str] = set()

    def seen(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, **_: Any) -> None:
        devices.update((q.device.type, k.device.type, v.device.type, layout.device.type))

    monkeypatch.setattr(figures, "shared_attention", seen)
    for group in figures.attention_groups(torch.device("meta"), small=True):
        group.calls["triton"]()
    assert devices == {"meta"}


def test_products_by_clusters_are_launched_with_what_the_op_would_give(on_device: Any) -> None:  # noqa: F811
    for group in figures.product_groups(torch.device(DEVICE), small=True):
        truth = group.calls["composite"]()
        for most in figures.MOST_BLOCKS:
            found = group.calls[f"cuda, {most} block{'s' * (most > 1)} a cluster"]()
            torch.testing.assert_close(found, truth, atol=1e-2, rtol=1e-2)
