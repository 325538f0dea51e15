"""Instruction-set levels that this processor, any with AVX2, lacks: the kernels' own sources, their intrinsics emulated.

The emulation (emulated_isa.h) does what the processor's manual says, element by element, and aborts where the
processor would fault. It says nothing about speed.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit3_fast.ops import library

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "emulated"
ALONE = "tests/ops/test_sample_blocks.py::test_samples_alone"
# PyTorch's fp32 sums of 2,100 terms, which the rule compares with, are 2.4 times as exact on a CPU with AVX2 only as fp32 on AMX
# (largest error 1.6e-6 and 3.8e-6): on a CPU with AMX they are less exact, and the case runs there.
LONG_SUMS = "tests/ops/test_cpu_blocks.py::test_sizes[blocks of rows, slices-fp32]"
# Each level with the tests of what it does not share with the level before.
LEVELS = {
    "avx512": (
        *("test_cpu_kernels.py", "test_cpu_special_values.py", "test_attention_gradients.py"),
        *("test_cpu_int8.py", "test_likeliest.py", "test_gradient_steps.py"),
        "test_attention_many_keys.py::test_a_mask_tensor_hides_whole_ranges",
    ),
    "avx512_vnni": ("test_cpu_int8.py",),
    "avx512_bf16": (
        *("test_cpu_kernels.py", "test_cpu_special_values.py", "test_attention_gradients.py"),
        *("test_likeliest.py", "test_gradient_steps.py", "test_row_statistics.py"),
        *("-k", "not fp32"),
    ),
    "amx_bf16": (
        *("test_cpu_kernels.py", "test_cpu_special_values.py", "test_cpu_blocks.py"),
        *("test_cpu_int8.py", "test_attention_gradients.py", "test_row_statistics.py"),
        *("test_sample_blocks.py", f"--deselect={ALONE}[fp32-"),
        f"--deselect={LONG_SUMS}",
        "test_attention_many_keys.py::test_a_mask_tensor_hides_whole_ranges",
        "../model/test_encode_in_parts.py::test_many_sentences_are_encoded_at_once",
        "../model/test_whole_layer.py::test_a_layer_of_many_rows[heads of 64-packed, bf16-2]",
        "../model/test_whole_layer.py::test_a_layer_of_many_rows[heads of 64-packed, fp32-2]",
    ),
}


@pytest.fixture(scope="module")
def emulated() -> Path:
    """The op library with emulated instruction sets, built beside the real one and kept."""
    if not library.cpu_features().get("avx2"):
        pytest.skip("the emulation is compiled for AVX2")
    configured = sorted(ROOT.glob("build/cmake-*/configured.json"))
    if not configured:
        pytest.skip("the package was not built in this folder")
    configure, compiler, *_ = json.loads(configured[-1].read_text())
    configure[configure.index("-B") + 1] = str(FOLDER)
    configure += [
        f"-DBEIT3_FAST_OUTPUT_DIR={FOLDER / 'lib'}",
        f"-DBEIT3_FAST_EMULATE={HERE / 'emulated_isa.h'}",
        "-DBEIT3_FAST_NVCC=",
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            configure,
            [configure[0], "--build", str(FOLDER), "--target", "beit3_fast_ops"],
        ):
            done = subprocess.run(
                command, env={**os.environ, "CXX": compiler}, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return FOLDER / "lib" / library.FILE_NAME


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("level", LEVELS)
def test_the_kernel_tests_hold_at_every_level(level: str, emulated: Path) -> None:
    library.load()
    own = torch.ops.beit3_fast.cpu_isa()
    if own in list(LEVELS)[list(LEVELS).index(level) :]:
        pytest.skip(f"this processor has it, and these tests ran on it (its own level: {own})")
    environment = {
        **os.environ,
        "BEIT3_FAST_LIBRARY": str(emulated),
        "BEIT3_FAST_CPU_ISA": level,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *LEVELS[level]]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def run_emulated(code: str, emulated: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"PATH = {str(emulated)!r}\n{code}"],
        env={**os.environ, "BEIT3_FAST_LIBRARY": str(emulated), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.timeout(400)
def test_a_lower_level_runs_no_tiles(emulated: Path) -> None:
    """Also not to try them, as the highest level does in every process."""
    code = "import torch; torch.ops.load_library(PATH); print(torch.ops.beit3_fast.cpu_isa())"
    for level in ("avx512_bf16", "portable"):
        wish = {"BEIT3_FAST_CPU_ISA": level, "BEIT3_FAST_TEST_NO_TILES": "1"}
        done = run_emulated(code, emulated, **wish)
        assert done.stdout.strip() == level, done.stderr
    wish["BEIT3_FAST_CPU_ISA"] = "avx9000"
    assert "must be one of" in run_emulated(code, emulated, **wish).stderr
    wish["BEIT3_FAST_CPU_ISA"] = "amx_bf16"
    assert run_emulated(code, emulated, **wish).returncode == -signal.SIGABRT


FORKS = """
import os, signal, threading, time, torch
torch.ops.load_library(PATH)
chooser = threading.Thread(target=torch.ops.beit3_fast.cpu_isa)
chooser.start()
children = []
while chooser.is_alive():
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        torch.ops.beit3_fast.cpu_isa()
        os._exit(0)
    children.append(child)
    time.sleep(0.001)
print(len(children) > 0, {os.waitpid(child, 0)[1] for child in children})
"""


@pytest.mark.timeout(400)
def test_a_fork_while_the_level_is_chosen(emulated: Path) -> None:
    """The child finds nothing half done that it would wait for."""
    done = run_emulated(FORKS, emulated, BEIT3_FAST_CPU_ISA="amx_bf16")
    assert done.stdout.strip() == "True {0}", done.stderr
