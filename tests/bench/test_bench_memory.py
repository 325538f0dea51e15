"""Peak memory beyond the parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import memory
from bench.memory import MemoryProbeFailed, Probe, measure_peak

MIB = 1 << 20


def allocate_and_free(mib: int) -> None:
    block = torch.empty(mib * MIB, dtype=torch.uint8)
    block.fill_(1)
    del block


def test_peak_sees_what_was_freed_again() -> None:
    before = memory._status("RssAnon")
    with memory._PeakAnonymous() as peak:
        allocate_and_free(96)
    assert 90 * MIB < peak.bytes - before < 130 * MIB
    with memory._PeakAnonymous() as small:
        allocate_and_free(4)
    assert small.bytes - before < 60 * MIB


def test_peak_is_watched_where_the_kernel_mark_cannot_be_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    before = memory._status("RssAnon")
    with memory._PeakAnonymous() as peak:
        block = torch.zeros(96 * MIB, dtype=torch.uint8).add_(1)
        for _ in range(20):
            block.add_(1)
    assert 90 * MIB < peak.bytes - before < 250 * MIB


def test_a_fresh_process_measures_one_runtime() -> None:
    figure = measure_peak(Probe("torchscale", "image/tiny/512", "float32", 4, threads=1))
    # One layer's scores, fp32: 4 samples x 4 heads x 1025 x 1025.
    assert 64 < figure < 1000


def test_a_probe_that_fails_says_so() -> None:
    with pytest.raises(
        MemoryProbeFailed, match=r"tensorrt on image/tiny/32 .*exit code 1.*KeyError"
    ):
        measure_peak(Probe("tensorrt", "image/tiny/32", "float32", 1, threads=1))
