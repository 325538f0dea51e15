"""Which nvcc the build takes, and what it says where none compiles: planted programs, no toolkit needed."""

from __future__ import annotations

import importlib.util
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="plants shell scripts")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("beit3_fast_setup_cuda", ROOT / "setup_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup_cuda = load()
COMPLAINT = "host_config.h: error: unsupported GNU version! gcc versions later than 15 are not supported!"
SOUND = """
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\n' ;;
  *) {compiling} ;;
esac
"""


def plant(folder: Path, compiling: str = ":", name: str = "nvcc") -> dict[str, str]:
    """A toolkit whose nvcc does this when it is to compile; the variables that name it."""
    program = folder / "bin" / name
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n" + SOUND.format(compiling=compiling))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"CUDA_HOME": str(folder)}


def reason(found: Any) -> str:
    assert isinstance(found, setup_cuda.NoNvcc), found
    return str(found.reason)


def test_architectures_that_it_does_not_know_are_left_out(tmp_path: Path) -> None:
    found = setup_cuda.find(plant(tmp_path), None, ())
    assert found.program == str(tmp_path / "bin" / "nvcc")
    assert (found.version, found.architectures) == ("13.0", ("80", "90a"))


def test_architectures_that_were_asked_for_are_not(tmp_path: Path) -> None:
    found = setup_cuda.find(plant(tmp_path), None, ("90a", "100a"))
    assert "nvcc 13.0 does not know the architectures 100a" in reason(found)


def test_a_host_compiler_that_it_refuses_is_said(tmp_path: Path) -> None:
    variables = plant(tmp_path, f'echo "{COMPLAINT}" >&2; exit 1')
    said = reason(setup_cuda.find(variables, "/usr/bin/g++-99", ()))
    assert "does not compile with /usr/bin/g++-99 or the C++ compiler of its own choice" in said
    assert "CUDAHOSTCXX" in said
    assert COMPLAINT in said


def test_the_next_host_compiler_is_tried(tmp_path: Path) -> None:
    variables = plant(tmp_path, 'case "$*" in *g++-99*) exit 1 ;; esac')
    assert setup_cuda.find(variables, "/usr/bin/g++-99", ()).host_compiler == ""
    assert setup_cuda.find(variables, "/usr/bin/g++", ()).host_compiler == "/usr/bin/g++"
    assert setup_cuda.find(variables, "ccache g++", ()).host_compiler == ""


def test_a_host_compiler_that_is_named_is_the_only_candidate(tmp_path: Path) -> None:
    variables = plant(tmp_path, 'case "$*" in *g++-99*) exit 1 ;; esac')
    said = reason(setup_cuda.find(variables | {"CUDAHOSTCXX": "g++-99"}, "/usr/bin/g++", ()))
    assert "does not compile with g++-99;" in said


def test_an_nvcc_that_is_named_is_the_only_candidate(tmp_path: Path) -> None:
    variables = plant(tmp_path) | {"CUDACXX": str(tmp_path / "absent")}
    assert "CUDACXX names no program" in reason(setup_cuda.find(variables, None, ()))


def test_an_nvcc_that_does_not_run_is_said(tmp_path: Path) -> None:
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    assert "does not run" in reason(setup_cuda.find({"CUDACXX": str(program)}, None, ()))


def test_without_nvcc_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_cuda.shutil, "which", lambda *_, **__: None)
    said = reason(setup_cuda.find({}, None, ()))
    assert "nvcc was not found" in said
    assert "CUDA_HOME" in said
