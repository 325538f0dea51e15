"""What a reader must know to judge the figures: hardware, versions, commit, date. No host names or paths."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
    "i8mm",
)
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_PACKAGES = ("torchscale", "timm", "numpy", "triton", "openvino", "nncf", "onnxruntime", "onnx")


def environment(threads: int, device: torch.device) -> dict[str, object]:
    """The JSON contract's "environment"."""
    info, flags = _cpuinfo(), _flags()
    described: dict[str, object] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "git": git_commit(),
        "cpu": info.get("model name", platform.machine()),
        "cores": physical_cores(),
        "threads": threads,
        "isa": [name for name in _ISA if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    for package in _PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = None
    return described


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has bf16 products of its own; elsewhere PyTorch's are several times slower than fp32."""
    if device.type != "cpu":
        return True
    flags = _flags()
    # oneDNN also says yes to AVX-512 alone, where it emulates the products.
    return bool(flags & _BF16) if flags else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_matrix_units(device: torch.device) -> bool:
    """Whether the device multiplies whole tiles of bf16 at once: AMX on a CPU, any GPU."""
    return device.type != "cpu" or "amx_bf16" in (_flags() or ())


def git_commit() -> str:
    """The checked-out commit, with "+" if files of it were changed, or "unknown"."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def available_memory() -> int:
    """Bytes that programs may still take on this machine, 16 GiB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 16 << 30
    return int(kib) * 1024


def physical_cores() -> int:
    """Physical cores that this process may use: two threads of one core do not multiply faster than one."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            cores.add((package, (topology / "core_id").read_text().strip()))
        except OSError:
            return len(allowed)
    return len(cores)


def _flags() -> set[str]:
    info = _cpuinfo()
    return set((info.get("flags") or info.get("Features") or "").split())


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}
