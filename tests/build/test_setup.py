"""What setup.py decides, for machines that have a compiler and for those that lack something."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("beit3_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup = load_setup()
FULL = setup.Tools(
    platform="linux",
    compiler="/usr/bin/c++",
    cmake="/usr/bin/cmake",
    generator="Ninja",
    make_program="/usr/bin/ninja",
    torch_version="2.13.0+cpu",
    torch_dir=Path("torch"),
    python_include=Path("include"),
    pybind11_include=Path("pybind11"),
)


def options(**variables: str) -> Any:
    return setup.Options.from_environment({f"BEIT3_FAST_{k}": v for k, v in variables.items()})


def test_a_complete_machine_builds_both() -> None:
    plan = setup.make_plan(options(), FULL)
    assert (plan.ops, plan.native, plan.notes) == (True, True, ())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"compiler": None}, "no C++ compiler"),
        ({"cmake": None}, "pip install cmake"),
        ({"generator": None}, "ninja"),
        ({"torch_dir": None, "torch_version": None}, "--no-build-isolation"),
        ({"torch_version": "2.10.1"}, "torch 2.10.1 is too old (torch 2.11 or newer"),
        ({"platform": "win32"}, "Windows"),
    ],
)
def test_what_is_missing_is_said_and_the_package_still_installs(
    change: dict[str, Any], word: str
) -> None:
    tools = dataclasses.replace(FULL, **change)
    plan = setup.make_plan(options(), tools)
    assert (plan.ops, plan.native) == (False, False)
    assert word in plan.notes[0]
    with pytest.raises(setup.BuildError, match="BEIT3_FAST_BUILD=1, but ") as error:
        setup.make_plan(options(BUILD="1"), tools)
    assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"python_include": None}, "Python.h"), ({"pybind11_include": None}, "pybind11")],
)
def test_without_python_headers_only_the_ops_are_built(change: dict[str, Any], word: str) -> None:
    tools = dataclasses.replace(FULL, **change)
    plan = setup.make_plan(options(), tools)
    assert (plan.ops, plan.native) == (True, False)
    assert word in plan.notes[0]
    assert setup.make_plan(options(BUILD="1"), tools) == plan


def test_build_0_builds_nothing_on_any_machine() -> None:
    plan = setup.make_plan(options(BUILD="0"), FULL)
    assert (plan.ops, plan.native) == (False, False)
    assert "BEIT3_FAST_BUILD=0" in plan.notes[0]


def test_cuda_that_is_asked_for_and_cannot_be_is_an_error() -> None:
    lacking = dataclasses.replace(FULL, cmake=None)
    for variables, tools in (({"BUILD": "0"}, FULL), ({}, lacking)):
        with pytest.raises(setup.BuildError, match="BEIT3_FAST_CUDA=1, but "):
            setup.make_plan(options(CUDA="1", **variables), tools)
    with pytest.raises(setup.BuildError, match="BEIT3_FAST_CUDA=1, but nvcc was not found"):
        setup.choose_cuda(options(CUDA="1"), lambda: setup.NoNvcc("nvcc was not found"))


def test_cuda_is_optional_and_can_be_left_out() -> None:
    none = setup.NoNvcc("nvcc was not found")
    assert setup.choose_cuda(options(), lambda: none) is none

    def unexpected() -> Any:
        raise AssertionError("nvcc is looked for")

    found = setup.choose_cuda(options(CUDA="0"), unexpected)
    assert found.reason == "BEIT3_FAST_CUDA=0 asked for none"


@pytest.mark.parametrize(
    ("name", "value"),
    [("BUILD", "yes"), ("CUDA", "2"), ("CUDA_ARCHS", "sm_90"), ("CUDA_ARCHS", "80;9.0")],
)
def test_values_without_meaning_are_errors(name: str, value: str) -> None:
    with pytest.raises(setup.BuildError, match=f"BEIT3_FAST_{name}="):
        options(**{name: value})


def test_architectures_are_read_in_any_separation() -> None:
    assert options(CUDA_ARCHS="80; 90a,100a").cuda_archs == ("80", "90a", "100a")
    assert options(CUDA_ARCHS="").cuda_archs == ()


def test_a_compiler_named_by_cxx_is_the_only_candidate(tmp_path: Path) -> None:
    assert setup._compiler({"CXX": "no-such-compiler-anywhere"}) is None
    assert setup._compiler({"CXX": f"{sys.executable} -O1"}) == f"{sys.executable} -O1"


def test_versions_compare_as_numbers() -> None:
    assert setup.version_tuple("2.9.1") < setup.version_tuple("2.11.0a0+git1") == (2, 11)


def test_a_library_is_replaced_and_never_written_over(tmp_path: Path) -> None:
    old, new = tmp_path / "package" / "lib.so", tmp_path / "lib.so"
    old.parent.mkdir()
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    with old.open("rb") as mapped:
        setup.replace_file(new, old)
        assert mapped.read() == b"old"
    assert old.read_bytes() == b"new"
    assert [path.name for path in old.parent.iterdir()] == ["lib.so"]
