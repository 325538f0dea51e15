"""When the CUDA kernels are taken, what is said where they are not, and their check in another process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import beit3_fast
from beit3_fast.cli import info
from beit3_fast.errors import KernelUnavailable
from beit3_fast.ops import (
    cuda_kernels,
    dispatch,
    kernel_cases,
    kernel_check,
    kernel_process,
    library,
    triton_kernels,
)
from beit3_fast.parity import Parity

RIGHT = Parity(0.0, 0.0, 0.0, True)
WRONG = Parity(9.0, 0.5, 0.0, False, "planted")
Ran = list[str]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BEIT3_FAST_CACHE", str(tmp_path / "cache"))
    for own in (cuda_kernels, dispatch, kernel_check):
        own.reset()
    yield
    monkeypatch.undo()
    for own in (cuda_kernels, dispatch, kernel_check):
        own.reset()


def at(op: str = "expert_linear", **changes: Any) -> dispatch.Situation:
    plain = dispatch.Situation(op, "cuda", torch.bfloat16, False, False, False, False)
    return plain._replace(**changes)


def machine(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: tuple[str, ...]
) -> None:
    """This torch sees such a GPU, and the library holds such kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(library, "cuda_architectures", lambda: built)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Both kinds of kernels run; returns the checks that ran, all of which passed."""
    machine(monkeypatch, (9, 0), ("80", "90a", "100a"))
    ran: Ran = []

    def run(kernel: str, dtype: torch.dtype, device: str) -> kernel_check.Outcome:
        ran.append(kernel)
        return kernel_check.Outcome(kernel, "bfloat16", RIGHT, 0.0)

    monkeypatch.setattr(kernel_check, "run", run)
    monkeypatch.setattr(kernel_check, "identity", lambda: {"gpu": "planted"})
    monkeypatch.setattr(kernel_check, "_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_kernels, "why_unavailable", lambda device: None)
    return ran


def reason(**changes: Any) -> str:
    with pytest.raises(KernelUnavailable) as caught:
        dispatch.choose(at(**changes), "cuda")
    return str(caught.value)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "takes CUDA tensors, these are on cpu" in reason(device="cpu")
    monkeypatch.setattr(library, "cuda_architectures", lambda: ("90a",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "this torch sees no GPU" in reason()


def test_a_library_without_them_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    (tmp_path / "_build.json").write_text('{"without_cuda": "nvcc was not found"}')
    status = library.LibraryStatus(True, "", stamp={"cuda_architectures": ""})
    monkeypatch.setattr(library, "_status", status)
    assert "which was built without: nvcc was not found" in reason()
    (tmp_path / "_build.json").unlink()
    cuda_kernels.reset()
    dispatch.reset()
    assert "its build does not say why" in reason()
    monkeypatch.setattr(library, "_status", library.LibraryStatus(False, "is planted"))
    cuda_kernels.reset()
    dispatch.reset()
    assert "which is planted" in reason()


@pytest.mark.parametrize(
    ("arch", "takes", "refuses"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(9, 0), (7, 5), (10, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("100a", [(10, 0)], [(10, 3), (12, 0), (9, 0)]),
        ("100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("89", [(8, 9)], [(8, 0), (8, 6)]),
        ("120", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_which_gpus_code_runs_on(
    arch: str, takes: list[tuple[int, int]], refuses: list[tuple[int, int]]
) -> None:
    assert all(cuda_kernels.runs_on(arch, *own) for own in takes)
    assert not any(cuda_kernels.runs_on(arch, *own) for own in refuses)


def test_another_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (12, 0), ("90a", "100a"))
    said = reason()
    assert "was compiled for sm_90a, sm_100a, and this GPU has compute capability 12.0" in said
    assert "BEIT3_FAST_CUDA_ARCHS=120" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16, got float32"),
        ({"needs_grad": True}, "no gradients"),
        ({"op": "shared_attention", "mask_tensor": True}, "mask tensor"),
        ({"op": "masked_linear_cross_entropy"}, "no kernel for this op"),
        ({"op": "patch_embedding"}, "no kernel for this op"),
        ({"misfit": "takes heads of width 64"}, "takes heads of width 64"),
    ],
)
def test_what_the_kernels_cannot_take(changes: Any, words: str, hopper: Ran) -> None:
    assert words in reason(**changes)
    assert dispatch.choose(at(**changes)).impl in ("triton", "composite")
    assert dispatch.choose(at(), "cuda").impl == "cuda"


@pytest.mark.parametrize("op", dispatch.OPS)
def test_auto_takes_triton_first(op: str, hopper: Ran) -> None:
    for _ in range(2):
        choice = dispatch.choose(at(op))
        assert choice.impl == "triton"
        assert "behind triton" in dict(choice.rejected)["cuda"]
    assert hopper == [op], "CUDA's kernel was not needed, and not checked"


@pytest.mark.parametrize("op", ["cached_attention", "head_top_k"])
def test_auto_takes_them_where_triton_has_none(op: str, hopper: Ran) -> None:
    """A mask of every key of its own is no obstacle to the attention of decoding steps."""
    for _ in range(2):
        choice = dispatch.choose(at(op, mask_tensor=op == "cached_attention"))
        assert choice.impl == "cuda"
        assert "no kernel for this op" in dict(choice.rejected)["triton"]
    assert hopper == [f"cuda_{op}"]


@pytest.mark.parametrize("op", dispatch.OPS)
def test_auto_takes_them_without_triton_once_their_check_passed(
    op: str, hopper: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "why_unavailable", lambda device: "needs triton")
    dispatch.reset()
    for _ in range(2):
        assert dispatch.choose(at(op)).impl == "cuda"
    assert hopper == [f"cuda_{op}"]


def test_float8_has_a_check_of_its_own(hopper: Ran) -> None:
    """Triton stands in front, but has no such products."""
    choice = dispatch.choose(at(float8=True))
    assert choice.impl == "cuda"
    assert dict(choice.rejected)["triton"] == "has no float8 products"
    assert hopper == ["cuda_float8_linear"]


@pytest.mark.parametrize(
    ("capability", "built", "words"),
    [
        (
            (8, 0),
            ("80", "90a"),
            "from compute capability 8.9 on, and this GPU has 8.0; use 'bfloat",
        ),
        ((8, 9), ("80", "90a"), "not compiled with float8 .* BEIT3_FAST_CUDA_ARCHS=89"),
        ((8, 9), ("89",), None),
        ((9, 0), ("80", "90a"), None),
        ((9, 0), ("80",), "was compiled for sm_80, and this GPU"),
    ],
)
def test_float8_where_tensor_cores_have_it(
    capability: tuple[int, int],
    built: tuple[str, ...],
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, capability, built)
    said = cuda_kernels.obstacle("float8_linear", "cuda", torch.bfloat16, False)
    if words is None:
        assert said is None
    else:
        assert re.search(words, str(said))


def test_kernels_that_fail_are_left_out(hopper: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's in front, then the CUDA ones behind it."""
    real, wrong = kernel_check.run, ["expert_linear"]

    def run(kernel: str, dtype: torch.dtype, device: str) -> kernel_check.Outcome:
        outcome = real(kernel, dtype, device)
        return outcome._replace(parity=WRONG) if kernel in wrong else outcome

    monkeypatch.setattr(kernel_check, "run", run)
    with pytest.warns(RuntimeWarning, match="expert_linear in bfloat16.*report"):
        choice = dispatch.choose(at())
    assert choice.impl == "cuda"
    assert "failed its check here (planted)" in dict(choice.rejected)["triton"]
    assert hopper == ["expert_linear", "cuda_expert_linear"]
    assert dispatch.choose(at(), "triton").impl == "triton", "whoever asks for it by name gets it"
    wrong.append("cuda_shared_attention")
    wrong.append("shared_attention")
    with pytest.warns(RuntimeWarning, match="cuda_shared_attention in bfloat16.*report"):
        choice = dispatch.choose(at("shared_attention"))
    assert choice.impl == "composite"
    assert "failed its check here (planted)" in dict(choice.rejected)["cuda"]


def test_a_committed_run_of_triton_says_nothing_of_cuda(
    hopper: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "why_unavailable", lambda device: "needs triton")
    dispatch.reset()
    own = {"architecture": "sm_90", "sources": "1", "triton": "2", "cuda": "3"}
    monkeypatch.setattr(kernel_check, "identity", lambda: own)
    monkeypatch.setattr(kernel_check, "_folder", lambda: tmp_path)
    file = tmp_path / "verified.json"
    of_triton = '{"runs": [{"architecture": "sm_90", "sources": "1", "triton": "2"}]}'
    of_cuda = '{"runs": [{"architecture": "sm_90", "cuda": "3"}]}'
    for content, checks in ((of_cuda, 0), (of_triton, 1)):
        file.write_text(content)
        kernel_check.reset()
        assert dispatch.choose(at()).impl == "cuda"
        assert len(hopper) == checks


def test_explain_names_sizes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "why_unavailable", lambda device: None)
    for heads, fits in ((4, False), (1, True)):
        model = beit3_fast.create_model("beit3_tiny_patch16_32", num_heads=heads, dtype="bfloat16")
        found = {own.op: dict(own.rejected) for own in beit3_fast.explain(model, quiet=True)}
        said = found["shared_attention (inference)"]["cuda"]
        assert ("takes heads of width 64 or 88, got 16" in said) is not fits
        assert "takes" not in found["expert_linear (inference)"]["cuda"]


def test_info_and_verify_name_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, (9, 0), ("90a",))
    monkeypatch.setattr(triton_kernels, "obstacle", lambda device, dtype: "planted")
    dtypes = (torch.bfloat16, torch.float16)
    names = [(f"cuda_{op}", dtype) for dtype in dtypes for op in cuda_kernels.OPS]
    names.remove(("cuda_float8_linear", torch.float16))
    assert kernel_check.runnable("cuda") == names
    assert {name for name, _ in names} == {*kernel_cases.CUDA_CASES}
    status = library.LibraryStatus(True, "", stamp={"cuda_architectures": "80 90a"})
    assert "CUDA kernels: sm_80, sm_90a" in status.describe()
    assert info.environment()["cuda_kernels"] == "for sm_90a"
    cuda_kernels.reset()
    machine(monkeypatch, (8, 0), ("90a",))
    said = info.environment()["cuda_kernels"]
    assert said.startswith("for sm_90a; not in use, for each was compiled for sm_90a, and this GPU")


class TestProcess:
    """What becomes of a check whose process does this."""

    def check(self, code: str, monkeypatch: pytest.MonkeyPatch) -> kernel_check.Outcome:
        monkeypatch.setattr(kernel_process, "_CODE", code.replace("{", "{{").replace("}", "}}"))
        return kernel_check.Outcome(*kernel_process.run("cuda_expert_linear", "bfloat16", 0))

    def ready(self, rest: str) -> str:
        return f"print({kernel_process._READY!r}, flush=True)\n{rest}"

    def test_an_outcome_comes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = {"parity": asdict(Parity(1.0, 2.0, 3.0, True)), "settled": False}
        code = f"print({json.dumps(said)!r})"
        outcome = self.check(self.ready(code), monkeypatch)
        assert outcome.parity == Parity(1.0, 2.0, 3.0, True)
        assert not outcome.settled
        assert (outcome.kernel, outcome.dtype) == ("cuda_expert_linear", "bfloat16")
        assert outcome.seconds > 0

    @pytest.mark.parametrize("touched", [True, False])
    def test_one_that_never_ends_is_stopped(
        self, touched: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernel_process, "LIMIT_S", 1)
        code = "import time; time.sleep(60)"
        outcome = self.check(self.ready(code) if touched else code, monkeypatch)
        assert "did not come to an end within 1 s" in outcome.parity.reason
        assert not outcome.parity.passed
        assert outcome.settled is touched

    @pytest.mark.parametrize("touched", [True, False])
    def test_one_that_breaks_is_a_failure(
        self, touched: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = "raise RuntimeError('planted: an illegal memory access')"
        outcome = self.check(self.ready(code) if touched else code, monkeypatch)
        assert "planted: an illegal memory access" in outcome.parity.reason
        assert outcome.settled is touched

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_nothing_is_settled(self) -> None:
        outcome = kernel_check.run("cuda_expert_linear", torch.bfloat16, "cpu")
        assert "this torch sees no GPU" in outcome.parity.reason or "CUDA" in outcome.parity.reason
        _, _, parity, _, settled = kernel_process.run("cuda_expert_linear", "bfloat16", 0)
        assert not parity.passed
        assert not settled
