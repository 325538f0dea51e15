"""What the compiled Triton kernels use of a GPU, read from the code: no GPU is needed.

    python -m bench.kernel_resources                                 # writes docs/triton-kernels.md
    python -m bench.kernel_resources --json "sm_90, slope, *"        # prints what was read of some

Every kernel with every shipped tile: the launch is recorded instead of run, compiled ahead of time for the
architecture, and its machine code is read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernel_residency import resident
from bench.kernel_specimens import Launch, specimens

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "triton-kernels.md"
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# Tensor-core instructions in the machine code.
MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Resources:
    """What the machine code of one launch uses: per thread, per block, and instructions by name."""

    registers: int
    stack: int
    shared: int
    threads: int
    tensor_core: int
    other_tensor_core: int
    tma_loads: int
    local_accesses: int

    def broken(
        self, architecture: int, *, wants_mma: bool, wants_tma: bool, per_sm: int
    ) -> list[str]:
        """Each rule that the compiled code breaks, with its figures."""
        fits = resident(self.registers, self.shared, self.threads, architecture)
        rules = {
            f"{self.stack} bytes of stack, {self.local_accesses} accesses to local memory": not (
                self.stack or self.local_accesses
            ),
            f"room for {fits} of {per_sm} programs on a multiprocessor, each with {self.threads} threads of "
            f"{self.registers} registers and {self.shared} bytes of shared memory": fits >= per_sm,
            f"{self.tensor_core} {MMA[architecture]} instructions": (self.tensor_core > 0)
            is wants_mma,
            f"{self.other_tensor_core} tensor-core instructions of another architecture": (
                self.other_tensor_core == 0
            ),
            f"{self.tma_loads} TMA loads": (self.tma_loads > 0) is wants_tma,
        }
        return [figure for figure, holds in rules.items() if not holds]


def compile_for(launch: Launch, architecture: int) -> Any:
    """The compiled kernel, specialised as Triton would at this launch: on numbers that 16 divides, and on 1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    places = {name: place for place, name in enumerate(launch.kernel.arg_names)}
    plain = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        elif value == 1 and name not in plain:
            constants[name] = 1
            continue
        else:
            signature[name] = "i32"
        if name not in plain and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(places[name],)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in launch.kernel.arg_names}
    source = ASTSource(
        launch.kernel,
        ordered,
        {(places[name],): value for name, value in constants.items()},
        attributes,
    )
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=launch.options
    )


def read(compiled: Any, architecture: int) -> Resources:
    """The resources of a compiled kernel, from its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        code = _cuobjdump("-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage!r}")

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}\b", code))

    own = MMA[architecture]
    return Resources(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * 32,
        tensor_core=count(own),
        other_tensor_core=sum(count(name) for name in {*MMA.values()} - {own}),
        tma_loads=count("UTMALDG"),
        local_accesses=count("(?:LDL|STL)"),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [str(program), option, str(cubin)], capture_output=True, text=True, check=True
    )
    return done.stdout


def examine(patterns: list[str]) -> Iterator[dict[str, Any]]:
    """What the code of the specimens uses, and each rule that it breaks: of those whose "architecture, kernel, class" fits a pattern."""
    for name, architecture in ARCHITECTURES.items():
        for specimen in specimens(name):
            title = f"{name}, {specimen.name}, {specimen.shape_class}"
            if not any(fnmatchcase(title, pattern) for pattern in patterns):
                continue
            resources = read(compile_for(specimen.launch, architecture), architecture)
            yield {
                "architecture": name,
                "kernel": specimen.name,
                "class": specimen.shape_class,
                "constants": _shown(specimen.launch),
                **asdict(resources),
                "per_sm": specimen.per_sm,
                "broken": resources.broken(
                    architecture,
                    wants_mma=specimen.wants_mma,
                    wants_tma=specimen.wants_tma,
                    per_sm=specimen.per_sm,
                ),
            }


def _shown(launch: Launch) -> str:
    """128x256x64, 8 warps, 3 stages"""
    blocks = "x".join(str(v) for k, v in launch.constants.items() if k.startswith("BLOCK_"))
    warps, stages = launch.options.get("num_warps", 4), launch.options.get("num_stages", 3)
    return f"{blocks}, {warps} warps, {stages} stages"


def table(findings: list[dict[str, Any]]) -> str:
    """The findings as Markdown."""
    import triton

    lines = [
        "# Triton kernels: what the compiled code uses",
        "",
        "Written by `python -m bench.kernel_resources`; no GPU is needed. Every kernel with every tile of `kernels/tiles/`, in each dtype of the tile,",
        f"compiled by Triton {triton.__version__} and read with cuobjdump. The tests hold each line to: no stack and no local memory, room on a multiprocessor for the",
        "programs wanted at a time (`per_sm` of the tile, or bench/kernel_residency.py), tensor-core instructions (HMMA, HGMMA, UTCHMMA) where the products",
        "are 16-bit and none of another architecture, TMA loads where a tile asks for them. These are facts about code, not speeds.",
        "",
        "| architecture | kernel | class | tile | registers | shared memory (bytes) | programs wanted | tensor-core instructions | TMA loads | rules broken |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for own in findings:
        lines.append(line(own))
    return "\n".join(lines) + "\n"


def line(own: dict[str, Any]) -> str:
    """The row of the table for one finding."""
    names = ("architecture", "kernel", "class", "constants")
    figures = ("registers", "shared", "per_sm", "tensor_core", "tma_loads")
    cells = [own[key] for key in (*names, *figures)]
    return f"| {' | '.join(map(str, cells))} | {'; '.join(own['broken']) or 'none'} |"


def main(arguments: list[str] | None = None) -> int:
    """Prints or writes the findings; 1 where a rule is broken."""
    parser = argparse.ArgumentParser(description="What the compiled Triton kernels use of a GPU.")
    parser.add_argument(
        "--json",
        nargs="+",
        metavar="PATTERN",
        help="print what is found of these instead of writing the table: 'architecture, kernel, class', with * and ?",
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets the kernels; unset it to compile them")
    findings = list(examine(options.json or ["*"]))
    if options.json:
        print(json.dumps(findings))
    else:
        TABLE.write_text(table(findings), encoding="utf-8")
    return 1 if any(own["broken"] for own in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
