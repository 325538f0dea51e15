"""The instruction-set level of the compiled CPU kernels, and the variable BEIT3_FAST_CPU_ISA that lowers it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from test_cpu_kernels import LEVELS

from beit3_fast.ops import library

OWN = pytest.mark.skipif(
    "BEIT3_FAST_CPU_ISA" in os.environ, reason="the CPU's own level is not known"
)
PRINT = "from beit3_fast.ops import library; print(library.cpu_isa())"


def in_a_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@OWN
def test_no_wish_lifts_the_level() -> None:
    done = in_a_process(PRINT, BEIT3_FAST_CPU_ISA=LEVELS[-1])
    assert done.stdout.strip() == library.cpu_isa()


@OWN
@pytest.mark.parametrize("wish", ["", "  "])
def test_an_empty_wish_is_none(wish: str) -> None:
    assert in_a_process(PRINT, BEIT3_FAST_CPU_ISA=wish).stdout.strip() == library.cpu_isa()


@pytest.mark.parametrize("wish", ["PORTABLE", " portable\t", "Portable "])
def test_case_and_spaces_around_a_level_do_not_matter(wish: str) -> None:
    done = in_a_process(PRINT, BEIT3_FAST_CPU_ISA=wish)
    assert done.stdout.strip() == "portable", done.stderr[-2000:]


CALLS = """
import torch, beit3_fast
from beit3_fast.ops import expert_linear, library
name = "beit3_tiny_patch16_32_imageclassification"
model = beit3_fast.create_model(name)
x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
for call in (
    library.cpu_isa,
    lambda: beit3_fast.explain(model),
    lambda: beit3_fast.create_model(name, dtype="int8"),
    lambda: expert_linear(x, [weight.detach()], bounds=(0, 3), impl="cpu"),
    lambda: expert_linear(x, [weight], bounds=(0, 3)),
):
    try:
        print("no error", call())
    except Exception as error:
        print(type(error).__name__, str(error).strip())
"""


@pytest.mark.parametrize("wish", ["avx9000", "avx512-vnni", "0"])
def test_an_unknown_level_is_refused_by_whatever_asks_for_the_library(wish: str) -> None:
    done = in_a_process(CALLS, BEIT3_FAST_CPU_ISA=wish)
    message = f"BEIT3_FAST_CPU_ISA must be one of {', '.join(LEVELS)}, got '{wish}'"
    assert done.stdout.splitlines() == [f"ConfigError {message}"] * 5, done.stderr[-2000:]


def test_without_the_library_there_is_no_level() -> None:
    done = in_a_process(PRINT, BEIT3_FAST_LIBRARY="none", BEIT3_FAST_CPU_ISA="avx9000")
    assert "KernelUnavailable" in done.stderr
    assert "BEIT3_FAST_LIBRARY=none" in done.stderr
