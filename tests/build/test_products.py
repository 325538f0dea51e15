"""What lies in the compiled files and in a wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from beit3_fast.ops import library

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "beit3_fast" / library.FILE_NAME
SOURCES = (
    "setup.py",
    "setup_cuda.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "Makefile",
    "README.md",
)
FOLDERS = ("beit3_fast", "csrc", "kernels")


def nm(*arguments: str) -> list[str]:
    """The lines of a file's symbols: [address] type name."""
    program = shutil.which("nm")
    if program is None:
        pytest.skip("nm (binutils) is not here")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(
    not BUILT.is_file() or sys.platform != "linux", reason="no op library for Linux here"
)
class TestLibrary:
    def test_it_uses_the_stable_interface_of_torch_only(self) -> None:
        names = [line.split()[-1] for line in nm("-D", "--undefined-only", str(BUILT))]
        assert any(name.startswith("aoti_torch_") for name in names)
        locked = [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch|4c10d)", name)]
        assert not locked, f"version-locked symbols of torch: {locked}"
        python = [name for name in names if re.match(r"_?Py[A-Z_]", name)]
        assert not python, f"symbols of Python: {python}"

    def test_it_needs_torch_and_the_system_only(self) -> None:
        """No CUDA library, and no symbol that a CPU build of torch lacks: it must load there."""
        names = {line.split()[-1] for line in nm("-D", "--undefined-only", str(BUILT))}
        weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
        others = {name for name in names - weak if "@" not in name}
        assert {name for name in others if not re.match("(aoti_)?torch_", name)} == set()
        assert {name for name in others if "cuda" in name} <= {"aoti_torch_device_type_cuda"}
        content = BUILT.read_bytes()
        needed = set(re.findall(rb"\0(lib[\w+-]+\.so[.\d]*)(?=\0)", content))
        strangers = [name for name in needed if re.match(rb"lib(cuda|nv)", name)]
        # The CUDA runtime looks for the driver by name where it is first used.
        assert set(strangers) <= {b"libcuda.so.1"}

    def test_it_offers_nothing_but_its_stamp(self) -> None:
        names = [line.split()[-1] for line in nm("-D", "--defined-only", str(BUILT))]
        ours = [name for name in names if re.search("beit3_fast|cuda|^_?cu[A-Z]", name)]
        assert ours == ["beit3_fast_stamp"]

    def test_no_name_depends_on_the_folder_of_the_build(self) -> None:
        """nvcc names an unnamed namespace after it, and a temporary file after a process."""
        names = [line.split()[-1] for line in nm(str(BUILT))]
        assert not [name for name in names if "_GLOBAL__N__" in name]
        assert b"tmpxft" not in BUILT.read_bytes()

    def test_it_names_no_folder_of_the_building_machine(self) -> None:
        for path in (ROOT / "beit3_fast").glob("*.so"):
            content = path.read_bytes()
            for folder in (ROOT, Path.home(), Path(sys.prefix)):
                if len(folder.parts) > 1:
                    assert str(folder).encode() not in content, f"{path.name} names {folder}"

    def test_files_for_one_instruction_set_share_no_function_with_the_rest(self) -> None:
        """A function that the linker may take from them for everybody would end older processors with SIGILL."""
        objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/beit3_fast_cpu_isa.dir/**/*.o"))
        if not objects:
            pytest.skip("the folder of the build is not here")
        for path in objects:
            weak = [line for line in nm("--defined-only", str(path)) if line.split()[-2] in "WVu"]
            assert not weak, f"{path.name}: {weak}"


def copy_of_the_sources(folder: Path) -> Path:
    for name in SOURCES:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder / name)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def test_no_cuda_source_has_an_unnamed_namespace() -> None:
    files = [path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh")]
    assert files
    unnamed = [path.name for path in files if re.search(r"^\s*namespace\s*\{", path.read_text(), re.M)]
    assert not unnamed, f"name it after the file, as in `inline namespace x {{`: {unnamed}"


def wheel(source: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """The wheel that a source folder gives, and what the build said."""
    done = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", "wheels"],
        cwd=source,
        env=dict(os.environ, **environment),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "wheels").glob("*.whl")
    return zipfile.ZipFile(path), done.stdout


def test_a_machine_without_compiler_makes_a_wheel_of_python_alone(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path)
    (source / "kernels" / "planted.py").write_text("VALUE = 3\n")
    archive, said = wheel(source, CXX="no-such-compiler-anywhere", BEIT3_FAST_BUILD="auto")
    assert "beit3_fast: no C++ compiler was found" in said
    assert "installing the Python package alone" in said
    assert archive.filename is not None
    assert archive.filename.endswith("-py3-none-any.whl")

    names = set(archive.namelist())
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "beit3_fast").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert modules <= names
    strays = {
        name for name in names if not re.match(r"(beit3_fast|beit3_fast-[\d.]+\.dist-info)/", name)
    }
    assert not strays, f"top-level names that are not ours: {strays}"
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h"))]
    record = json.loads(archive.read("beit3_fast/_build.json"))
    assert record["built"] is False
    assert "no C++ compiler" in record["reason"]
    scripts = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"beit3-fast = beit3_fast.cli:main" in archive.read(scripts)

    # kernels/ is there under our name, and under no other.
    assert "beit3_fast/kernels/planted.py" in names
    tiles = {path.name for path in (ROOT / "kernels" / "tiles").glob("*.json")}
    assert tiles
    assert {f"beit3_fast/kernels/tiles/{name}" for name in tiles} <= names
    assert "beit3_fast/kernels/verified.json" in names
    archive.extractall(tmp_path / "installed")
    code = (
        "import beit3_fast.kernels.planted as p; print(p.VALUE, p.__name__, p.__file__)\n"
        "try:\n    import kernels\nexcept ImportError:\n    print('no kernels')\n"
        "from beit3_fast.ops import library; print(library.why_unavailable())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "3 beit3_fast.kernels.planted" in done.stdout
    assert "is not built: no C++ compiler was found" in done.stdout


def test_kernels_of_a_source_folder_are_found_under_our_name(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path)
    (source / "kernels" / "planted.py").write_text("VALUE = 4\n")
    code = "import beit3_fast.kernels.planted as p; print(p.VALUE, p.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["4", "beit3_fast.kernels.planted"]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not BUILT.is_file(), reason="there is no op library here to begin with")
def test_two_builds_in_two_folders_give_the_same_files(tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second-and-longer"):
        (tmp_path / name).mkdir()
        source = copy_of_the_sources(tmp_path / name)
        archive, _ = wheel(source, BEIT3_FAST_BUILD="1")
        files = [name for name in archive.namelist() if name.endswith((".so", "_build.json"))]
        assert len(files) == 3
        for file in files:
            assert str(tmp_path).encode() not in archive.read(file)
        contents.append({file: archive.read(file) for file in files})
    assert contents[0] == contents[1]
