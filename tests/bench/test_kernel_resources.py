"""Every Triton kernel with every shipped tile, compiled ahead of time and read: no GPU is needed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from beit3_fast.kernels import _tiles
from bench.kernel_residency import WANTED
from bench.kernel_resources import ARCHITECTURES, TABLE, Resources, line

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


# For sm_90 every kernel once, then a product for the others.
IN_THE_GATE = (
    "sm_90, expert_linear, many rows",
    "sm_90, finish, weights",
    "sm_90, join, *",
    "sm_90, key_gradient, wide selected backward, 88 wide, seq2seq, selected, fp16",
    "sm_90, masked_linear_cross_entropy *, 16 bits, 64010 classes",
    "sm_90, norm_backward, odd weights",
    "sm_90, query_gradient, backward, 64 wide, causal",
    "sm_90, row_statistics, *",
    "sm_90, shared_attention, short, 64 wide, bidirectional",
    "sm_90, shared_attention, long, 64 wide, bidirectional, padded",
    "sm_90, slope, weights",
    "sm_90, weight_gradient, weights",
    "sm_80, expert_linear, few rows, gathered",
    "sm_100, expert_linear, many rows, z kept",
)
KERNELS = {
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
# A tile of which two programs do not fit into shared memory, and one of which four do not fit into registers.
OVER_BUDGET = """
import json
from beit3_fast.kernels import _tiles, expert_linear
from bench import kernel_resources
shipped = _tiles.choose(expert_linear.Tile, "expert_linear", "few rows", "sm_80")
found = []
for change in ({"num_stages": 8}, {"num_stages": 2, "per_sm": 4}):
    _tiles.choose = lambda *key: shipped._replace(**change)
    found.append(next(kernel_resources.examine(["sm_80, expert_linear, few rows"])))
print(json.dumps(found))
"""
TITLES = """
import json
from bench.kernel_specimens import specimens
names = ("sm_80", "sm_90", "sm_100")
print(json.dumps([[(own.name, own.shape_class) for own in specimens(name)] for name in names]))
"""


def run(*command: str, timeout: float) -> Any:
    """What a process of its own prints: in this one the kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.stdout, done.stderr
    # The command says by its status whether a rule is broken.
    assert done.returncode == ("-m" in command and '"broken": ["' in done.stdout)
    return json.loads(done.stdout)


def findings(*patterns: str, timeout: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run(
        "-m", "bench.kernel_resources", "--json", *patterns, timeout=timeout
    )
    assert found
    return found


def test_the_code_of_every_kernel_once() -> None:
    found = findings(*IN_THE_GATE, timeout=110)
    assert {own["kernel"] for own in found if own["architecture"] == "sm_90"} == KERNELS
    assert len(found) == len(IN_THE_GATE) + 1
    for own in found:
        assert not own["broken"], own


def test_a_tile_over_budget_is_refused() -> None:
    memory, registers = run("-c", OVER_BUDGET, timeout=110)
    for own, wanted in ((memory, 2), (registers, 4)):
        (figure,) = own["broken"]
        assert re.match(rf"room for \d of {wanted} programs on a multiprocessor", figure)
    assert memory["shared"] > 100_000
    assert registers["shared"] < 24_000


@pytest.mark.full
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_code_of_every_launch(architecture: str) -> None:
    found = findings(f"{architecture}, *", timeout=2380)
    assert {own["kernel"] for own in found} == KERNELS
    committed = TABLE.read_text(encoding="utf-8")
    assert committed.count(f"| {architecture} |") == len(found)
    for own in found:
        assert not own["broken"], own
        # The committed table names this launch; other versions of Triton differ in the figures.
        cells = (own["architecture"], own["kernel"], own["class"], own["constants"])
        assert f"| {' | '.join(cells)} |" in committed


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_committed_table_is_what_the_command_writes() -> None:
    import triton

    committed = TABLE.read_text(encoding="utf-8")
    if f"compiled by Triton {triton.__version__} and" not in committed:
        pytest.skip("the table was written with another version of Triton")
    rows = [row for row in committed.splitlines() if row.startswith("| sm_")]
    chosen = sorted(random.sample(rows, 9))
    titles = [", ".join(row.strip("| ").split(" | ")[:3]) for row in chosen]
    assert sorted(map(line, findings(*titles, timeout=580))) == chosen


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 8}, "stack"),
        ({"local_accesses": 2}, "local memory"),
        ({"shared": 262_176}, "room for 0 of 2 programs"),
        ({"shared": 120_000}, "room for 1 of 2 programs"),
        ({"registers": 136}, "room for 1 of 2 programs"),
        ({"threads": 1024, "registers": 64, "shared": 0}, "room for 1 of 2 programs"),
        ({"tensor_core": 0}, "HGMMA"),
        ({"other_tensor_core": 16}, "another architecture"),
        ({"tma_loads": 0}, "TMA"),
    ],
)
def test_each_rule_can_be_broken(changes: dict[str, int], words: str) -> None:
    def broken(resources: Resources) -> list[str]:
        return resources.broken(90, wants_mma=True, wants_tma=True, per_sm=2)

    assert broken(CLEAN) == []
    values = {name: getattr(CLEAN, name) for name in Resources.__dataclass_fields__}
    (figure,) = broken(Resources(**(values | changes)))
    assert words in figure


@pytest.mark.full
def test_every_shape_class_is_compiled() -> None:
    """Each class of tiles is the first word of a specimen's class, and each budget that of a specimen."""
    for name, found in zip(ARCHITECTURES, run("-c", TITLES, timeout=110), strict=True):
        pairs = {(kernel, shape_class.split(", ")[0]) for kernel, shape_class in found}
        for classes in _tiles.CLASSES.values():
            assert set(classes) <= {shape_class for _, shape_class in pairs}, name
        assert set(WANTED) <= pairs, name
