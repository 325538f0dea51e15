"""Memory in huge pages: weights that share blocks of it, and rows that pass from kernel to kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpu_processes import ANONYMOUS, in_a_process
from test_layer_arguments import OPS, C, parameters
from torch import Tensor

from beit3_fast.layout import TokenLayout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def layer(x: Tensor, own: dict[str, Any]) -> Tensor:
    """A layer on rows x of samples of 50."""
    layout = TokenLayout.from_lengths([50] * (len(x) // 50), [0] * (len(x) // 50))
    bounds = [0, len(x)]
    y: Tensor = OPS.encoder_layers(
        x,
        *own.values(),
        bounds,
        bounds,
        bounds,
        2,
        *([], [], [], []),
        "bidirectional",
        layout.cu_vision,
        layout.cu_text,
    )
    return y


def test_weights_lie_in_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages to ask for")
    packed = OPS.pack_weight(torch.zeros(64, 64))
    place, inside = packed.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            begin, end = (int(edge, 16) for edge in first.split("-"))
            inside = begin <= place < end
        elif inside and first == "VmFlags:":
            assert "hg" in rest
            return
    raise AssertionError("the weight lies in no mapping")


def test_a_block_of_weights_lasts_as_long_as_one_of_them() -> None:
    """Of every size, also one of more than a block, dropped in any order."""
    shapes = [(33, 70), (800, 3000), (1, 1), (64, 64), (3000, 3500), (500, 4000), (90, 16)] * 2
    weights = [torch.full(shape, float(i + 1)) for i, shape in enumerate(shapes)]
    packed = [OPS.pack_weight(weight) for weight in weights]
    assert all(one.data_ptr() % 64 == 0 for one in packed)
    for gone in (1, 0, 3, 5, 8, 4, 12):
        packed[gone] = None
        packed.append(OPS.pack_weight(torch.zeros(700, 700)))
        for weight, one in zip(weights, packed, strict=False):
            assert one is None or torch.equal(OPS.unpack_weight(one, *weight.shape), weight)


def test_weights_give_their_memory_back() -> None:
    """MiB that 120 weights of 4 MiB take while they are there, and that stay."""
    printed = in_a_process(
        ANONYMOUS
        + """
import torch
from cpu_cases import OPS
weight = torch.ones(1024, 1024)
OPS.pack_weight(weight)
before = anonymous()
kept = [OPS.pack_weight(weight) for _ in range(120)]
held = anonymous() - before
del kept
print(held >> 10, (anonymous() - before) >> 10)
"""
    )
    held, stay = map(int, printed.split())
    assert 480 <= held <= 490
    assert stay <= 8


def test_a_weight_that_stays_keeps_no_others() -> None:
    """MiB that stay of 400 weights of 1.1 MiB, of which every hundredth is kept."""
    printed = in_a_process(
        ANONYMOUS
        + """
import torch
from cpu_cases import OPS
weight = torch.ones(536, 536)
OPS.pack_weight(weight)
before = anonymous()
packed = [OPS.pack_weight(weight) for _ in range(400)]
for i in range(400):
    if i % 100: packed[i] = None
print((anonymous() - before) >> 10)
"""
    )
    assert int(printed) <= 24


def test_results_are_not_overwritten() -> None:
    """By other calls, whatever sizes these have and in whatever order results go."""
    own = parameters(experts=1)
    given = [torch.randn(rows, C) for rows in (9000, 9050, 18000, 9000, 30000, 12000, 9000)]
    alone = [torch.cat([layer(part, own) for part in x.split(1000)]) for x in given]
    results = [layer(x, own) for x in given]
    for gone in (2, 0, 5):
        results[gone] = layer(given[gone], own)
    for result, expected in zip(results, alone, strict=True):
        torch.testing.assert_close(result, expected)


def test_small_results_that_are_kept_take_no_huge_pages() -> None:
    """MiB of address space that 60 results of 250 KB take."""
    printed = in_a_process(
        """
import re, torch
from pathlib import Path
from test_cpu_memory import C, layer, parameters
def size():
    return int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
own, x = parameters(experts=1), torch.zeros(2000, C)
layer(x, own)
before = size()
kept = [layer(x, own) for _ in range(60)]
print((size() - before) >> 10)
"""
    )
    assert int(printed) <= 40


def test_a_layer_uses_memory_again_within_a_call() -> None:
    """MiB that stay of rows between kernels: four times 7, and once 29 for what is 22 first and 29 later."""
    printed = in_a_process(
        ANONYMOUS
        + """
import torch
import test_layer_arguments
from test_cpu_memory import C, layer
torch.set_num_threads(1)
test_layer_arguments.F = 4 * C
own = test_layer_arguments.parameters(experts=1)
layer(torch.zeros(50, C), own)
x = torch.zeros(60_000, C)
before = anonymous()
layer(x, own)
print((anonymous() - before) >> 10)
"""
    )
    assert int(printed) <= 64


def test_idle_memory_has_a_limit() -> None:
    """MiB that stay of calls that never want the same again, 600 in all."""
    printed = in_a_process(
        ANONYMOUS
        + """
import torch
from test_cpu_memory import C, layer, parameters
torch.set_num_threads(1)
own = parameters(experts=1)
before = anonymous()
for rows in (20_000, 50_000, 120_000, 300_000):
    layer(torch.zeros(rows, C), own)
print((anonymous() - before) >> 10)
"""
    )
    assert int(printed) <= 160


@pytest.mark.timeout(120)
def test_a_child_of_a_busy_parent_takes_memory() -> None:
    """However often it is forked while other threads take and give some."""
    printed = in_a_process(
        """
import os, threading, time, torch
from cpu_cases import OPS
torch.set_num_threads(1)
weight, done = torch.zeros(1, 1), False
def work():
    while not done: OPS.pack_weight(weight)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
stuck = 0
for _ in range(150):
    child = os.fork()
    if child == 0:
        OPS.pack_weight(weight)
        os._exit(0)
    end = time.time() + 10
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.time() > end:
            stuck += 1
            os.kill(child, 9)
            os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    if stuck: break
done = True
for thread in threads: thread.join()
print(stuck)
"""
    )
    assert printed == "0"
