"""The compiled CPU ops as a good neighbour: one pool of threads, forked workers, no growth."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import Attention, Linear
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
HERE = Path(__file__).parent


class Features(Dataset[Tensor]):
    """Samples that are computed with the ops, as a data loader with a frozen encoder would."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        linear = Linear(torch.float32, (60, 65, 70), seed=index, packed=False)
        attention = Attention(torch.float32, [30], [9], 2, 16, seed=index)
        return torch.cat([linear.run().flatten(), attention.run("seq2seq").flatten()])


@pytest.mark.timeout(60)
def test_forked_workers_of_a_parent_with_threads() -> None:
    """A child of fork has the parent's memory and none of its threads: waiting for one would never end."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        expected = [Features()[i] for i in range(6)]
        loader = DataLoader(
            Features(), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        found = list(loader)
        again = [Features()[i] for i in range(6)]  # the parent's threads are still there
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(found, expected, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, b)


def in_a_process(script: str) -> str:
    """What ``script`` prints, run where nothing else has started threads."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    prelude = f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


COUNT = """
import os, torch
from cpu_cases import Attention, Linear
def threads(): return len(os.listdir("/proc/self/task"))
def work():
    for seed in range(3):
        Linear(torch.float32, (200, 65, 300), seed=seed).run()
        Attention(torch.float32, [90] * 4, [9] * 4, 4, 16, seed=seed).run("causal")
"""


def test_the_threads_are_those_of_torch() -> None:
    """One thread starts none; three start two, which torch's own products then use, and no more."""
    printed = in_a_process(
        COUNT
        + """
torch.set_num_threads(1)
before = threads(); work(); alone = threads() - before
torch.set_num_threads(3)
work(); ours = threads() - before
torch.randn(3_000_000).exp().sum(); torchs = threads() - before
print(alone, ours, torchs)
"""
    )
    assert printed == "0 2 2"


def test_one_openmp_runtime() -> None:
    printed = in_a_process(
        COUNT
        + """
work()
names = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
print(len(names), names)
"""
    )
    assert printed.startswith("1 "), printed


def test_memory_does_not_grow() -> None:
    """KiB that 300 calls add once the scratch memory of every thread is there."""
    printed = in_a_process(
        COUNT
        + """
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
torch.set_num_threads(2)
linear, attention = Linear(torch.float32, (500, 200, 300)), Attention(torch.float32, [197] * 2, [9] * 2, 4, 64)
def run(times):
    for _ in range(times): linear.run(); attention.run("bidirectional")
run(100); before = anonymous(); run(300); print(anonymous() - before)
"""
    )
    assert int(printed) < 512
