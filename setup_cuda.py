"""Which nvcc compiles the CUDA kernels, with which C++ compiler, for which architectures: asked of nvcc itself.

BEIT3_FAST_CUDA_ARCHS    such as "80;90a;100a", which is the default
CUDACXX, CUDA_HOME       nvcc itself, or the folder of its toolkit; else nvcc on PATH, else /usr/local/cuda
CUDAHOSTCXX              the C++ compiler that nvcc calls; else that of the CPU kernels, else nvcc's own choice
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("80", "90a", "100a")
_PROBE = "#include <cuda_runtime.h>\n__global__ void probe(float* x) { *x = 1.0f; }\n"
_LIMIT_S = 120


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that was seen to compile."""

    program: str
    version: str
    host_compiler: str  # empty: nvcc's own choice
    architectures: tuple[str, ...]  # those wanted that it knows

    def settings(self) -> list[str]:
        """For CMake."""
        return [
            f"-DBEIT3_FAST_NVCC={self.program}",
            f"-DBEIT3_FAST_CUDA_HOST_COMPILER={self.host_compiler}",
            f"-DBEIT3_FAST_CUDA_ARCHS={';'.join(self.architectures)}",
        ]


@dataclass(frozen=True)
class NoNvcc:
    """Why no CUDA kernel can be compiled here, in words."""

    reason: str

    def settings(self) -> list[str]:
        """For CMake."""
        return ["-DBEIT3_FAST_NVCC="]


def find(
    environment: Mapping[str, str], compiler: str | None, wanted: tuple[str, ...]
) -> Nvcc | NoNvcc:
    """The nvcc of this machine, after it compiled a line; ``compiler``: the command of the CPU kernels' compiler.

    Architectures that this nvcc does not know are left out, but for those that ``wanted`` names: those are a reason.
    """
    program = _program(environment)
    named = environment.get("CUDACXX", "").strip()
    if program is None and named:
        return NoNvcc(f"CUDACXX names no program: {named}")
    if program is None:
        return NoNvcc(
            "nvcc was not found (looked for $CUDACXX, $CUDA_HOME, PATH and /usr/local/cuda; "
            "install the CUDA toolkit, or name its folder in CUDA_HOME)"
        )
    try:
        version = _version(program)
        known = _known(program)
    except (OSError, subprocess.SubprocessError) as error:
        return NoNvcc(f"{program} does not run ({error})")
    chosen = wanted or tuple(arch for arch in ARCHITECTURES if _number(arch) in known)
    unknown = [arch for arch in chosen if _number(arch) not in known]
    if unknown or not chosen:
        asked = " ".join(unknown or ARCHITECTURES)
        return NoNvcc(f"nvcc {version} does not know the architectures {asked}")
    hosts, said = list(_host_compilers(environment, compiler)), ""
    for host in hosts:
        said = _complaint(program, host, chosen[0])
        if not said:
            return Nvcc(program, version, host, chosen)
    tried = " or ".join(host or "the C++ compiler of its own choice" for host in hosts)
    return NoNvcc(
        f"nvcc {version} does not compile with {tried}; name a C++ compiler that it accepts in CUDAHOSTCXX "
        f"(it said: {said})"
    )


def _program(environment: Mapping[str, str]) -> str | None:
    named = environment.get("CUDACXX", "").strip()
    if named:
        return shutil.which(named)
    folders = [environment.get(name, "").strip() for name in ("CUDA_HOME", "CUDA_PATH")]
    for folder in filter(None, folders):
        found = shutil.which("nvcc", path=str(Path(folder, "bin")))
        if found:
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _version(program: str) -> str:
    found = re.search(r"release (\d+\.\d+)", _run([program, "--version"]))
    if found is None:
        raise OSError("it does not say its version")
    return found[1]


def _known(program: str) -> set[int]:
    """The compute capabilities that it compiles for: 90 for 9.0."""
    return {int(n) for n in re.findall(r"compute_(\d+)", _run([program, "--list-gpu-arch"]))}


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def _host_compilers(environment: Mapping[str, str], compiler: str | None) -> Iterator[str]:
    named = environment.get("CUDAHOSTCXX", "").strip()
    if named:
        yield named
        return
    words = shlex.split(compiler or "")
    if len(words) == 1:
        yield words[0]
    yield ""


def _complaint(program: str, host: str, architecture: str) -> str:
    """What it says against compiling a line; empty where it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(_PROBE)
        command = [program, "-std=c++17", f"--gpu-architecture=sm_{architecture}"]
        command += ["--compiler-bindir", host] if host else []
        try:
            _run([*command, "-c", str(source), "-o", str(source.with_suffix(".o"))])
        except subprocess.CalledProcessError as error:
            lines = [line.strip() for line in (error.stderr + error.stdout).splitlines()]
            complaints = [line for line in lines if re.search("error|fatal", line)] or lines
            return next(filter(None, complaints), f"status {error.returncode}")
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
    return ""


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LIMIT_S)
    return done.stdout
