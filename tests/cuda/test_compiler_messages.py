"""What nvcc says of the Hopper kernels, and the machine code does not show: no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", sorted(CUDA.glob("*_sm90a.cu")), ids=lambda path: path.stem)
def test_products_overlap_and_registers_move(source: Path, tmp_path: Path) -> None:
    """The assembler makes products wait for each other (C7510 to C7514) or ignores setmaxnreg (C7508) with a message."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    command = [nvcc, "-std=c++17", "-cubin", "-gencode=arch=compute_90a,code=sm_90a"]
    command += ["-Xptxas", "-v", str(source), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "registers" in done.stderr
    complaints = [line for line in done.stderr.splitlines() if re.search(r"\(C75\d\d\)", line)]
    assert not complaints, "\n".join(complaints)
