"""What the CUDA kernels of the op library use of a GPU, read from the compiled code: no GPU is needed.

    python -m bench.cuda_resources             # writes docs/cuda-kernels.md
    python -m bench.cuda_resources --json      # prints what was read

Every kernel for every architecture that the library was built for. Threads and dynamic shared memory are no part of
machine code: `bench/cuda_launches.cu` prints what the launchers ask for.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from beit3_fast.ops import library

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "beit3_fast" / library.FILE_NAME
LAUNCHES = ROOT / "bench" / "cuda_launches.cu"
TABLE = ROOT / "docs" / "cuda-kernels.md"
# Bytes of shared memory that a block may have (code for sm_80 runs on sm_86 and sm_89 as well, which have fewer), and
# that a processor has, of which every block takes 1024 more than it asks for.
SHARED_LIMIT = {"80": 101_376, "90a": 232_448, "100a": 232_448}
SHARED_OF_PROCESSOR = {"80": 167_936, "90a": 233_472, "100a": 233_472}
REGISTERS = 65_536
_COUNTED = re.compile(r"\b(LDL|STL|HGMMA|QGMMA|HMMA|QMMA|UTMALDG|MULTICAST)\b")
# Written for sm_90a: products of warp groups, operands brought by TMA.
HOPPER = (
    "multiply_experts",
    "multiply_experts_split_k",
    "multiply_float8",
    "attend_whole",
    "attend_in_steps",
)
# Without a product: everything else has one, of tensor cores.
PLAIN = ("moments", "quantize", "join_classes")


class Unreadable(Exception):
    """The code cannot be read here; the message says why."""


@dataclass(frozen=True)
class Launch:
    """What a launcher asks for: threads of a block, bytes of dynamic shared memory, blocks that share a processor, blocks of a cluster."""

    threads: int
    shared: int
    resident: int = 1
    cluster: int = 1


@dataclass(frozen=True)
class Resources:
    """What the machine code of one kernel uses: per thread, per block, and instructions by name.

    ``hgmma``: products of warp groups, of 8-bit numbers (QGMMA) too; ``hmma``: of warps (QMMA likewise);
    ``multicasts``: those of the TMA loads that come to every block of a cluster.
    """

    registers: int
    stack: int
    local_accesses: int
    hgmma: int
    hmma: int
    tma_loads: int
    multicasts: int
    threads: int
    shared: int
    resident: int
    cluster: int

    def broken(self, kernel: str, architecture: str) -> list[str]:
        """Each rule that the code breaks, with its figures."""
        hopper = base_name(kernel) in HOPPER
        plain = base_name(kernel) in PLAIN
        shares_sums = base_name(kernel) == "multiply_experts_split_k"
        limit = SHARED_LIMIT.get(architecture, min(SHARED_LIMIT.values()))
        room = SHARED_OF_PROCESSOR.get(architecture, min(SHARED_OF_PROCESSOR.values()))
        rules = {
            f"{self.stack} bytes of stack, {self.local_accesses} accesses to local memory": not (
                self.stack or self.local_accesses
            ),
            f"{self.shared} bytes of shared memory, {self.resident} blocks": (
                self.shared <= limit and (self.shared + 1024) * self.resident <= room
            ),
            f"{self.registers * self.threads * self.resident} registers": (
                self.registers * self.threads * self.resident <= REGISTERS
            ),
            f"{self.hgmma} HGMMA instructions": (self.hgmma > 0) is hopper,
            f"{self.hmma} HMMA instructions": (self.hmma > 0) is not (hopper or plain),
            f"{self.tma_loads} TMA loads": (self.tma_loads > 0) is hopper,
            f"{self.multicasts} multicasts, {self.cluster} blocks": (
                (self.multicasts > 0) is (self.cluster > 1 and not shares_sums)
            ),
        }
        return [figure for figure, holds in rules.items() if not holds]


def base_name(kernel: str) -> str:
    """'attend_whole<BFloat16, 64, 200>' -> 'attend_whole'"""
    return kernel.partition("<")[0]


def examine(path: Path = LIBRARY, number: str = "") -> Iterator[dict[str, Any]]:
    """What the code of every kernel of a library uses, and each rule that it breaks. Raises Unreadable.

    ``number``: of one architecture, such as "90", alone.
    """
    launches = read_launches()
    with tempfile.TemporaryDirectory() as folder:
        _run(_cuobjdump(), "-xelf", "all", str(path.resolve()), cwd=folder)
        cubins = sorted(Path(folder).glob(f"*.sm_{number or '*'}.cubin"))
        if not cubins:
            raise Unreadable(f"{path.name} holds no CUDA code")
        for cubin in cubins:
            for architecture, kernel, used in _read(cubin):
                if kernel not in launches:
                    raise Unreadable(f"{LAUNCHES.name} says nothing of {kernel}")
                resources = Resources(**used, **asdict(launches[kernel]))
                yield {
                    "architecture": f"sm_{architecture}",
                    "kernel": kernel,
                    **asdict(resources),
                    "broken": resources.broken(kernel, architecture),
                }


def _read(cubin: Path) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Architecture, kernel, and what it uses, for every kernel of a file."""
    usage = _run(_cuobjdump(), "-res-usage", str(cubin))
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    if not kernels:
        return
    head, *bodies = _run(_cuobjdump(), "-sass", str(cubin)).split("Function : ")
    target = re.search(r"code for sm_(\d+)", head)
    if target is None:
        raise Unreadable(f"cuobjdump names no architecture in {cubin.name}")
    counts = {body.split(maxsplit=1)[0]: Counter(_COUNTED.findall(body)) for body in bodies}
    for mangled, registers, stack in kernels:
        found = counts[mangled]
        used = {
            "registers": int(registers),
            "stack": int(stack),
            "local_accesses": found["LDL"] + found["STL"],
            "hgmma": found["HGMMA"] + found["QGMMA"],
            "hmma": found["HMMA"] + found["QMMA"],
            "tma_loads": found["UTMALDG"],
            "multicasts": found["MULTICAST"],
        }
        yield _built_as(target[1]), demangled(mangled), used


def _built_as(number: str) -> str:
    """'90' -> '90a': the code itself says no more than the number."""
    built = library.build_info().get("cuda_architectures", "").split()
    return next((arch for arch in built if arch.rstrip("af") == number), number)


def read_launches() -> dict[str, Launch]:
    """Threads and shared memory of every kernel by name, as its launcher asks for them."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise Unreadable("nvcc was not found, which compiles what the launchers ask for")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "launches")
        _run(
            nvcc,
            "-std=c++17",
            "-arch=sm_90a",
            f"-I{ROOT / 'csrc'}",
            str(LAUNCHES),
            "-o",
            str(program),
        )
        text = _run(str(program))
    found = {}
    for line in text.splitlines():
        kernel, *numbers = line.rsplit(maxsplit=4)
        found[kernel] = Launch(*map(int, numbers))
    return found


@cache
def demangled(name: str) -> str:
    """'attend_whole<BFloat16, 64, 200>': without namespaces and arguments."""
    program = shutil.which("c++filt")
    if program is None:
        raise Unreadable("c++filt (binutils) was not found")
    return short_name(_run(program, name).strip())


def short_name(text: str) -> str:
    """A kernel's name and template arguments out of what c++filt says."""
    head = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", text)
    found = re.match(r"(?:\w+ )?(\w+(?:<[^()]*>)?)\(", head)
    if found is None:
        raise Unreadable(f"no name of a kernel: {text}")
    return found[1]


@cache
def _cuobjdump() -> str:
    program = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if program is None:
        try:
            import triton
        except ImportError:
            raise Unreadable("cuobjdump was not found (CUDA toolkit, or triton)") from None
        program = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return program


def _run(*command: str, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise Unreadable(f"{Path(command[0]).name} failed: {error.stderr[-2000:]}") from error
    return done.stdout


def table(findings: list[dict[str, Any]]) -> str:
    """The findings as Markdown."""
    stamp = library.build_info()
    lines = [
        "# CUDA kernels: what the compiled code uses",
        "",
        "Written by `python -m bench.cuda_resources`; no GPU is needed. Every kernel of the op library, compiled by",
        f"nvcc {stamp.get('cuda')} and read with cuobjdump. The tests hold each line to: no stack and no local memory; registers and shared memory",
        "of all blocks that share a processor within its limits; HGMMA (of 8-bit numbers QGMMA) and TMA loads in the kernels for sm_90a,",
        "multicast ones among them where the blocks of a cluster share weights; HMMA (QMMA) in the portable ones. These are facts about code, not speeds: no GPU has run these kernels yet.",
        "",
        "| architecture | kernel | threads | blocks a processor | registers | shared memory (bytes) | HGMMA | HMMA | TMA loads | multicast | blocks a cluster | rules broken |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = (
        "threads",
        "resident",
        "registers",
        "shared",
        "hgmma",
        "hmma",
        "tma_loads",
        "multicasts",
        "cluster",
    )
    for own in findings:
        cells = [own["architecture"], f"`{own['kernel']}`", *(own[key] for key in keys)]
        cells.append("; ".join(own["broken"]) or "none")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Prints or writes the findings; 1 where a rule is broken."""
    parser = argparse.ArgumentParser(description="What the compiled CUDA kernels use of a GPU.")
    parser.add_argument("--json", action="store_true", help="print instead of writing the table")
    options = parser.parse_args(arguments)
    try:
        findings = sorted(examine(), key=lambda own: (own["architecture"], own["kernel"]))
    except Unreadable as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(findings))
    else:
        TABLE.write_text(table(findings), encoding="utf-8")
    return 1 if any(own["broken"] for own in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
