"""The compiled library as the steps of ``make gpu`` need it: of the sources of now, with kernels that this GPU runs.

    python -m bench.gpu_library

Builds it where it is missing or other sources made it. Without it the tests of the kernels would run in front of plain
loops, and pass. Exits with 1 where a kernel would be left out, and says why.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from beit3_fast.ops import cuda_kernels, library

ROOT = Path(__file__).resolve().parent.parent
_BINDINGS = ("cuda_ops.cpp", "cuda_float8_ops.cpp", "cuda_decoding_ops.cpp", "cuda_operands.h")


def sources_hash() -> str:
    """What CMakeLists.txt writes into the library's stamp for the CUDA sources of now."""
    folder = ROOT / "csrc"
    files = [*sorted((folder / "cuda").iterdir()), *(folder / name for name in _BINDINGS)]
    each = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(each.encode()).hexdigest()[:16]


def is_current() -> bool:
    """Whether the library can be loaded and the sources of now made its kernels."""
    return library.available() and library.load().stamp.get("cuda_sources") == sources_hash()


def build() -> int:
    """Compiles the library for this GPU, unless BEIT3_FAST_CUDA_ARCHS names architectures; the compiler's exit status."""
    major, minor = torch.cuda.get_device_capability()
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    wanted = {"BEIT3_FAST_BUILD": "1", "BEIT3_FAST_CUDA": "1", "BEIT3_FAST_CUDA_ARCHS": arch}
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    return subprocess.run(command, cwd=ROOT, env=wanted | os.environ, check=False).returncode


def obstacles() -> list[str]:
    """Why kernels cannot run here, of those that this GPU has."""
    capability = torch.cuda.get_device_capability()
    reasons = [cuda_kernels.why_unavailable("cuda")]
    if capability >= (8, 9):
        reasons.append(cuda_kernels.float8_obstacle())
    if capability == (9, 0) and not cuda_kernels.attention_rounds("cuda"):
        reasons.append("does not leave attention's rows in 8 bits")
    return [reason for reason in reasons if reason is not None]


def main() -> int:
    """1 where the kernels cannot be built or run."""
    if not torch.cuda.is_available():
        print("there is no CUDA device")
        return 1
    if not is_current():
        print(f"== {library.load().describe()}; it is built anew", flush=True)
        # A process of its own loads what was built.
        again = (sys.executable, "-m", "bench.gpu_library")
        tried = os.environ.get("BEIT3_FAST_BUILT_FOR_STEPS") == "1"
        if tried or build():
            print("the library is not that of these sources, and building it did not help")
            return 1
        own = dict(os.environ, BEIT3_FAST_BUILT_FOR_STEPS="1")
        return subprocess.run(again, cwd=ROOT, env=own, check=False).returncode
    print(f"== {library.load().describe()}")
    reasons = obstacles()
    for reason in reasons:
        print(f"the library's kernels cannot run: each {reason}")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
