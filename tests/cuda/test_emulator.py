"""The emulator of the CUDA kernels' instructions: what it must compute, and what it must not let pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import compiled

HERE = Path(__file__).parent
CHECKS = (
    "clusters_share_copies",
    "deadlocks_and_misuse_are_faults",
    "early_release_shows",
    "missing_bytes_are_a_deadlock",
    "missing_fence_is_a_fault",
    "missing_wait_for_tiles_shows",
    "mistakes_of_clusters_show",
    "mistakes_of_stores_show",
    "products_of_8_bits",
    "products_of_a_warp",
    "products_of_swizzled_tiles",
    "rounding",
    "rounding_to_8_bits",
    "stores_reach_other_blocks",
    "sums_read_before_the_wait_show",
    "transposed_products",
    "written_tiles_need_a_fence",
)


@pytest.fixture(scope="module")
def program() -> Path:
    return compiled(HERE / "emulator_checks.cpp")


def test_every_check_is_run(program: Path) -> None:
    assert subprocess.check_output([program], text=True).split() == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, program: Path) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
