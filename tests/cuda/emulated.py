"""Compiles CUDA kernels for the CPU, with the emulator in place of their instructions."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulated-cuda"
_SOURCES = ("csrc/cuda/*.h", "csrc/cuda/*.cuh", "tests/cuda/*.h")
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wno-unknown-pragmas",
    # Its longjmp aborts where a fiber's stack looks like a frame that is gone.
    "-U_FORTIFY_SOURCE",
    "-DBEIT3_FAST_EMULATE_CUDA",
    f"-I{ROOT / 'csrc/cuda'}",
    f"-I{ROOT / 'tests/cuda'}",
)
# Old compilers passed arguments aligned to 64 bytes otherwise, which is no news.
_LIBRARY = ("-Wextra", "-Werror", "-Wno-psabi", "-shared", "-fPIC")


def library(name: str) -> Path:
    """The library of tests/cuda/NAME.cpp, the same file for all who ask."""
    return compiled(Path(__file__).with_name(f"{name}.cpp"), _LIBRARY, ".so")


def compiled(source: Path, flags: Iterable[str] = (), suffix: str = "") -> Path:
    """The program of a source, or with flags and suffix the library; compiled again where something has changed."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    command = [*compiler.split(), *_FLAGS, *flags]
    digest = hashlib.sha256(" ".join(command).encode())
    for file in (source, *sorted(path for own in _SOURCES for path in ROOT.glob(own))):
        digest.update(file.read_bytes())
    FOLDER.mkdir(parents=True, exist_ok=True)
    result = FOLDER / f"{source.stem}-{digest.hexdigest()[:16]}{suffix}"
    with open(FOLDER / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            unfinished = result.with_suffix(".new")
            done = subprocess.run(
                [*command, "-o", unfinished, source], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-4000:]
            unfinished.rename(result)
    return result
