"""Every Triton kernel with every shipped tile, compiled ahead of time and read: no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.kernel_resources import ARCHITECTURES, TABLE, Resources

pytest.importorskip("triton", reason="triton is not installed")
if not sys.platform.startswith("linux"):
    pytest.skip("Triton's compiler runs on Linux", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent.parent
CLEAN = Resources(
    registers=128,
    stack=0,
    shared=98_304,
    threads=256,
    tensor_core=4,
    other_tensor_core=0,
    tma_loads=6,
    local_accesses=0,
)


def findings(architecture: str, kernels: str, timeout: float) -> list[dict[str, Any]]:
    # A process of its own: in this one the kernels are interpreted.
    environment = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "bench.kernel_resources", "--json"]
    done = subprocess.run(
        [*command, "--architectures", architecture, "--kernels", kernels],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.stdout, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert found
    assert done.returncode == any(own["broken"] for own in found)
    return found


def test_the_code_of_one_kernel() -> None:
    for own in findings("sm_90", "expert_linear, many rows, gathered, z kept", timeout=100):
        assert not own["broken"], own


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_code_of_every_kernel(architecture: str) -> None:
    found = findings(architecture, "", timeout=580)
    assert {own["kernel"] for own in found} == {
        "expert_linear",
        "finish",
        "join",
        "key_gradient",
        "masked_linear_cross_entropy loss",
        "masked_linear_cross_entropy slope",
        "norm_backward",
        "query_gradient",
        "row_statistics",
        "shared_attention",
        "slope",
        "weight_gradient",
    }
    for own in found:
        assert not own["broken"], own
        # The committed table names this kernel; other versions of Triton differ in the figures.
        cells = (own["architecture"], own["kernel"], own["class"], own["constants"])
        assert f"| {' | '.join(cells)} |" in TABLE.read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 8}, "stack"),
        ({"local_accesses": 2}, "local memory"),
        ({"shared": 262_176}, "shared memory"),
        ({"registers": 255, "threads": 512}, "registers"),
        ({"tensor_core": 0}, "HGMMA"),
        ({"other_tensor_core": 16}, "another architecture"),
        ({"tma_loads": 0}, "TMA"),
    ],
)
def test_each_rule_can_be_broken(changes: dict[str, int], words: str) -> None:
    def broken(resources: Resources) -> list[str]:
        return resources.broken(90, wants_mma=True, wants_tma=True, per_sm=1)

    assert broken(CLEAN) == []
    values = {name: getattr(CLEAN, name) for name in Resources.__dataclass_fields__}
    (figure,) = broken(Resources(**(values | changes)))
    assert words in figure
