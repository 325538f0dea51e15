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
    multicasts=0,
    threads=384,
    shared=200_000,
    resident=1,
    cluster=1,
)
PORTABLE_KERNELS = (
    "attend_portable",
    "multiply_experts_portable",
    "attend_cached",
    "score_classes",
)
PORTABLE = replace(CLEAN, hgmma=0, hmma=32, tma_loads=0, threads=128, shared=40_000, resident=3)


@cache
def findings(number: str) -> list[dict[str, Any]]:
    """Of the kernels for one architecture, such as "90"."""
    built = library.build_info().get("cuda_architectures", "").split()
    if number not in [arch.rstrip("af") for arch in built]:
        pytest.skip(f"no CUDA kernels for sm_{number}: the library {library.why_without_cuda()}")
    try:
        return list(cuda_resources.examine(number=number))
    except cuda_resources.Unreadable as error:
        pytest.skip(str(error))


def test_the_sources_compile_where_nvcc_does() -> None:
    """A build without CUDA kernels goes on; the gate does not."""
    if library.available() and not library.cuda_architectures():
        assert "failed" not in library.why_without_cuda()


@pytest.mark.parametrize(
    "number", ["90", *(pytest.param(own, marks=pytest.mark.full) for own in ("80", "100"))]
)
def test_the_code_of_every_kernel(number: str) -> None:
    found = findings(number)
    broken = [f"{own['kernel']}: {own['broken']}" for own in found if own["broken"]]
    assert not broken, "\n".join(broken)
    expected = {*cuda_resources.PLAIN, *PORTABLE_KERNELS, "multiply_float8_portable"}
    if number == "80":  # which has no 8-bit products
        expected -= {"multiply_float8_portable", "quantize"}
    expected |= {*(cuda_resources.HOPPER if number == "90" else ())}
    assert expected <= {cuda_resources.base_name(own["kernel"]) for own in found}
    # The committed table names each of them; other versions of nvcc differ in the figures.
    names = [f"| {own['architecture']} | `{own['kernel']}` |" for own in found]
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
        ({"multicasts": 1}, "multicasts"),
        ({"cluster": 2}, "multicasts"),
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
