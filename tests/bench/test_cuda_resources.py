"""The compiled CUDA kernels of the op library, read: no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from beit3_fast.ops import library
from bench import cuda_resources
from bench.cuda_resources import TABLE, Resources

CLEAN = Resources(
    registers=168,
    stack=0,
    local_accesses=0,
    hgmma=24,
    hmma=0,
    tma_loads=6,
    threads=384,
    shared=200_000,
    resident=1,
)
PORTABLE = replace(CLEAN, hgmma=0, hmma=32, tma_loads=0, threads=128, shared=40_000, resident=3)


@cache
def findings() -> list[dict[str, Any]]:
    if not library.build_info().get("cuda"):
        pytest.skip(f"there are no CUDA kernels: the library {library.why_without_cuda()}")
    try:
        return list(cuda_resources.examine())
    except cuda_resources.Unreadable as error:
        pytest.skip(str(error))


def test_the_code_of_every_kernel() -> None:
    broken = [
        f"{own['kernel']} for {own['architecture']}: {own['broken']}"
        for own in findings()
        if own["broken"]
    ]
    assert not broken, "\n".join(broken)


def test_every_kernel_is_there_for_the_architectures_that_it_is_written_for() -> None:
    found = {(own["architecture"], cuda_resources.base_name(own["kernel"])) for own in findings()}
    built = [f"sm_{arch}" for arch in library.build_info()["cuda_architectures"].split()]
    expected = {(arch, "attend_portable") for arch in built}
    expected |= {(arch, "moments") for arch in built}
    if "sm_90a" in built:
        expected |= {("sm_90a", name) for name in cuda_resources.HOPPER}
    assert expected <= found


def test_the_committed_table_names_every_kernel() -> None:
    names = [f"| {own['architecture']} | `{own['kernel']}` |" for own in findings()]
    assert [name for name in names if name not in TABLE.read_text()] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 8}, "stack"),
        ({"local_accesses": 2}, "local memory"),
        ({"shared": 232_456}, "shared memory"),
        ({"shared": 120_000, "resident": 2}, "shared memory"),
        ({"threads": 400}, "registers"),
        ({"hgmma": 0}, "HGMMA"),
        ({"hmma": 16}, "HMMA"),
        ({"tma_loads": 0}, "TMA"),
    ],
)
def test_each_rule_can_be_broken(changes: dict[str, int], words: str) -> None:
    assert CLEAN.broken("attend_whole<BFloat16, 64, 200>", "90a") == []
    broken = replace(CLEAN, **changes).broken("attend_whole<BFloat16, 64, 200>", "90a")
    assert any(words in figure for figure in broken)


@pytest.mark.parametrize("changes", [{"hmma": 0}, {"hgmma": 8}, {"shared": 101_384}])
def test_the_rules_of_the_portable_kernels(changes: dict[str, int]) -> None:
    assert PORTABLE.broken("attend_portable<BFloat16, 64>", "80") == []
    assert replace(PORTABLE, **changes).broken("attend_portable<BFloat16, 64>", "80")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (
            "void beit3_fast::cuda::attend_whole<beit3_fast::cuda::BFloat16, 64, 200>"
            "(beit3_fast::cuda::AttentionMaps, beit3_fast::cuda::AttentionCall)",
            "attend_whole<BFloat16, 64, 200>",
        ),
        (
            "void beit3_fast::cuda::multiply_experts<beit3_fast::cuda::Float16, true>(int)",
            "multiply_experts<Float16, true>",
        ),
        ("beit3_fast::cuda::(anonymous namespace)::moments(float*)", "moments"),
    ],
)
def test_names_of_kernels(said: str, name: str) -> None:
    assert cuda_resources.short_name(said) == name
