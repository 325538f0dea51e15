"""What the compiled Triton kernels use of a GPU, read from the code: no GPU is needed.

    python -m bench.kernel_resources                                 # writes docs/triton-kernels.md
    python -m bench.kernel_resources --json --architectures sm_90    # prints what was read

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernel_specimens import Launch, specimens

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "triton-kernels.md"
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# Bytes of shared memory that a block may have; the compiler does not check. The tiles of sm_80 serve sm_86, sm_89
# and sm_120 as well, which have fewer than its own 166,912.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
REGISTERS = 65_536
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
        shared, registers = self.shared * per_sm, self.registers * self.threads * per_sm
        rules = {
            f"{self.stack} bytes of stack, {self.local_accesses} accesses to local memory": not (
                self.stack or self.local_accesses
            ),
            f"{shared} bytes of shared memory": shared <= SHARED_LIMIT[architecture],
            f"{registers} registers": registers <= REGISTERS,
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


def examine(names: list[str], wanted: str) -> Iterator[dict[str, Any]]:
    """What the code of the specimens uses whose "kernel, class" holds ``wanted``, and each rule that it breaks."""
    for name in names:
        architecture = ARCHITECTURES[name]
        for specimen in specimens(name):
            if wanted not in f"{specimen.name}, {specimen.shape_class}":
                continue
            resources = read(compile_for(specimen.launch, architecture), architecture)
            yield {
                "architecture": name,
                "kernel": specimen.name,
                "class": specimen.shape_class,
                "constants": _shown(specimen.launch),
                **asdict(resources),
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
        "Written by `python -m bench.kernel_resources`; no GPU is needed. Every kernel with every tile of `kernels/tiles/`, at the models' sizes (what spills beside these: kernels/README.md),",
        f"compiled by Triton {triton.__version__} and read with cuobjdump. The tests hold each line to: no stack and no local memory, shared memory within the",
        "architecture's limit, tensor-core instructions (HMMA, HGMMA, UTCHMMA) where the products are 16-bit and none of another architecture, TMA loads",
        "where a tile asks for them. These are facts about code, not speeds.",
        "",
        "| architecture | kernel | class | tile | registers | shared memory (bytes) | tensor-core instructions | TMA loads | rules broken |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for own in findings:
        figures = [own[key] for key in ("registers", "shared", "tensor_core", "tma_loads")]
        cells = [own["architecture"], own["kernel"], own["class"], own["constants"], *figures]
        cells.append("; ".join(own["broken"]) or "none")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Prints or writes the findings; 1 where a rule is broken."""
    parser = argparse.ArgumentParser(description="What the compiled Triton kernels use of a GPU.")
    parser.add_argument(
        "--architectures", nargs="+", default=[*ARCHITECTURES], choices=ARCHITECTURES
    )
    parser.add_argument("--kernels", default="", help='part of "kernel, class", as in the table')
    parser.add_argument("--json", action="store_true", help="print instead of writing the table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets the kernels; unset it to compile them")
    findings = list(examine(options.architectures, options.kernels))
    if options.json:
        print(json.dumps(findings))
    else:
        TABLE.write_text(table(findings), encoding="utf-8")
    return 1 if any(own["broken"] for own in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
