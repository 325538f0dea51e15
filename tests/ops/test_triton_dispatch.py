"""When the Triton kernels are taken, and what is said where they are not."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.library import CustomOpDef

from beit3_fast.errors import KernelUnavailable
from beit3_fast.ops import dispatch, expert_linear, triton_kernels

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    triton_kernels.reset()
    dispatch.reset()
    yield
    triton_kernels.reset()
    dispatch.reset()


def at(op: str = "expert_linear", **changes: object) -> dispatch.Situation:
    plain = dispatch.Situation(op, "cpu", torch.float32, False, False, False, False)
    return plain._replace(**changes)


def reason(**changes: object) -> str:
    with pytest.raises(KernelUnavailable) as caught:
        dispatch.choose(at(**changes), "triton")
    return str(caught.value)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in reason()
    with pytest.raises(KernelUnavailable, match="CUDA tensors"):
        expert_linear(torch.randn(2, 4), [torch.randn(3, 4)], bounds=(0, 2), impl="triton")


def test_a_triton_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError(f"planted: {name}")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_kernels, "import_module", broken)
    said = reason()
    assert "needs triton" in said
    assert "planted" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"mask_tensor": True, "op": "shared_attention"}, "mask tensor"),
        ({"device": "meta"}, "meta"),
        ({"op": "shared_attention", "head_width": 136}, "at most 128 columns, got 136"),
    ],
)
def test_what_the_kernels_cannot_take(
    changes: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert words in reason(**changes)


def test_bf16_is_refused_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bfloat16" in reason(dtype=torch.bfloat16)


def test_no_call_of_another_implementation_imports_triton() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "from beit3_fast.ops import expert_linear\n"
        "expert_linear(torch.randn(2, 4), [torch.randn(3, 4)], bounds=(0, 2))\n"
        "assert before or 'triton' not in sys.modules"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_op_launches_on_the_device_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself takes the current one. No device is needed: the op ends at what it looks up first."""
    entered: list[torch.device] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    def stop(*_: object) -> None:
        raise KernelUnavailable("here")

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(triton_kernels, "_kernels", stop)
    ops = [own for own in vars(triton_kernels).values() if isinstance(own, CustomOpDef)]
    assert len(ops) == 6
    for place, op in enumerate(ops):
        takes = len(inspect.signature(op._init_fn).parameters)
        elsewhere = torch.device("cuda", place)
        operand = SimpleNamespace(device=elsewhere)
        with pytest.raises(KernelUnavailable, match="here"):
            op._init_fn(operand, *[operand] * (takes - 1))
        assert entered.pop() == elsewhere
    monkeypatch.setattr(torch.cuda, "device", None)
    with pytest.raises(KernelUnavailable, match="here"):
        ops[0]._init_fn(*[SimpleNamespace(device=torch.device("cpu"))] * 15)
