"""How many programs of a launch a multiprocessor can hold at a time, by what each of them takes of it.

What a program takes: registers (of each thread, in eights), shared memory (and what the driver keeps of it), threads.
Fewer programs than wanted leave the multiprocessor idle while they wait for memory.
"""

from __future__ import annotations

from typing import NamedTuple

from beit3_fast.kernels._tiles import SHARED_MEMORY

# Bytes of shared memory that the driver keeps of each program's.
RESERVED = 1024


class Multiprocessor(NamedTuple):
    """What its programs share."""

    shared: int  # bytes
    threads: int
    registers: int = 65_536
    programs: int = 16


# The tiles of sm_80 serve sm_86, sm_89 and sm_120 as well, which have fewer than its own 2048 threads.
MULTIPROCESSORS = {
    80: Multiprocessor(shared=SHARED_MEMORY["sm_80"], threads=1536),
    90: Multiprocessor(shared=SHARED_MEMORY["sm_90"], threads=2048),
    100: Multiprocessor(shared=SHARED_MEMORY["sm_100"], threads=2048),
}
# Programs wanted at a time on sm_80, sm_90 and sm_100, by kernel and class of kernels/tiles/, where they are not one for
# all; products have ``per_sm`` in their tile. A program alone hides the latency of memory by its warps and stages only.
WANTED: dict[tuple[str, str], tuple[int, int, int]] = {
    ("row_statistics", "3072 features"): (8, 8, 8),
    ("join", "96 parts"): (6, 6, 6),
    ("slope", "fp32 weights"): (4, 4, 4),
    ("slope", "weights"): (4, 4, 4),
    ("slope", "fp32 odd weights"): (2, 2, 2),
    ("slope", "odd weights"): (2, 2, 2),
    ("norm_backward", "fp32 weights"): (4, 4, 4),
    ("norm_backward", "weights"): (4, 4, 4),
    ("norm_backward", "fp32 odd weights"): (4, 4, 4),
    ("norm_backward", "odd weights"): (4, 4, 4),
    ("finish", "fp32 weights"): (4, 4, 4),
    ("finish", "weights"): (4, 4, 4),
    ("finish", "fp32 odd weights"): (2, 2, 2),
    ("finish", "odd weights"): (2, 2, 2),
    ("shared_attention", "fp32"): (4, 3, 3),
    ("shared_attention", "short"): (2, 2, 2),
    ("shared_attention", "long"): (1, 2, 1),
    ("shared_attention", "wide fp32"): (4, 2, 2),
    ("shared_attention", "wide short"): (2, 2, 2),
    ("query_gradient", "fp32 backward"): (2, 2, 2),
    ("query_gradient", "backward"): (2, 2, 2),
    ("query_gradient", "wide fp32 backward"): (2, 2, 2),
    ("key_gradient", "fp32 backward"): (4, 6, 6),
    ("key_gradient", "backward"): (1, 2, 1),
    ("key_gradient", "wide fp32 backward"): (3, 4, 4),
    ("masked_linear_cross_entropy loss", "fp32"): (4, 4, 4),
    ("masked_linear_cross_entropy loss", "16 bits"): (2, 1, 1),
    ("masked_linear_cross_entropy slope", "fp32"): (4, 4, 4),
    ("masked_linear_cross_entropy slope", "16 bits"): (2, 1, 1),
}


def wanted(kernel: str, shape_class: str, architecture: str) -> int:
    """Programs of a launch that are wanted on a multiprocessor at a time."""
    numbers = WANTED.get((kernel, shape_class), (1, 1, 1))
    return dict(zip(MULTIPROCESSORS, numbers, strict=True))[int(architecture.removeprefix("sm_"))]


def resident(registers: int, shared: int, threads: int, architecture: int) -> int:
    """Programs that fit; ``registers`` of a thread, ``shared`` bytes and ``threads`` of a program."""
    whole = MULTIPROCESSORS[architecture]
    return min(
        whole.registers // (-(-registers // 8) * 8 * threads),
        whole.shared // (shared + RESERVED),
        whole.threads // threads,
        whole.programs,
    )
