"""The compiled CPU ops as a good neighbour: one pool of threads, forked workers, no growth."""

from __future__ import annotations

import os
import shutil
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
    torch.set_num_threads(3)
    expected = [Features()[i] for i in range(6)]
    loader = DataLoader(Features(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = list(loader)
    again = [Features()[i] for i in range(6)]  # the parent's threads are still there
    for a, b, c in zip(found, expected, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, b)


def in_a_process(script: str, **variables: str) -> str:
    """What ``script`` prints, run where nothing else has started threads."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables
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


ANONYMOUS = """
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
"""


def test_memory_does_not_grow() -> None:
    """KiB that 300 calls add once the scratch memory of every thread is there."""
    printed = in_a_process(
        COUNT
        + ANONYMOUS
        + """
torch.set_num_threads(2)
linear, attention = Linear(torch.float32, (500, 200, 300)), Attention(torch.float32, [197] * 2, [9] * 2, 4, 64)
def run(times):
    for _ in range(times): linear.run(); attention.run("bidirectional")
def added():
    before = anonymous(); run(300)
    return anonymous() - before
# A thread that a busy machine kept from its first task gets its scratch memory late, but once.
run(100); print(min(added(), added()))
"""
    )
    assert int(printed) < 512


def test_a_wide_weight_packed_for_a_call_does_not_stay() -> None:
    """MiB that a call adds whose weight is not packed, 128 of them, as in training."""
    printed = in_a_process(
        COUNT
        + ANONYMOUS
        + """
x = torch.zeros(2, 4096, dtype=torch.bfloat16)
def run(width):
    weight = torch.zeros(width, 4096, dtype=torch.bfloat16)
    call = (x, [weight], [], [], [], [], None, None, [0, 2], 1e-5, "none")
    torch.ops.beit3_fast.expert_linear(*call)
run(64); before = anonymous(); run(16384); print((anonymous() - before) >> 10)
"""
    )
    assert int(printed) < 64


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another library counts allocations")
def test_what_repeats_allocates_nothing_large(tmp_path: Path) -> None:
    """Results are tensors of PyTorch's; all else that a call needs is there after the first one."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    counter = tmp_path / "counter.so"
    command = [*compiler.split(), "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(counter)]
    subprocess.run([*command, str(HERE / "counted_allocations.cpp")], check=True)
    printed = in_a_process(
        """
import ctypes, torch
from cpu_cases import Attention, Cached, Linear, OPS
from test_cpu_memory import C, layer, parameters
torch.set_num_threads(1)
linear = Linear(torch.float32, (6000, 40, 70), experts=2, residual=True, gather=True)
int8 = [OPS.quantize_weight(weight) for weight in linear.weights]
attention = Attention(torch.float32, [400] * 2, [9] * 2, 4, 64)
cached = Cached(torch.float32, 300, 6, [0, 1], 2, 64)
images, token = torch.zeros(2, 3, 96, 96), torch.zeros(70)
packed = OPS.pack_weight(torch.zeros(70, 768))
x, own = torch.zeros(9000, C), parameters(experts=1)
vector, places = torch.zeros(C), torch.arange(9000)
def work():
    linear.run(); linear.run(packed=[]); linear.run(packed=int8)
    attention.run("causal"); cached.run(); cached.pack(200); cached.run()
    OPS.patch_embedding(images, packed, token, token, token, None, None, 16, True)
    OPS.unpack_rows(OPS.expert_layer_norm(x, [vector], [vector], [1e-5], [0, 9000]), places, 9100)
    layer(x, own)
count = ctypes.CDLL(None).large_allocations
count.restype = ctypes.c_long
work(); first = count(); work(); work(); print(first > 0, count() - first)
""",
        LD_PRELOAD=str(counter),
    )
    assert printed == "True 0"


@pytest.mark.parametrize("threads", [1, 2])
def test_want_of_memory_is_said_as_such(threads: int) -> None:
    """Within a parallel region, too; and the next call is as before."""
    printed = in_a_process(
        COUNT
        + f"torch.set_num_threads({threads})"
        + """
import resource
from cpu_cases import OPS
linear, keys = Linear(torch.float32, (500, 64, 64)), torch.randn(900_000, 2)
offsets = [torch.tensor([0, n]).int() for n in (len(keys), 0, 1, 0)]
def gradients():  # which keep the keys of a head; a call without them meets a few at a time
    own = (keys[:1], keys[:1], keys, keys, *offsets, None, 2, 0.5, "bidirectional")
    return OPS.shared_attention_gradients(*own)
before = linear.run()
torch.randn(3_000_000).exp()
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
try:
    gradients()
except Exception as error:
    print(type(error).__name__, str(error))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(torch.equal(linear.run(), before), all(t.isfinite().all() for t in gradients()))
"""
    )
    assert printed.splitlines() == ["MemoryError std::bad_alloc", "True True"]
