"""Loads the compiled op library once, on first need, and explains in words when it cannot.

Nothing happens at import. The library says in a stamp what it was built for; the stamp is read before the file is loaded, so
that a file for another torch, machine or release becomes a sentence and never a crash inside the loader.
The environment variable ``BEIT3_FAST_LIBRARY`` names another file, or ``none`` for no library at all.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from beit3_fast.errors import ConfigError, KernelUnavailable
from beit3_fast.locks import fork_safe_lock

logger = logging.getLogger("beit3_fast")
T = TypeVar("T")

FILE_NAME = "libbeit3_fast_ops.so"
_PACKAGE = Path(__file__).resolve().parent.parent
_UNKNOWN_VERSION = "0+unknown"  # of a source folder that is used without being installed
_MARKER = b"BEIT3_FAST_STAMP{"
_ELF_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64", 0xF3: "riscv64", 0x15: "ppc64le", 0x16: "s390x"}
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)


@dataclass(frozen=True)
class LibraryStatus:
    """The outcome of loading; ``reason`` is a clause that continues "the library ...", empty when it is loaded."""

    available: bool
    reason: str
    path: Path | None = None
    stamp: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for people."""
        if not self.available:
            return f"the compiled ops are not in use: the library {self.reason}"
        sets = self.stamp.get("instruction_sets") or "none beyond the portable path"
        kernels = self.stamp.get("cuda_architectures", "").split()
        cuda = ", ".join(f"sm_{arch}" for arch in kernels) or "none"
        return (
            f"the compiled ops are loaded (built for torch {self.stamp.get('torch')} "
            f"with {self.stamp.get('compiler')}; instruction sets: {sets}; CUDA kernels: {cuda})"
        )


class _Unusable(Exception):
    """The library cannot be used; the message continues "the library ..."."""


_lock = fork_safe_lock()
_status: LibraryStatus | None = None


def once(make: Callable[[], T]) -> Callable[[], T]:
    """``make`` as a function that runs it in one thread, once, and returns what it returned."""
    lock, kept = fork_safe_lock(), cache(make)

    @wraps(make)
    def get() -> T:
        with lock:
            return kept()

    # torch.compile runs it while it traces (see kernel_check.doubt).
    get._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return get


def load() -> LibraryStatus:
    """Loads the library on the first call and returns what came of it; later calls return the same.

    Raises ConfigError where the library is there and ``BEIT3_FAST_CPU_ISA`` names no level of its CPU kernels, and nothing else.
    """
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                status = _attempt(os.environ.get("BEIT3_FAST_LIBRARY", ""))
                if status.available:
                    _choose_level()
                _status = status
                logger.info("%s", _status.describe())
    return _status


def _choose_level() -> None:
    """The level of the CPU kernels is chosen with the library, so that no op raises an error for the environment."""
    import torch

    try:
        torch.ops.beit3_fast.cpu_isa()
    except RuntimeError as error:
        raise ConfigError(str(error)) from None


def available() -> bool:
    """True when the compiled ops can be called."""
    return load().available


def why_unavailable() -> str:
    """A clause that continues "the library ...", such as "is not built: ..."; empty when it is loaded."""
    return load().reason


def cuda_architectures() -> tuple[str, ...]:
    """The architectures whose CUDA kernels the library holds, such as ("90a",); empty when it is not loaded."""
    status = load()
    return tuple(status.stamp.get("cuda_architectures", "").split()) if status.available else ()


def why_without_cuda() -> str:
    """A clause that continues "the library ...", such as "was built without: nvcc was not found"."""
    status = load()
    if not status.available:
        return status.reason
    return f"was built without: {_record('without_cuda') or 'its build does not say why'}"


def _attempt(setting: str) -> LibraryStatus:
    if setting.lower() in ("none", "0", "off"):
        return LibraryStatus(
            False, f"is switched off by the environment variable BEIT3_FAST_LIBRARY={setting}"
        )
    path = Path(setting) if setting else _PACKAGE / FILE_NAME
    stamp: Mapping[str, Any] = {}
    try:
        stamp = _inspect(path)
        _check(stamp)
        _load_file(path, stamp)
    except _Unusable as error:
        return LibraryStatus(False, f"{error}; {_mend()}", path, stamp)
    except Exception as error:
        kind = type(error).__name__
        return LibraryStatus(False, f"cannot be loaded ({kind}: {error}); {_mend()}", path, stamp)
    return LibraryStatus(True, "", path, stamp)


def _mend() -> str:
    if (_PACKAGE.parent / "setup.py").is_file():
        return "to build it for this machine, run in the source folder: pip install --no-build-isolation -e ."
    return (
        "to build it for this machine, run in the source folder of beit3_fast: "
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    )


def _inspect(path: Path) -> Mapping[str, Any]:
    """The stamp of a library file, without loading it; _Unusable where the file is no library of ours."""
    if not path.is_file():
        if path.parent != _PACKAGE:
            raise _Unusable(f"is not there: {path} (named by BEIT3_FAST_LIBRARY) is no file")
        raise _Unusable(f"is not built: {_build_record()}")
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            _check_elf(content, path)
            start = content.find(_MARKER)
            end = content.find(b"\0", start)
            text = content[start + len(_MARKER) - 1 : end] if 0 <= start < end else b""
    except (OSError, ValueError) as error:
        raise _Unusable(f"cannot be read ({path.name}: {error})") from error
    if not text:
        raise _Unusable(
            f"carries no stamp of beit3_fast, so {path.name} is another or a damaged file"
        )
    try:
        stamp = json.loads(text)
    except ValueError as error:
        raise _Unusable(f"is damaged: the stamp in {path.name} cannot be read") from error
    if not isinstance(stamp, dict):
        raise _Unusable(f"is damaged: the stamp in {path.name} cannot be read")
    return stamp


def _check_elf(content: mmap.mmap, path: Path) -> None:
    """On Linux: a whole 64-bit ELF file for this processor. Loading a shortened file would kill the process."""
    if sys.platform != "linux":
        return
    head = content[:64]
    if len(head) < 64 or head[:4] != b"\x7fELF":
        raise _Unusable(f"is damaged: {path.name} is no shared library for Linux")
    order = "little" if head[5] == 1 else "big"
    machine = int.from_bytes(head[18:20], order)  # type: ignore[arg-type]
    name = _ELF_MACHINES.get(machine, f"processor number {machine}")
    if name != platform.machine():
        raise _Unusable(f"was built for {name} processors; this one is {platform.machine()}")
    sections = int.from_bytes(head[40:48], order)  # type: ignore[arg-type]
    size = int.from_bytes(head[58:60], order)  # type: ignore[arg-type]
    count = int.from_bytes(head[60:62], order)  # type: ignore[arg-type]
    if sections + size * count > len(content):
        raise _Unusable(f"is damaged: {path.name} is cut off after {len(content)} bytes")


def _check(stamp: Mapping[str, Any]) -> None:
    import torch

    built = f"was built for torch {stamp.get('torch')}"
    here = f"{platform.system()} {platform.machine()}"
    if f"{stamp.get('system')} {stamp.get('machine')}" != here:
        raise _Unusable(
            f"was built for {stamp.get('system')} {stamp.get('machine')}; this is {here}"
        )
    version = getattr(sys.modules.get("beit3_fast"), "__version__", _UNKNOWN_VERSION)
    if version != _UNKNOWN_VERSION and stamp.get("package") != version:
        raise _Unusable(
            f"was built for beit3_fast {stamp.get('package')}; this is beit3_fast {version}"
        )
    minimum = str(stamp.get("torch_minimum", "0"))
    if _numbers(torch.__version__) < _numbers(minimum):
        raise _Unusable(
            f"{built} and needs torch {minimum} or newer; this is torch {torch.__version__}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _load_file(path: Path, stamp: Mapping[str, Any]) -> None:
    import torch

    try:
        torch.ops.load_library(str(path.resolve()))
    except OSError as error:
        said = str(error.__cause__ or error)
        built = f"was built for torch {stamp.get('torch')}, and this is torch {torch.__version__}"
        symbol = re.search(r"undefined symbol: ([\w@.]+)", said)
        version = re.search(r"version [`'](\w+)_([\d.]+)' not found", said)
        needed = re.search(r"(\S+): cannot open shared object file", said)
        if symbol:
            raise _Unusable(f"{built}, which lacks the function {symbol[1]}") from error
        if version:
            what = "C++" if version[1] in ("GLIBCXX", "CXXABI") else "C"
            raise _Unusable(
                f"was built on a newer system: it needs {version[1]} {version[2]}, "
                f"which the {what} runtime library here does not have"
            ) from error
        if needed:
            raise _Unusable(f"needs {Path(needed[1]).name}, which is not found here") from error
        raise _Unusable(f"{built}; the system's loader said: {said}") from error


def _build_record() -> str:
    """Why the installation holds no library, as setup.py wrote it down."""
    reason = _record("reason")
    if reason is None:
        return f"there is no {FILE_NAME} beside the package"
    return reason or f"{FILE_NAME} was built at installation and is gone since"


def _record(key: str) -> str | None:
    """What setup.py wrote down of the build; None where it did not."""
    try:
        text = (_PACKAGE / "_build.json").read_text(encoding="utf-8")
        return str(json.loads(text)[key])
    except Exception:
        return None


@lru_cache(maxsize=1)
def native() -> ModuleType | None:
    """The module of what is not a tensor op (CPU features, build information, packing for numpy), or None."""
    try:
        from beit3_fast import _native
    except Exception as error:
        logger.info("the module beit3_fast._native is not in use: %s", error)
        return None
    module: ModuleType = _native
    return module


def cpu_features() -> dict[str, bool]:
    """Instruction sets that this processor and its system offer, under their names in /proc/cpuinfo; empty when unknown."""
    return dict(_cpu_features())


@lru_cache(maxsize=1)
def _cpu_features() -> dict[str, bool]:
    module = native()
    if module is not None:
        return {str(name): bool(has) for name, has in module.cpu_features().items()}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is None:
        return {}
    words = set(flags[1].split())
    return {name: name in words for name in _FEATURES}


def cpu_isa() -> str:
    """The instruction-set level that the compiled CPU kernels run on here: portable,
    avx2, avx512, avx512_vnni, avx512_bf16 or amx_bf16 (each has what those before it have).

    ``BEIT3_FAST_CPU_ISA`` lowers it. Raises KernelUnavailable without the library, and ConfigError as ``load`` does.
    """
    import torch

    if not available():
        raise KernelUnavailable(
            f"the CPU kernels have no level without the compiled library, which {why_unavailable()}"
        )
    return str(torch.ops.beit3_fast.cpu_isa())


def build_info() -> dict[str, Any]:
    """What the library was built from and for (compiler, flags, torch, instruction sets); empty without a library. Loads nothing."""
    try:
        return dict(_inspect(_PACKAGE / FILE_NAME))
    except _Unusable:
        return {}
