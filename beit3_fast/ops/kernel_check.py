"""Whether the Triton and CUDA kernels are right on this GPU: seen once, on small shapes, before "auto" takes them.

What was seen is kept in the user's cache folder under the name of all that could change it: GPU, driver, versions,
and the kernels' own text. ``kernels/verified.json`` names the machines where a committed run has seen it already.
A kernel that fails stays out of "auto" there, and one warning says what to report. CUDA kernels are checked in a
process of their own (``kernel_process``): one that is wrong may never end, or leave the GPU useless to its process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
import time
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from beit3_fast.locks import fork_safe_lock
from beit3_fast.ops import (
    cuda_kernels,
    kernel_cases,
    kernel_process,
    library,
    triton_kernels,
)
from beit3_fast.parity import Parity, worst_of

logger = logging.getLogger("beit3_fast")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CUDA = "cuda_"
# What a committed run names of the kernels that it has seen.
_OF_TRITON, _OF_CUDA = ("sources", "triton"), ("cuda",)
_SCHEMA = 1
_CAPTURING = "was not seen right before a CUDA graph was captured; run the model once ahead of it"


class Outcome(NamedTuple):
    """What came of one check: ``parity.reason`` says what was wrong. ``settled``: it would come out so again."""

    kernel: str
    dtype: str
    parity: Parity
    seconds: float
    settled: bool = True


_lock = fork_safe_lock()
# Why not, or None, for each device, kernel and dtype; of this process.
_doubts: dict[tuple[int, str], str | None] = {}


def doubt(op: str, dtype: torch.dtype, needs_grad: bool, impl: str = "triton") -> str | None:
    """Why "auto" leaves the kernel of an op out on the current CUDA device, or None where it was seen right.

    The first call for a kernel and a dtype looks into the cache folder, and runs the check where that knows nothing.
    """
    kernel = f"{_CUDA}{op}" if impl == "cuda" else f"{op}_backward" if needs_grad else op
    key = (_device(), _name(kernel, dtype))
    if key in _doubts:
        return _doubts[key]
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return _CAPTURING
    with _lock:
        if key not in _doubts:
            _doubts[key] = _first_doubt(kernel, dtype)
    return _doubts[key]


# The check is not to be traced. torch.compiler.assume_constant_result says the same, and imports triton to say it.
doubt._dynamo_marked_constant = True  # type: ignore[attr-defined]


def verify(device: str = "cuda") -> list[Outcome]:
    """Runs every check anew, and keeps what it saw on a GPU. Fails a kernel rather than raise."""
    outcomes = [run(kernel, dtype, device) for kernel, dtype in runnable(device)]
    if device == "cuda":
        found = {_name(own.kernel, own.dtype): _broken(own) for own in outcomes if own.settled}
        with _lock:
            for name, reason in found.items():
                _doubts[_device(), name] = reason and _sentence(reason)
            _keep(found)
    return outcomes


def runnable(device: str) -> list[tuple[str, torch.dtype]]:
    """The kernels and dtypes that this device type runs."""
    found = []
    for dtype in DTYPES:
        if triton_kernels.obstacle(device, dtype) is None:
            found += [(kernel, dtype) for kernel in kernel_cases.CASES]
        for kernel in kernel_cases.CUDA_CASES:
            if cuda_kernels.obstacle(kernel.removeprefix(_CUDA), device, dtype, False) is None:
                found.append((kernel, dtype))
    return found


def run(kernel: str, dtype: torch.dtype, device: str) -> Outcome:
    """Runs one check, that of a CUDA kernel in another process."""
    if kernel.startswith(_CUDA) and device == "cuda":
        logger.info("%s is checked in another process", _name(kernel, dtype))
        return Outcome(*kernel_process.run(kernel, _short(dtype), torch.cuda.current_device()))
    return run_here(kernel, dtype, device)


def run_here(kernel: str, dtype: torch.dtype, device: str) -> Outcome:
    """Runs one check in a thread of its own, where neither autocast nor a mode of the caller's reaches it."""
    index = torch.cuda.current_device() if device == "cuda" else None
    results: list[tuple[Parity, bool]] = []

    def work() -> None:
        try:
            if index is not None:
                torch.cuda.set_device(index)
            case = (kernel_cases.CASES | kernel_cases.CUDA_CASES)[kernel]
            results.append((worst_of(case(dtype, device)), True))
        except Exception as error:
            failed = kernel_process.failed(f"it did not run: {type(error).__name__}: {error}")
            results.append((failed, not isinstance(error, torch.OutOfMemoryError)))

    start = time.perf_counter()
    thread = threading.Thread(target=work, name=f"beit3_fast check of {kernel}")
    thread.start()
    thread.join()
    seconds = round(time.perf_counter() - start, 3)
    return Outcome(kernel, _short(dtype), results[0][0], seconds, results[0][1])


def cache_folder() -> Path:
    """``BEIT3_FAST_CACHE``, or ``beit3_fast`` in the user's cache folder."""
    own = os.environ.get("BEIT3_FAST_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beit3_fast"


def identity() -> dict[str, str]:
    """All that could change what a kernel computes on the current device."""
    return _identity(_device())


@cache
def _identity(_: int) -> dict[str, str]:
    named = {"package": _package_version(), "torch": torch.__version__}
    named |= {"triton": _triton_version(), "sources": _sources()}
    stamp = library.load().stamp
    named["cuda"] = f"{stamp.get('cuda_sources', '')} by nvcc {stamp.get('cuda', '')}"
    if torch.cuda.is_available():
        named["gpu"] = torch.cuda.get_device_name()
        named["architecture"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
        named["driver"] = _driver()
    return named


def cache_file() -> Path:
    """Where this machine's outcomes are kept; another driver, version or source has another file."""
    text = json.dumps(identity(), sort_keys=True)
    return cache_folder() / f"kernels-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def reset() -> None:
    """Forget what this process knows, not what is kept in files."""
    with _lock:
        _doubts.clear()
        _identity.cache_clear()


def _first_doubt(kernel: str, dtype: torch.dtype) -> str | None:
    name = _name(kernel, dtype)
    if _in_committed_run(_OF_CUDA if kernel.startswith(_CUDA) else _OF_TRITON):
        return None
    kept = _kept()
    if name not in kept:
        outcome = run(kernel, dtype, "cuda")
        logger.info("%s: checked in %.1f s", name, outcome.seconds)
        kept[name] = _broken(outcome)
        if outcome.settled:
            _keep({name: kept[name]})
    reason = kept[name]
    if reason is None:
        return None
    sentence = _sentence(reason)
    warnings.warn(
        f"beit3_fast does without the kernel {name} on this GPU: it {sentence}. Results stay right, and may "
        "come slower. Please report this with the output of `beit3-fast verify --kernels --json`.",
        RuntimeWarning,
        stacklevel=2,
    )
    return sentence


def _device() -> int:
    """Cheap, for every call asks it; -1 where this process has no CUDA device."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _kept() -> dict[str, str | None]:
    """Outcomes in the cache folder; a file that is damaged or another machine's counts as none."""
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
        kept = content["checks"]
        sound = content["schema"] == _SCHEMA and content["machine"] == identity()
        if sound and all(own is None or isinstance(own, str) for own in kept.values()):
            return dict(kept)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.debug("no outcomes of kernel checks are kept: %s", error)
    return {}


def _keep(found: dict[str, str | None]) -> None:
    """Adds outcomes to the file. A folder that cannot be written costs a repetition, nothing else."""
    content = {"schema": _SCHEMA, "machine": identity(), "checks": _kept() | found}
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        logger.info("outcomes of kernel checks cannot be kept: %s", error)


def _in_committed_run(keys: tuple[str, ...]) -> bool:
    """Whether a run under bench/results/ has seen what these keys name right on such a GPU."""
    path = _folder() / "verified.json"
    runs: Any = json.loads(path.read_text(encoding="utf-8"))["runs"]
    own = identity()
    return any(
        all(key in run and own.get(key) == run[key] for key in ("architecture", *keys))
        for run in runs
    )


def _folder() -> Path:
    folder: Path = import_module("beit3_fast.kernels._tiles").FOLDER.parent
    return folder


def _sources() -> str:
    folder, digest = _folder(), hashlib.sha256()
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("tiles/*.json"))]
    for path in (*files, Path(triton_kernels.__file__)):
        if path.name != "__init__.py":
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        internals: Any = torch._C
        return f"for CUDA {internals._cuda_getDriverVersion()}"


def _triton_version() -> str:
    try:
        return str(import_module("triton").__version__)
    except Exception:
        return "none"


def _package_version() -> str:
    try:
        return version("beit3-fast")
    except PackageNotFoundError:
        return "0+unknown"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(kernel: str, dtype: torch.dtype | str) -> str:
    return f"{kernel} in {dtype if isinstance(dtype, str) else _short(dtype)}"


def _broken(outcome: Outcome) -> str | None:
    return None if outcome.parity.passed else outcome.parity.reason


def _sentence(reason: str) -> str:
    return f"failed its check here ({reason})"
