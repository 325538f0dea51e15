"""The floors of the house: an import never points upwards."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "beit3_fast"

# From the ground. A unit may import itself and whatever lies on a lower floor.
FLOORS = (
    ("errors", "kernels", "locks", "progress", "torchrun", "unreadable"),
    ("derived", "finite"),
    ("layout", "config", "float8", "parity", "timing"),
    ("padded_layout",),
    ("reference",),
    ("composite",),
    ("data",),
    ("ops", "checkpoint", "generate"),
    ("model",),
    ("integrations", "explanation", "retrieval"),
    ("train",),
    ("embed",),
    ("cli", "__init__"),
    ("__main__",),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
CPU_OPS = ("cached_attention", "expert_linear", "patch_embedding", "shared_attention")
OPS_HELPERS = {
    "__init__",
    "cpu_kernels",
    "cuda_decoding",
    "cuda_float8",
    "cuda_kernels",
    "kernel_cases_decoding",
    "dispatch",
    "folding",
    "kernel_cases",
    "kernel_cases_attention",
    "kernel_cases_float8",
    "kernel_check",
    "kernel_process",
    "library",
    "operands",
    "packed_weight",
    "rows",
    "triton_kernels",
    "whole_layer",
}


def imported_modules(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a module of ``package``, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            # `from beit3_fast import ops` names a module, `from beit3_fast.ops import Norm` need not.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def unit_of(dotted: str) -> str:
    """'beit3_fast.ops.dispatch' -> 'ops'; the package itself and its names -> '__init__'."""
    parts = dotted.split(".")[1:]
    if parts and parts[0] in FLOOR_OF:
        return parts[0]
    if parts and parts[0] in ("_native",):
        return "errors"
    return "__init__"


def upward_arrows(path: Path, text: str) -> list[str]:
    relative = path.relative_to(ROOT)
    dotted = ".".join(relative.with_suffix("").parts)
    package = dotted.removesuffix(".__init__") if path.name == "__init__.py" else dotted
    package = package if path.name == "__init__.py" else package.rpartition(".")[0]
    here = unit_of(dotted)
    wrong = []
    for line, name in imported_modules(ast.parse(text), package):
        top = name.split(".")[0]
        if top in ("bench", "tests"):
            wrong.append(f"{relative}:{line} imports {name}")
        elif top == "beit3_fast":
            there = unit_of(name)
            if there != here and FLOOR_OF[there] >= FLOOR_OF[here]:
                wrong.append(f"{relative}:{line} ({here}) imports {name} ({there})")
    return wrong


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_unit_has_a_floor() -> None:
    units = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in package_files()}
    assert units <= set(FLOOR_OF), f"no floor is named for {sorted(units - set(FLOOR_OF))}"


def test_no_import_points_upwards() -> None:
    wrong = [arrow for path in package_files() for arrow in upward_arrows(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("where", "line", "is_wrong"),
    [
        ("beit3_fast/ops/x.py", "from beit3_fast.model import BEiT3", True),
        ("beit3_fast/ops/x.py", "def f():\n    import beit3_fast.model.beit3", True),
        ("beit3_fast/ops/x.py", "from ..model import beit3", True),
        ("beit3_fast/ops/x.py", "from . import dispatch", False),
        ("beit3_fast/ops/x.py", "from ..reference import shared_attention", False),
        ("beit3_fast/checkpoint/x.py", "from beit3_fast.ops import expert_linear", True),
        ("beit3_fast/data/x.py", "from beit3_fast import create_model", True),
        ("beit3_fast/reference/x.py", "from beit3_fast.composite import expert_linear", True),
        ("beit3_fast/model/x.py", "from beit3_fast import ops", False),
        ("beit3_fast/model/x.py", "import bench.run", True),
        ("beit3_fast/cli.py", "import beit3_fast.model", False),
    ],
)
def test_the_walk_sees_an_upward_arrow(where: str, line: str, is_wrong: bool) -> None:
    assert bool(upward_arrows(ROOT / where, line)) is is_wrong


def test_kernels_import_torch_triton_and_the_standard_library_only() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    wrong = [
        f"{path.name}:{line} imports {name}"
        for path in sorted((ROOT / "kernels").rglob("*.py"))
        for line, name in imported_modules(ast.parse(path.read_text()), "beit3_fast.kernels")
        if name.split(".")[0] not in allowed and not name.startswith("beit3_fast.kernels.")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_is_never_an_importable_top_level_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', path.read_text(), re.MULTILINE)


def test_compiled_kernels_know_neither_torch_nor_python() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.parent != ROOT / "csrc"
        for name in includes(path)
        if re.match(r'[<"](torch|ATen|c10|pybind11|Python)', name)
    ]
    assert not wrong, "\n".join(wrong)


def test_each_binding_knows_one_world() -> None:
    ops, python = includes(ROOT / "csrc" / "ops.cpp"), includes(ROOT / "csrc" / "python.cpp")
    assert any("torch/csrc/stable" in name for name in ops)
    assert not [name for name in ops if re.search("pybind11|Python.h", name)]
    assert not [name for name in ops if re.search("ATen|c10|torch/(extension|script|all)", name)]
    assert not [name for name in python if re.search("torch|ATen|c10", name)]


def op_names() -> set[str]:
    return {path.stem for path in (PACKAGE / "ops").glob("*.py")} - OPS_HELPERS


def test_names_of_ops_are_guessable() -> None:
    missing = [
        path
        for op in sorted(op_names())
        for path in (
            f"beit3_fast/reference/{op}.py",
            f"beit3_fast/composite/{op}.py",
            f"tests/ops/test_{op}.py",
            f"bench/micro/bench_{op}.py",
        )
        if not (ROOT / path).is_file()
    ]
    missing += [path for op in CPU_OPS if not (ROOT / (path := f"csrc/cpu/{op}.cpp")).is_file()]
    assert op_names() == {*CPU_OPS, "float8_linear", "head_top_k", "masked_linear_cross_entropy"}
    assert not missing, missing


def test_kernel_files_are_named_after_ops() -> None:
    strangers = [
        path
        for folder in ("kernels", "beit3_fast/reference", "beit3_fast/composite")
        for path in (ROOT / folder).glob("*.py")
        if not path.stem.startswith("_") and path.stem not in op_names()
    ]
    assert not strangers, strangers


def test_python_files_stay_readable_in_one_sitting() -> None:
    files = [*package_files(), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*files, *ROOT.glob("setup*.py")]
        if (lines := path.read_text().count("\n")) > 400
    }
    assert not long, f"more than 400 lines; which of its two jobs moves out? {long}"
