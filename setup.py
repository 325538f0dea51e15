"""Builds what this machine can: the op library and the `_native` module through CMake, or the Python package alone.

BEIT3_FAST_BUILD=auto|0|1    auto (default): where the op library cannot be built, install the Python package and say why;
                             0: never compile; 1: an error where it cannot be built
BEIT3_FAST_CUDA=auto|0|1     the same three for the CUDA kernels in the op library; they need nvcc, no GPU
BEIT3_FAST_CUDA_ARCHS        what they are compiled for; default "80;90a;100a"
CXX                          the C++ compiler; for what nvcc is found by see setup_cuda.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from setup_cuda import NoNvcc, Nvcc, find  # noqa: E402

OPS = "beit3_fast.libbeit3_fast_ops"
NATIVE = "beit3_fast._native"
TORCH_MINIMUM = (2, 11)
RECORD = "_build.json"


class BuildError(Exception):
    """The native code was asked for and cannot be built."""


@dataclass(frozen=True)
class Options:
    """What the environment variables ask for."""

    build: str
    cuda: str
    cuda_archs: tuple[str, ...]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Options:
        """Raises BuildError where a variable has a value that means nothing."""
        values = {}
        for name in ("BEIT3_FAST_BUILD", "BEIT3_FAST_CUDA"):
            values[name] = environment.get(name, "").strip() or "auto"
            if values[name] not in ("auto", "0", "1"):
                raise BuildError(f"{name}={values[name]!r}: expected auto, 0 or 1")
        text = environment.get("BEIT3_FAST_CUDA_ARCHS", "")
        archs = tuple(part for part in re.split(r"[;,\s]+", text) if part)
        for arch in archs:
            if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch):
                raise BuildError(
                    f"BEIT3_FAST_CUDA_ARCHS={text!r}: {arch!r} is no architecture; "
                    'expected numbers such as "80;90a;100a"'
                )
        return cls(values["BEIT3_FAST_BUILD"], values["BEIT3_FAST_CUDA"], archs)


@dataclass(frozen=True)
class Tools:
    """What this machine has; None or empty: not found."""

    platform: str
    compiler: str | None
    cmake: str | None
    generator: str | None
    make_program: str | None
    torch_version: str | None
    torch_dir: Path | None
    python_include: Path | None
    pybind11_include: Path | None

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> Tools:
        ninja = _program("ninja", "ninja", "BIN_DIR")
        make = shutil.which("make")
        torch_dir, pybind11_dir = _package_dir("torch"), _package_dir("pybind11")
        include = Path(sysconfig.get_path("include"))
        return cls(
            platform=sys.platform,
            compiler=_compiler(environment),
            cmake=_program("cmake", "cmake", "CMAKE_BIN_DIR"),
            generator="Ninja" if ninja else "Unix Makefiles" if make else None,
            make_program=ninja or make,
            torch_version=importlib.metadata.version("torch") if torch_dir else None,
            torch_dir=torch_dir,
            python_include=include if (include / "Python.h").is_file() else None,
            pybind11_include=pybind11_dir / "include" if pybind11_dir else None,
        )

    def missing(self) -> str | None:
        """Why the op library cannot be built here, in words, or None."""
        if self.platform == "win32":
            return "Windows is not supported by the native code yet"
        if self.compiler is None:
            return "no C++ compiler was found (looked for $CXX, c++, g++ and clang++)"
        if self.cmake is None:
            return "CMake was not found (pip install cmake ninja)"
        if self.generator is None:
            return "neither ninja nor make was found (pip install ninja)"
        if self.torch_dir is None or self.torch_version is None:
            return (
                "torch was not found by the build "
                "(install torch first, then pip install --no-build-isolation)"
            )
        if version_tuple(self.torch_version) < TORCH_MINIMUM:
            wanted = ".".join(map(str, TORCH_MINIMUM))
            return f"torch {self.torch_version} is too old (torch {wanted} or newer is needed)"
        return None

    def missing_for_python(self) -> str | None:
        """Why the pybind11 module cannot be built here, in words, or None."""
        if self.python_include is None:
            return "Python.h was not found (install the headers of this Python, python3-dev)"
        if self.pybind11_include is None:
            return "pybind11 was not found (pip install pybind11)"
        return None


@dataclass(frozen=True)
class Plan:
    """What will be built, and a line for each thing that will not."""

    ops: bool
    native: bool
    notes: tuple[str, ...]


def make_plan(options: Options, tools: Tools) -> Plan:
    """Raises BuildError where an explicit 1 cannot be met."""
    missing = tools.missing()
    if options.build == "0":
        missing = "BEIT3_FAST_BUILD=0 asked for the Python package alone"
    if missing is not None:
        if options.build == "1":
            raise BuildError(f"BEIT3_FAST_BUILD=1, but {missing}")
        if options.cuda == "1":
            raise BuildError(f"BEIT3_FAST_CUDA=1, but {missing}")
        return Plan(False, False, (missing,))
    notes = []
    missing_python = tools.missing_for_python()
    if missing_python is not None:
        notes.append(f"the module {NATIVE} is left out: {missing_python}")
    return Plan(True, missing_python is None, tuple(notes))


def choose_cuda(options: Options, found: Callable[[], Nvcc | NoNvcc]) -> Nvcc | NoNvcc:
    """What compiles the CUDA kernels. Raises BuildError where an explicit 1 cannot be met."""
    if options.cuda == "0":
        return NoNvcc("BEIT3_FAST_CUDA=0 asked for none")
    cuda = found()
    if isinstance(cuda, NoNvcc) and options.cuda == "1":
        raise BuildError(f"BEIT3_FAST_CUDA=1, but {cuda.reason}")
    return cuda


def version_tuple(text: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13)"""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _package_dir(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _program(name: str, module: str, folder_attribute: str) -> str | None:
    """A program that a PyPI package carries (found without an activated environment), else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(module), folder_attribute)
    except Exception:
        return shutil.which(name)
    return shutil.which(name, path=str(folder)) or shutil.which(name)


def _compiler(environment: Mapping[str, str]) -> str | None:
    """The command of $CXX (which may carry arguments, as in "ccache g++"), else the first of the usual names."""
    wanted = environment.get("CXX", "")
    if wanted.strip():
        return wanted if shutil.which(shlex.split(wanted)[0]) else None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def say(text: str) -> None:
    print(f"beit3_fast: {text}", flush=True)


class BuildNative(build_ext):
    """Every extension comes out of one CMake build in build/cmake-*, which is kept, so a second build compiles what changed."""

    plan: Plan
    tools: Tools
    options: Options
    extensions: list[Extension]

    def get_ext_filename(self, fullname: str) -> str:
        if fullname in (OPS, OPS.rpartition(".")[2]):
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))

    def run(self) -> None:
        super().run()
        if self.inplace or self.editable_mode:
            write_record(ROOT / "beit3_fast")
            if not record["built"]:
                # A library of an earlier build would go on being loaded, beside newer Python code.
                for name in (OPS, NATIVE):
                    Path(ROOT, self.get_ext_filename(name)).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        # Here and not in the plan: nvcc is tried, which takes seconds, and pip runs this file several times.
        compiler, archs = self.tools.compiler, self.options.cuda_archs
        cuda = choose_cuda(self.options, lambda: find(os.environ, compiler, archs))
        try:
            folder, cuda = self._compile(cuda)
        except (subprocess.CalledProcessError, OSError) as error:
            reason = f"the native build failed ({_last_words(error)})"
            if "1" in (self.options.build, self.options.cuda):
                raise BuildError(reason) from error
            say(f"{reason}; installing the Python package alone")
            record.update(built=False, reason=reason)
            self.extensions = []
            return
        self._report(cuda, folder / self.get_ext_filename(OPS.rpartition(".")[2]))
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            replace_file(folder / target.name, target)

    def _report(self, cuda: Nvcc | NoNvcc, library: Path) -> None:
        """Says, and records, which CUDA kernels the library holds. Raises BuildError where it should and does not."""
        found = re.search(rb'"cuda_architectures": "([^"]*)"', library.read_bytes())
        names = ", ".join(f"sm_{arch}" for arch in found[1].decode().split()) if found else ""
        if isinstance(cuda, Nvcc) and names:
            say(f"the op library holds CUDA kernels for {names} (nvcc {cuda.version})")
            return
        if isinstance(cuda, Nvcc):
            cuda = NoNvcc(f"none is written for the architectures {' '.join(cuda.architectures)}")
            if self.options.cuda == "1":
                raise BuildError(f"BEIT3_FAST_CUDA=1, but of the CUDA kernels {cuda.reason}")
        record["without_cuda"] = cuda.reason
        say(f"the op library holds no CUDA kernels: {cuda.reason}")

    def _compile(self, cuda: Nvcc | NoNvcc) -> tuple[Path, Nvcc | NoNvcc]:
        """The folder of what was compiled, and with which nvcc or why with none."""
        try:
            return self._cmake(cuda), cuda
        except (subprocess.CalledProcessError, OSError) as error:
            if isinstance(cuda, NoNvcc) or self.options.cuda == "1":
                raise
            without = NoNvcc(f"nvcc {cuda.version} failed ({_last_words(error)})")
            say(f"{without.reason}; once more without CUDA kernels")
            return self._cmake(without), without

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            replace_file(Path(self.build_lib, name), ROOT / name)

    def _cmake(self, cuda: Nvcc | NoNvcc) -> Path:
        tools = self.tools
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        output = build / "lib"
        if not (tools.cmake and tools.generator and tools.compiler and tools.torch_dir):
            raise BuildError(f"cannot build: {tools.missing()}")
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tools.make_program,
            "BEIT3_FAST_VERSION": self.distribution.get_version(),
            "BEIT3_FAST_TORCH_VERSION": tools.torch_version,
            "BEIT3_FAST_TORCH_INCLUDE": tools.torch_dir / "include",
            "BEIT3_FAST_TORCH_LIB": tools.torch_dir / "lib",
            "BEIT3_FAST_PYTHON_INCLUDE": tools.python_include if self.plan.native else "",
            "BEIT3_FAST_PYBIND11_INCLUDE": tools.pybind11_include if self.plan.native else "",
            "BEIT3_FAST_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "BEIT3_FAST_OUTPUT_DIR": output,
        }
        configure = [tools.cmake, "-S", str(ROOT), "-B", str(build), "-G", tools.generator]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        # CMake refuses a cache of another source folder, compiler or generator; then the folder starts afresh.
        environment = dict(os.environ, CXX=tools.compiler)
        flags = {name: os.environ.get(name) for name in ("CXXFLAGS", "LDFLAGS")}
        wanted = [configure, tools.compiler, flags]
        marker, own = build / "configured.json", repr(cuda) if isinstance(cuda, Nvcc) else ""
        *before, nvcc_before = json.loads(marker.read_text()) if marker.is_file() else [""]
        other_nvcc = own and nvcc_before not in ("", own)
        if build.exists() and (before != wanted or other_nvcc):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        replace_text(marker, json.dumps([*wanted, own]))
        also = f", and with nvcc {cuda.version} (another minute)" if isinstance(cuda, Nvcc) else ""
        say(
            f"compiling with {tools.compiler} for torch {tools.torch_version} (about a minute){also}"
        )
        subprocess.run([*configure, *cuda.settings()], check=True, env=environment)
        subprocess.run([tools.cmake, "--build", str(build)], check=True)
        return output


def _last_words(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        step = "compiling" if "--build" in error.cmd else "configuring"
        return f"{step} ended with status {error.returncode}; pip install -v shows the output"
    return str(error)


def replace_text(path: Path, text: str) -> None:
    """A whole file or none, should the build be stopped."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def replace_file(source: Path, target: Path) -> None:
    """A new file in the place of the old one: a running process may have mapped the old one's content."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copy2(source, fresh)
    os.replace(fresh, target)


# What came of the build; installed with the package, so that beit3_fast can say why there is no op library.
record: dict[str, Any] = {"built": False, "reason": "", "without_cuda": ""}


def write_record(package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    (package / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


class BuildPython(build_py):
    """Adds the files of kernels/ to the package beit3_fast.kernels, and the record of the build."""

    def run(self) -> None:
        # The compiled part first: its outcome is part of what is written here.
        if not self.editable_mode:
            if not self.distribution.have_run.get("build_ext"):
                # What an earlier build left there would be packed, too.
                shutil.rmtree(Path(self.build_lib, "beit3_fast"), ignore_errors=True)
            self.run_command("build_ext")
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "beit3_fast")
            write_record(package)
            data, target = ROOT / "kernels", package / "kernels"
            shutil.copytree(data / "tiles", target / "tiles", dirs_exist_ok=True)
            shutil.copy(data / "verified.json", target)

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = list(super().find_package_modules(package, package_dir))
        if package == "beit3_fast.kernels":
            modules += [
                (package, path.stem, str(path.relative_to(ROOT)))
                for path in sorted((ROOT / "kernels").glob("*.py"))
            ]
        return modules


def main() -> None:
    try:
        options = Options.from_environment(os.environ)
        tools = Tools.find(os.environ)
        plan = make_plan(options, tools)
    except BuildError as error:
        sys.exit(f"beit3_fast: {error}")
    BuildNative.options, BuildNative.tools, BuildNative.plan = options, tools, plan
    record["built"] = plan.ops
    record["reason"] = plan.notes[0] if plan.notes and not plan.ops else ""
    for note in plan.notes:
        say(note)
    if not plan.ops:
        say("installing the Python package alone; every op runs on PyTorch's own calls")
    extensions = [Extension(OPS, sources=[])] if plan.ops else []
    if plan.native:
        extensions.append(Extension(NATIVE, sources=[]))
    try:
        setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative, "build_py": BuildPython})
    except BuildError as error:
        sys.exit(f"beit3_fast: {error}")


if __name__ == "__main__":
    main()
