"""What `make gpu` plans to do, and the library that its steps need; without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit3_fast.ops import cuda_kernels, library
from bench import gpu, gpu_library, gpu_record
from bench.gpu_steps import (
    CUDA_MODEL_TESTS,
    CUDA_TESTS,
    ON_GPU,
    PYTEST,
    RUNTIMES,
    TOOLS,
    steps,
)

ROOT = gpu.ROOT


def test_a_changed_test_runs_its_own_steps_again(tmp_path: Path) -> None:
    tests = tmp_path / "tests" / "ops"
    tests.mkdir(parents=True)
    plan = {own.name: own.sources for own in steps("cuda", False, tmp_path)}

    def changed(file: str) -> set[str]:
        before = {name: gpu_record.digest(tmp_path, own, ()) for name, own in plan.items()}
        (tests / file).write_text("")
        after = {name: gpu_record.digest(tmp_path, own, ()) for name, own in plan.items()}
        return {name for name in plan if before[name] != after[name]}

    sanitized = {f"{tool}-cuda-float8" for tool in TOOLS}
    assert changed("test_cuda_float8_ops.py") == {
        "parity-cuda-float8",
        "every-cuda-float8",
        *sanitized,
    }
    assert {"parity-cuda", "races-cuda", "every-triton-model"} < changed("op_cases.py")
    assert "figures-products" not in changed("attention_cases.py")


def test_the_plans_logs_fit_into_16_mib(tmp_path: Path) -> None:
    assert gpu.LOGS_BYTES < 16 << 20
    assert gpu.LOGS_BYTES // len(steps("cuda", False, tmp_path)) > 100_000


def test_the_sanitizer_sees_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its selection of tests, without the sanitizer and in the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    (own,) = (own for own in steps("cuda", False, tmp_path) if own.name == "memcheck-triton")
    command = [*own.command[own.command.index(sys.executable) :], "-p", "launched_kernels"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, Path(__file__).parent))))
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_every_figure_has_a_step(tmp_path: Path) -> None:
    commands = [" ".join(own.command) for own in steps("cuda", False, tmp_path)]
    for words in (
        "image/base/224 --batch 256",
        "image/base/224 --batch 1 ",
        "image/large/224 --batch 256",
        "vqa/base/480 --batch 64",
        "retrieval-text/base/384",
        "train/base/224",
        "train-vqa/base/480",
        "figures products --device cuda",
        "figures attention --device cuda",
        "figures latency --device cuda",
        "decode_step --device cuda --batch 64 --impl cuda",
    ):
        assert any(words in command for command in commands), words
    for runtime in ("beit3_fast-cuda", "beit3_fast-triton", "beit3_fast-composite"):
        assert runtime in RUNTIMES


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_file_of_the_plan_is_there(device: str, tmp_path: Path) -> None:
    plan = steps(device, device == "cpu", tmp_path)
    for own in plan:
        for word in own.command:
            if word.startswith(("tests/", "bench/")):
                assert (ROOT / word).is_file(), word
    names = [own.name for own in plan]
    assert len(set(names)) == len(names)
    for place, own in enumerate(plan):
        assert set(own.needs) <= set(names[:place]), own.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tests_that_need_a_gpu_do_not_pass_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    for name, value in ON_GPU.items():
        monkeypatch.setenv(name, value)
    files = [f"tests/ops/{test}.py" for test in CUDA_TESTS.values()]
    files += [CUDA_MODEL_TESTS, "tests/ops/test_cuda_races.py", "tests/ops/test_triton_races.py"]
    command = [*PYTEST, "--maxfail=99", "--collect-only", *files]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout.count("E   RuntimeError: these tests are to run on a GPU") == len(files)
    for file in files:
        assert f"ERROR collecting {file} " in ended.stdout


def test_the_library_is_known_by_its_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = library.load().stamp.get("cuda_sources")
    assert built in (None, "", gpu_library.sources_hash())
    stamp = {"cuda_sources": gpu_library.sources_hash()}
    monkeypatch.setattr(library, "load", lambda: library.LibraryStatus(True, "", stamp=stamp))
    assert gpu_library.is_current()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc" / "cuda" / "hopper.cuh").write_text("")
    monkeypatch.setattr(gpu_library, "ROOT", tmp_path)
    assert not gpu_library.is_current()


@pytest.mark.parametrize(("capability", "arch"), [((9, 0), "90a"), ((8, 0), "80")])
def test_a_library_of_other_sources_is_built_and_loaded_by_a_process_of_its_own(
    capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BEIT3_FAST_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(gpu_library, "is_current", lambda: False)
    calls: list[tuple[tuple[str, ...], dict[str, str]]] = []

    def run(command: tuple[str, ...], env: dict[str, str], **_: object) -> object:
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_library.main() == 0
    (build, wanted), (again, own) = calls
    assert build[1:] == ("setup.py", "build_ext", "--inplace")
    assert wanted["BEIT3_FAST_CUDA_ARCHS"] == arch
    assert again[1:] == ("-m", "bench.gpu_library")
    monkeypatch.setattr(os, "environ", own)
    assert gpu_library.main() == 1  # once is enough
    assert len(calls) == 2


def test_kernels_that_are_left_out_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_library, "is_current", lambda: True)
    monkeypatch.setattr(cuda_kernels, "why_unavailable", lambda device: None)
    monkeypatch.setattr(cuda_kernels, "float8_obstacle", lambda: None)
    for rounds in (False, True):
        monkeypatch.setattr(cuda_kernels, "attention_rounds", lambda device, own=rounds: own)
        assert gpu_library.main() == (0 if rounds else 1)
    assert "each does not leave attention's rows in 8 bits" in capsys.readouterr().out
