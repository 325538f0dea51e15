"""`import beit3_fast` is quiet, touches no optional package and no GPU, and loads no compiled code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = (
    "PIL",
    "fairscale",
    "kernels",
    "matplotlib",
    "safetensors",
    "sentencepiece",
    "skimage",
    "timm",
    "torchscale",
    "torchvision",
    "transformers",
    "triton",
    "xformers",
    "flash_attn",
)

REPORT = """
import json, sys
import torch
before = set(sys.modules)
import beit3_fast
added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
from beit3_fast.ops import library
print("REPORT" + json.dumps({
    "file": beit3_fast.__file__,
    "added": added,
    "cuda": torch.cuda.is_initialized(),
    "loaded": sorted(torch.ops.loaded_libraries),
    "attempted": library._status is not None,
    "native": "beit3_fast._native" in sys.modules,
}))
"""


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    done = run("import builtins\n" + REPORT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said, _, rest = done.stdout.partition("REPORT")
    assert said == "", f"the import printed {said!r}"
    report: dict[str, object] = json.loads(rest)
    return report


def test_nothing_optional_is_imported(report: dict[str, object]) -> None:
    assert not set(OPTIONAL) & set(report["added"])  # type: ignore[call-overload]


def test_no_compiled_code_is_loaded(report: dict[str, object]) -> None:
    assert report["loaded"] == []
    assert report["attempted"] is False
    assert report["native"] is False


def test_cuda_is_not_initialised(report: dict[str, object]) -> None:
    assert report["cuda"] is False


def test_the_source_folder_is_what_is_tested(report: dict[str, object]) -> None:
    assert Path(str(report["file"])).parent == ROOT / "beit3_fast"


# What a user's environment may do to us at import: packages that are absent, and packages that break when touched.
HOSTILE = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise %s("planted: " + name)
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "OSError"])
def test_optional_packages_that_break_do_not_matter(error: str) -> None:
    # torch itself probes triton, so that one is left to it.
    broken = tuple(name for name in OPTIONAL if name != "triton")
    code = (HOSTILE % (broken, error)) + "import beit3_fast; print(len(beit3_fast.list_models()))"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    assert done.stderr == ""


def test_warnings_as_errors_and_no_asserts() -> None:
    # torch's own import warns in some environments; only what comes after it is ours.
    code = "import torch, warnings; warnings.simplefilter('error'); import beit3_fast; beit3_fast.list_models()"
    done = run(code, "-O")
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
