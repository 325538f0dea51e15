"""What the compiled Triton kernels use of a GPU, read from the code: no GPU is needed.

    python -m bench.kernel_resources            # writes docs/triton-kernels.md

A launch is recorded instead of run, compiled ahead of time for an architecture, and its machine code is read.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that one block may have; the compiler does not check.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# Tensor-core instructions in the machine code.
MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments by name, with compile-time constants and options apart."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


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


@contextmanager
def recorded(*kernels: Any) -> Iterator[list[Launch]]:
    """Within it, launches of these kernels are noted down instead of run."""
    launches: list[Launch] = []

    def note(kernel: Any) -> Callable[..., None]:
        def run(*args: Any, grid: Any, warmup: bool, **named: Any) -> None:
            parameters = {p.name: p for p in kernel.params}
            options = {key: named.pop(key) for key in [*named] if key not in parameters}
            given = dict(zip(parameters, args, strict=False)) | named
            constants = {
                name: value
                for name, value in given.items()
                if parameters[name].is_constexpr or value is None
            }
            arguments = {name: value for name, value in given.items() if name not in constants}
            launches.append(Launch(kernel, arguments, constants, options))

        return run

    before = [kernel.run for kernel in kernels]
    for kernel in kernels:
        kernel.run = note(kernel)
    try:
        yield launches
    finally:
        for kernel, run in zip(kernels, before, strict=True):
            kernel.run = run


def compile_for(launch: Launch, architecture: int) -> Any:
    """The compiled kernel, specialised as Triton would at this launch: on numbers that 16 divides, and on 1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {name: place for place, name in enumerate(launch.kernel.arg_names)}
    plain = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for name, value in launch.arguments.items():
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
