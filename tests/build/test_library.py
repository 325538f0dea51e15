"""The op library is loaded once, late, and a file that cannot be used becomes a sentence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from beit3_fast.ops import library

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "beit3_fast" / library.FILE_NAME
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
MEND = "pip install --no-build-isolation"

needs_library = pytest.mark.skipif(not BUILT.is_file(), reason="the op library is not built here")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="plants libraries with a compiler on Linux"
)


def refusal(path: Path) -> str:
    """The reason for not using a file, after checking that it reads like one written for people."""
    status = library._attempt(str(path))
    assert not status.available
    assert MEND in status.reason
    assert "undefined symbol" not in status.reason
    assert str(ROOT) not in status.reason
    assert status.describe().startswith("the compiled ops are not in use: the library ")
    return status.reason


def altered(tmp_path: Path, change: Callable[[bytes], bytes]) -> Path:
    path = tmp_path / library.FILE_NAME
    content = BUILT.read_bytes()
    new = change(content)
    assert new != content
    path.write_bytes(new)
    return path


def restamped(tmp_path: Path, key: str, value: str) -> Path:
    """A copy of the library whose stamp says something else, in as many bytes."""

    def change(content: bytes) -> bytes:
        found = re.search(rf'"{key}": "([^"]*)"'.encode(), content)
        assert found is not None
        assert len(found[1]) >= len(value), "the new value must fit"
        padded = value.ljust(len(found[1]))
        return content[: found.start(1)] + padded.encode() + content[found.end(1) :]

    return altered(tmp_path, change)


def compiled(tmp_path: Path, source: str, *options: str) -> Path:
    assert COMPILER is not None
    file, path = tmp_path / "planted.cpp", tmp_path / "libplanted.so"
    file.write_text(source)
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", str(file), "-o", str(path), *options], check=True, timeout=60
    )
    return path


def stamp_source(**changes: str) -> str:
    """A C++ line that puts the stamp of a library for this machine into a file."""
    stamp = {
        "package": "",
        "torch": "2.13.0",
        "torch_minimum": "2.11",
        "system": "Linux",
        "machine": os.uname().machine,
        **changes,
    }
    text = ", ".join(f'\\"{key}\\": \\"{value}\\"' for key, value in stamp.items())
    return f'extern "C" __attribute__((used)) const char stamp[] = "BEIT3_FAST_STAMP{{{text}}}";\n'


@pytest.fixture
def any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted libraries carry no version of the package."""
    monkeypatch.setattr(sys.modules["beit3_fast"], "__version__", "", raising=False)


@needs_library
def test_the_built_library_is_loaded_and_says_what_it_is() -> None:
    status = library.load()
    assert status.available, status.reason
    assert library.available()
    assert library.why_unavailable() == ""
    assert status.path == BUILT
    assert {"torch", "torch_minimum", "compiler", "flags", "package"} <= set(status.stamp)
    assert "built for torch" in status.describe()
    assert str(BUILT) in torch.ops.loaded_libraries
    assert library.build_info() == status.stamp


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"not a library at all", "is damaged"),
        (os.urandom(1 << 16), "is damaged"),
        (b"\x7fELF" + bytes(4096), "processor"),
    ],
    ids=["empty", "text", "random", "hollow"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_garbage(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "garbage.so"
    path.write_bytes(content)
    assert words in refusal(path)


@needs_library
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.9999])
def test_a_file_cut_short_is_not_loaded(tmp_path: Path, part: float) -> None:
    path = altered(tmp_path, lambda content: content[: int(len(content) * part)])
    assert "is cut off after" in refusal(path)


@needs_library
def test_another_processor(tmp_path: Path) -> None:
    path = altered(tmp_path, lambda content: content[:18] + b"\xf7\x00" + content[20:])
    assert "was built for processor number 247 processors" in refusal(path)


@needs_library
def test_another_system(tmp_path: Path) -> None:
    assert "was built for Plan9 " in refusal(restamped(tmp_path, "system", "Plan9"))


@needs_library
def test_a_torch_that_is_too_old(tmp_path: Path) -> None:
    reason = refusal(restamped(tmp_path, "torch_minimum", "9.99"))
    assert f"needs torch 9.99 or newer; this is torch {torch.__version__}" in reason
    assert re.search(r"was built for torch 2\.\d+", reason)


@needs_library
def test_another_release_of_the_package(tmp_path: Path) -> None:
    assert "was built for beit3_fast 0.0.1" in refusal(restamped(tmp_path, "package", "0.0.1"))


@needs_library
def test_a_stamp_that_cannot_be_read(tmp_path: Path) -> None:
    path = altered(tmp_path, lambda content: content.replace(b'{"package"', b'{;package"'))
    assert "the stamp" in refusal(path)
    path = altered(tmp_path, lambda content: content.replace(b"BEIT3_FAST_STAMP", b"X" * 16))
    assert "carries no stamp of beit3_fast" in refusal(path)


@needs_compiler
@pytest.mark.usefixtures("any_version")
def test_a_function_that_this_torch_lacks(tmp_path: Path) -> None:
    source = stamp_source() + (
        'extern "C" int aoti_torch_of_a_later_release();\n'
        "static int at_load = aoti_torch_of_a_later_release();\n"
    )
    reason = refusal(compiled(tmp_path, source))
    assert "was built for torch 2.13.0, and this is torch " + torch.__version__ in reason
    assert "which lacks the function aoti_torch_of_a_later_release" in reason


@needs_compiler
@pytest.mark.usefixtures("any_version")
def test_a_library_that_it_needs_is_gone(tmp_path: Path) -> None:
    other = compiled(tmp_path, "int other() { return 1; }\n").rename(tmp_path / "libother.so")
    source = stamp_source() + "int other();\nint at_load = other();\n"
    path = compiled(tmp_path, source, f"-L{tmp_path}", "-l:libother.so")
    other.unlink()
    assert "needs libother.so, which is not found here" in refusal(path)


@needs_compiler
@pytest.mark.usefixtures("any_version")
@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "/lib/libc.so.6: version `GLIBC_2.99' not found (required by x)",
            "GLIBC 2.99, which the C",
        ),
        ("libstdc++.so.6: version `GLIBCXX_3.4.99' not found", "GLIBCXX 3.4.99, which the C++"),
        ("x.so: cannot enable executable stack", "the system's loader said: x.so: cannot enable"),
    ],
)
def test_what_the_system_loader_says_is_put_into_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, words: str
) -> None:
    def fail(path: str) -> None:
        raise OSError(f"Could not load this library: {path}") from OSError(said)

    path = compiled(tmp_path, stamp_source())
    monkeypatch.setattr(torch.ops, "load_library", fail)
    assert words in refusal(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "named by BEIT3_FAST_LIBRARY" in refusal(tmp_path / "absent.so")


def test_an_installation_without_library_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    assert "is not built: there is no " in library._attempt("").reason
    (tmp_path / "_build.json").write_text('{"built": false, "reason": "no C++ compiler was found"}')
    status = library._attempt("")
    assert status.reason.startswith("is not built: no C++ compiler was found; ")
    assert MEND in status.reason
    (tmp_path / "_build.json").write_text('{"built": true, "reason": ""}')
    assert "is gone since" in library._attempt("").reason
    assert library.build_info() == {}


def test_it_can_be_switched_off() -> None:
    assert "BEIT3_FAST_LIBRARY=none" in library._attempt("none").reason


def test_many_threads_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def slow(setting: str) -> library.LibraryStatus:
        attempts.append(setting)
        time.sleep(0.05)
        return library.LibraryStatus(False, "is planted")

    monkeypatch.setattr(library, "_status", None)
    monkeypatch.setattr(library, "_attempt", slow)
    results: list[library.LibraryStatus] = []
    threads = [threading.Thread(target=lambda: results.append(library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(attempts) == 1
    assert len(results) == 8
    assert len({id(result) for result in results}) == 1


def test_unexpected_errors_become_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> dict[str, str]:
        raise RuntimeError("planted")

    monkeypatch.setattr(library, "_inspect", fail)
    assert "cannot be loaded (RuntimeError: planted)" in library._attempt("").reason


OPS_WITH_A_BROKEN_LIBRARY = """
import torch
from beit3_fast.errors import KernelUnavailable
from beit3_fast.ops import expert_linear
x, w, b = torch.ones(4, 8), torch.ones(6, 8), torch.zeros(6)
assert torch.equal(expert_linear(x, [w], [b], bounds=(0, 4)), torch.full((4, 6), 8.0))
try:
    expert_linear(x, [w], [b], bounds=(0, 4), impl="cpu")
except KernelUnavailable as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["garbage", "none"])
def test_ops_run_without_the_library_and_name_the_reason(tmp_path: Path, kind: str) -> None:
    garbage = tmp_path / "garbage.so"
    garbage.write_bytes(b"garbage")
    setting = str(garbage) if kind == "garbage" else "none"
    done = subprocess.run(
        [sys.executable, "-c", OPS_WITH_A_BROKEN_LIBRARY],
        cwd=ROOT,
        env=dict(os.environ, BEIT3_FAST_LIBRARY=setting, BEIT3_FAST_IMPL=""),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    expected = "garbage.so is no shared library" if kind == "garbage" else "BEIT3_FAST_LIBRARY=none"
    assert expected in done.stdout


def test_cpu_features_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "native", lambda: None)
    library._cpu_features.cache_clear()
    try:
        features = library.cpu_features()
        assert set(features) in (set(), set(library._FEATURES))
        features["avx2"] = not features.get("avx2")
        assert library.cpu_features() != features, "the caller got the cache itself"
    finally:
        library._cpu_features.cache_clear()
