"""The Triton kernels touch their operands' memory and nothing else: forbidden pages around every tensor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available() or not sys.platform.startswith("linux"):
    pytest.skip("needs the interpreter, and mprotect", allow_module_level=True)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Missing masks and limits, one at a time: (op, what is there, what is planted).
PLANTED = [
    ("expert_linear", "mask=depth[None, :] < K - k", "mask=depth[None, :] >= 0"),
    ("expert_linear", "mask=depth[:, None] < K - k", "mask=depth[:, None] >= 0"),
    ("expert_linear", "row = tl.minimum(place, end - 1).to(tl.int64)", "row = place.to(tl.int64)"),
    ("expert_linear", "* N + tl.minimum(column, N - 1)", "* N + column"),
    ("expert_linear", "residual_at, mask=real, other=0.0", "residual_at"),
    ("expert_linear", "tl.store(y_ptr + at, y, mask=real)", "tl.store(y_ptr + at, y)"),
    ("expert_linear", "tl.load(bias_ptr + vector)", "tl.load(bias_ptr + vector + N)"),
    ("_expert_linear_backward", "grad_at, mask=real, other=0.0", "grad_at"),
    ("_expert_linear_backward", "g_ptr + at, mask=real, other=0.0", "g_ptr + at"),
    (
        "_expert_linear_backward",
        "normed_ptr.dtype.element_ty), mask=real",
        "normed_ptr.dtype.element_ty)",
    ),
    ("_weight_gradient", "real = real & (row < end)[:, None]", "real = real"),
    ("_weight_gradient", "tl.load(own + at, mask=real, other=0.0)", "tl.load(own + at)"),
    ("_weight_gradient", "slices[i], mask=real", "slices[i]"),
    ("masked_linear_cross_entropy", "place = tl.minimum(place, M - 1)", "place = place"),
    ("masked_linear_cross_entropy", "tl.minimum(column, V - 1)", "column"),
    ("masked_linear_cross_entropy", "element_ty), mask=inside", "element_ty)"),
    (
        "shared_attention",
        "tl.arange(0, BLOCK_K)\n        row = row_of(tl.minimum(place, num_keys - 1)",
        "tl.arange(0, BLOCK_K)\n        row = row_of(place",
    ),
    (
        "shared_attention",
        "tl.arange(0, SIZE)\n        row = row_of(tl.minimum(place, num_keys - 1)",
        "tl.arange(0, SIZE)\n        row = row_of(place",
    ),
    ("shared_attention", "own = tl.minimum(own, num_queries - 1)", "own = own"),
    ("_attention_rows", "mask=(column < D)[None, :], other=0.0", "mask=column[None, :] >= 0"),
    (
        "_attention_rows",
        "part, mask=real[:, None] & (column < D)[None, :]",
        "part, mask=real[:, None]",
    ),
    ("_attention_rows", "text + tl.load(cu_vision_ptr + batch)", "text + 4096"),
    (
        "_attention_rows",
        "tl.load(valid_ptr + place, mask=text, other=1)",
        "tl.load(valid_ptr + place)",
    ),
    (
        "shared_attention",
        "tl.load(cu_text_ptr + sample) - num_vision)",
        "tl.load(cu_text_ptr + sample) + num_vision)",
    ),
]
# The files whose check goes through the others as well.
WHOLE = (
    "expert_linear",
    "_expert_linear_backward",
    "masked_linear_cross_entropy",
    "shared_attention",
)
# One of each kernel file with its own loads.
IN_THE_GATE = {0, 9, 11, 13, 18}


def run(sides: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, str(HERE / "guarded_memory.py"), sides, *map(str, paths)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=110,
        check=False,
    )


@pytest.mark.parametrize("side", ["behind", pytest.param("before", marks=pytest.mark.full)])
def test_nothing_strange_is_touched(side: str) -> None:
    done = run(side, *(ROOT / "kernels" / f"{name}.py" for name in WHOLE))
    assert done.returncode == 0, done.stderr
    assert "nothing strange" in done.stdout


def test_every_text_stands_in_its_file_once() -> None:
    """Also of those that are planted in the long tests only."""
    for op, right, _ in PLANTED:
        assert (ROOT / "kernels" / f"{op}.py").read_text().count(right) == 1, right


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=() if n in IN_THE_GATE else pytest.mark.full)
        for n in range(len(PLANTED))
    ],
)
def test_a_planted_stray_access_kills_the_process(number: int, tmp_path: Path) -> None:
    op, right, wrong = PLANTED[number]
    text = (ROOT / "kernels" / f"{op}.py").read_text()
    spoiled = tmp_path / f"{op}.py"
    spoiled.write_text(text.replace(right, wrong))
    assert run("behind,before", spoiled).returncode == -signal.SIGSEGV
