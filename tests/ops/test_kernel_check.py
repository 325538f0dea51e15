"""The check before "auto" takes a Triton kernel: what it sees, what it keeps, and what a wrong kernel looks like."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import DEVICE

import beit3_fast
from beit3_fast import cli
from beit3_fast.kernels import _expert_linear_backward as gradient_kernels
from beit3_fast.kernels import _shared_attention_backward as backward_kernels
from beit3_fast.kernels import expert_linear as linear_kernels
from beit3_fast.kernels import shared_attention as attention_kernels
from beit3_fast.ops import dispatch, kernel_cases, kernel_check, triton_kernels
from beit3_fast.parity import Parity

ROOT = Path(__file__).resolve().parent.parent.parent
RIGHT, WRONG = Parity(0.0, 0.0, 0.0, True), Parity(9.0, 0.5, 0.0, False, "planted")
Ran = list[tuple[str, torch.dtype]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BEIT3_FAST_CACHE", str(tmp_path / "cache"))
    kernel_check.reset()
    yield
    kernel_check.reset()
    dispatch.reset()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """CUDA tensors are taken, and checks run on the device of the tests; returns those that ran."""
    real, ran = kernel_check.run, []

    def run(kernel: str, dtype: torch.dtype, device: str) -> kernel_check.Outcome:
        ran.append((kernel, dtype))
        return real(kernel, dtype, DEVICE)

    monkeypatch.setattr(kernel_check, "run", run)
    monkeypatch.setattr(triton_kernels, "why_unavailable", lambda device: None)
    return ran


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that cost nothing and pass."""
    cases = {kernel: lambda dtype, device: {"all": RIGHT} for kernel in kernel_cases.CASES}
    monkeypatch.setattr(kernel_cases, "CASES", cases)


def at(op: str, dtype: torch.dtype = torch.float32, **changes: Any) -> dispatch.Situation:
    return dispatch.Situation(op, "cuda", dtype, False, False, False, False)._replace(**changes)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.float16]
)
@pytest.mark.parametrize("kernel", kernel_cases.CASES)
def test_the_kernels_pass_whatever_modes_the_caller_is_in(kernel: str, dtype: torch.dtype) -> None:
    """The modes would lose the gradients, and the dtype."""
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        outcome = kernel_check.run(kernel, dtype, DEVICE)
    assert outcome.parity.passed, outcome.parity.reason
    assert 0 < outcome.parity.rel_rms < 0.01


def without_mask(real: Any) -> Any:
    def planted(*arguments: Any, **options: Any) -> Any:
        return real(*[("bidirectional" if a == "seq2seq" else a) for a in arguments], **options)

    return planted


def without_residual(real: Any) -> Any:
    def planted(x: Any, folded: Any, residual: Any, *rest: Any, **options: Any) -> Any:
        return real(x, folded, None, *rest, **options)

    return planted


def with_a_wrong_row(real: Any) -> Any:
    def planted(*arguments: Any, **options: Any) -> Any:
        gradients = real(*arguments, **options)
        gradients[1][-1].mul_(1.05)
        return gradients

    return planted


@pytest.mark.parametrize(
    ("op", "needs_grad", "module", "function", "plant"),
    [
        ("expert_linear", False, linear_kernels, "expert_linear", without_residual),
        ("shared_attention", False, attention_kernels, "shared_attention", without_mask),
        ("expert_linear", True, gradient_kernels, "expert_linear_backward", with_a_wrong_row),
        (
            "shared_attention",
            True,
            backward_kernels,
            "shared_attention_backward",
            with_a_wrong_row,
        ),
    ],
)
def test_a_wrong_kernel_is_left_out_with_one_warning(
    op: str,
    needs_grad: bool,
    module: Any,
    function: str,
    plant: Any,
    on_a_gpu: Ran,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    with pytest.warns(RuntimeWarning, match="Please report this with .*verify --kernels") as seen:
        choice = dispatch.choose(at(op, needs_grad=needs_grad))
    assert len(seen) == 1
    assert choice.impl == "composite"
    assert "failed its check" in dict(choice.rejected)["triton"]
    assert "over the limit" in dict(choice.rejected)["triton"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(at(op, needs_grad=needs_grad)).impl == "composite"
        # Whoever asks for it by name gets it.
        assert dispatch.choose(at(op, needs_grad=needs_grad), "triton").impl == "triton"
    assert len(on_a_gpu) == 1
    kernel_check.reset()
    with pytest.warns(RuntimeWarning, match="report"):
        assert dispatch.choose(at(op, needs_grad=needs_grad)).impl == "composite"
    assert len(on_a_gpu) == 1, "the outcome was kept"


def test_a_kernel_that_does_not_run_is_left_out(
    on_a_gpu: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted: the compiler gave up")

    monkeypatch.setattr(linear_kernels, "expert_linear", broken)
    with pytest.warns(RuntimeWarning, match="compiler gave up"):
        assert dispatch.choose(at("expert_linear")).impl == "composite"


def test_explain_says_what_failed(
    on_a_gpu: Ran, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cases.CASES["shared_attention"] = lambda dtype, device: {"mixed": WRONG}
    real = dispatch.choose
    monkeypatch.setattr(
        dispatch, "choose", lambda own, impl: real(own._replace(device="cuda"), impl)
    )
    with pytest.warns(RuntimeWarning, match="shared_attention in float32"):
        explanations = beit3_fast.explain(beit3_fast.create_model("beit3_tiny_patch16_32"))
    found = {own.op: own for own in explanations}
    assert found["expert_linear (inference)"].impl == "triton"
    assert found["shared_attention (training)"].impl == "triton"
    assert found["shared_attention (inference)"].impl == "composite"
    assert "mixed: planted" in dict(found["shared_attention (inference)"].rejected)["triton"]


def test_only_what_is_used_is_checked_and_only_once(on_a_gpu: Ran, quick: None) -> None:
    for _ in range(2):
        assert dispatch.choose(at("expert_linear")).impl == "triton"
        assert dispatch.choose(at("expert_linear", needs_grad=True)).impl == "triton"
    kernels = ["expert_linear", "expert_linear_backward"]
    assert on_a_gpu == [(kernel, torch.float32) for kernel in kernels]
    dispatch.choose(at("shared_attention", torch.bfloat16, needs_grad=True))
    assert on_a_gpu[2:] == [("shared_attention_backward", torch.bfloat16)]
    kernel_check.reset()
    assert dispatch.choose(at("expert_linear")).impl == "triton"
    assert len(on_a_gpu) == 3
    content = json.loads(kernel_check.cache_file().read_text())
    assert content["checks"] == {
        "expert_linear in float32": None,
        "expert_linear_backward in float32": None,
        "shared_attention_backward in bfloat16": None,
    }
    for key in ("torch", "triton", "package", "sources"):
        assert content["machine"][key]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{",
        b"[]",
        b'{"schema": 2, "machine": {}, "checks": {"expert_linear in float32": null}}',
        b'{"schema": 1, "machine": {"torch": "0"}, "checks": {"expert_linear in float32": null}}',
        b'{"schema": 1, "checks": {"expert_linear in float32": "planted"}}',
    ],
)
def test_a_damaged_file_is_ignored_and_written_again(
    content: bytes, on_a_gpu: Ran, quick: None
) -> None:
    path = kernel_check.cache_file()
    path.parent.mkdir()
    path.write_bytes(content)
    assert dispatch.choose(at("expert_linear")).impl == "triton"
    assert len(on_a_gpu) == 1
    assert json.loads(path.read_text())["checks"] == {"expert_linear in float32": None}
    assert [own.name for own in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_costs_a_repetition(
    on_a_gpu: Ran, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BEIT3_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (1, 2):
            assert dispatch.choose(at("expert_linear")).impl == "triton"
            assert len(on_a_gpu) == count
            kernel_check.reset()


def test_other_sources_and_versions_are_checked_again(
    on_a_gpu: Ran, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernel_check.identity()
    for count, changed in enumerate(({}, {"sources": "0"}, {"triton": "9"}, {"driver": "9"}), 1):
        kernel_check._doubts.clear()
        monkeypatch.setattr(kernel_check, "identity", lambda changed=changed: real | changed)
        assert dispatch.choose(at("expert_linear")).impl == "triton"
        assert len(on_a_gpu) == count
    monkeypatch.undo()


def test_all_that_could_change_a_kernel_names_its_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_check, "_device", lambda: 0)
    own = {"gpu": "name", "architecture": (9, 0), "driver": "1", "torch": "2.0", "triton": "3.6"}

    def file() -> Path:
        for module, function, key in (
            (torch.cuda, "get_device_name", "gpu"),
            (torch.cuda, "get_device_capability", "architecture"),
            (kernel_check, "_driver", "driver"),
            (kernel_check, "_triton_version", "triton"),
        ):
            monkeypatch.setattr(module, function, lambda *_, key=key: own[key])
        monkeypatch.setattr(torch, "__version__", own["torch"])
        kernel_check._identity.cache_clear()
        return kernel_check.cache_file()

    seen = [file()]
    for key, value in own.items():
        own[key] = (8, 0) if key == "architecture" else f"another {value}"
        seen.append(file())
    assert len(set(seen)) == 1 + len(own)
    kernel_check._identity.cache_clear()


def test_the_hash_of_the_sources_follows_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiles").mkdir()
    for name in ("a.py", "tiles/sm_90.json"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(kernel_check, "_folder", lambda: tmp_path)
    seen = {kernel_check._sources()}
    for name in ("a.py", "tiles/sm_90.json", "b.py"):
        (tmp_path / name).write_text("2")
        seen.add(kernel_check._sources())
    assert len(seen) == 4


def test_a_committed_run_counts_for_its_own_sources_only(
    on_a_gpu: Ran, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = kernel_check.identity() | {"architecture": "sm_90"}
    monkeypatch.setattr(kernel_check, "identity", lambda: own)
    monkeypatch.setattr(kernel_check, "_folder", lambda: tmp_path)
    entry = {key: own[key] for key in ("architecture", "sources", "triton")}
    for runs, checked in (([entry], 0), ([entry | {"sources": "0"}], 1)):
        (tmp_path / "verified.json").write_text(json.dumps({"schema": 1, "runs": runs}))
        kernel_check._doubts.clear()
        assert dispatch.choose(at("expert_linear")).impl == "triton"
        assert len(on_a_gpu) == checked
    monkeypatch.undo()


def test_every_committed_run_is_there_and_passed() -> None:
    content = json.loads((Path(linear_kernels.__file__).parent / "verified.json").read_text())
    assert content["schema"] == 1
    for run in content["runs"]:
        steps = json.loads((ROOT / run["run"] / "steps.json").read_text())
        outcomes = {name: own["outcome"] for name, own in steps.items() if "parity" in name}
        assert outcomes
        assert set(outcomes.values()) == {"passed"}, run


def test_cpu_tensors_are_neither_checked_nor_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any) -> None:
        raise AssertionError("a check for CPU tensors")

    monkeypatch.setattr(kernel_check, "doubt", unexpected)
    for op in dispatch.OPS:
        choice = dispatch.choose(at(op, device="cpu"))
        assert choice.impl in ("cpu", "composite")
        assert "by name" in dict(choice.rejected)["triton"]


def test_no_check_runs_while_a_graph_is_captured(
    on_a_gpu: Ran, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        choice = dispatch.choose(at("expert_linear"))
    assert choice.impl == "composite"
    assert "captured" in dict(choice.rejected)["triton"]
    assert not on_a_gpu
    assert dispatch.choose(at("expert_linear")).impl == "triton"


def test_a_first_call_under_torch_compile_is_checked_and_not_traced(
    on_a_gpu: Ran, quick: None
) -> None:
    def add_if_taken(x: torch.Tensor) -> torch.Tensor:
        taken = kernel_check.doubt("expert_linear", torch.float32, False) is None
        return x + 1 if taken else x

    x = torch.zeros(3)
    assert torch.compile(add_if_taken, fullgraph=True, backend="eager")(x).tolist() == [1, 1, 1]
    assert len(on_a_gpu) == 1


def outcomes(parity: Parity) -> list[kernel_check.Outcome]:
    return [kernel_check.Outcome("expert_linear", "float32", parity, 0.1)]


@pytest.mark.parametrize(("parity", "code"), [(RIGHT, 0), (WRONG, 3)])
def test_the_command_says_and_returns_what_came_of_it(
    parity: Parity,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernel_check, "verify", lambda device: outcomes(parity))
    assert cli.main(["verify", "--kernels"]) == code
    said = capsys.readouterr().out
    assert ("WRONG: planted" in said) is bool(code)
    assert cli.main(["verify", "--kernels", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is (code == 0)
    assert report["checks"][0]["reason"] == parity.reason
    assert report["machine"]["sources"] == kernel_check.identity()["sources"]


def test_verify_runs_every_kernel_again_and_keeps_what_it_saw(
    on_a_gpu: Ran, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cases.CASES["expert_linear"] = lambda dtype, device: {"all": WRONG}
    with pytest.warns(RuntimeWarning, match="report"):
        assert dispatch.choose(at("expert_linear")).impl == "composite"
    kernel_cases.CASES["expert_linear"] = lambda dtype, device: {"all": RIGHT}
    found = kernel_check.verify("cuda")
    assert len(found) == len(kernel_cases.CASES) * len(kernel_check.DTYPES)
    assert dispatch.choose(at("expert_linear")).impl == "triton"
    kernel_check.reset()
    assert dispatch.choose(at("expert_linear")).impl == "triton"


def test_the_command_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_kernels.reset()
    assert cli.main(["verify", "--kernels"]) == 1
    assert "CUDA tensors" in capsys.readouterr().err
    triton_kernels.reset()
