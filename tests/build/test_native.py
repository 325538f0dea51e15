"""The pybind11 module: CPU features, build information, weight packing for numpy."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from beit3_fast.ops import library

CPUINFO = Path("/proc/cpuinfo")


@pytest.fixture(scope="module")
def native() -> ModuleType:
    module = library.native()
    if module is None:
        pytest.skip("the module beit3_fast._native is not built here")
    return module


def test_features_are_those_that_the_system_reports(native: ModuleType) -> None:
    features = native.cpu_features()
    assert library.cpu_features() == features
    flags = CPUINFO.is_file() and re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    if not flags:
        pytest.skip("no list of features to compare with")
    words = set(flags[1].split())
    assert features == {name: name in words for name in library._FEATURES}


def test_build_information_is_the_stamp_of_the_library(native: ModuleType) -> None:
    assert native.build_info() == library.build_info()
    assert native.build_info()["torch_minimum"] == "2.11"


def test_the_level_is_the_one_of_the_ops(native: ModuleType) -> None:
    assert library.available()
    assert native.cpu_isa() == torch.ops.beit3_fast.cpu_isa()


@pytest.mark.parametrize("shape", [(1, 1), (32, 16), (33, 17), (70, 130), (3, 64), (1, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_the_same_as_the_op(
    native: ModuleType, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    assert library.available()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bits = weight.view(torch.uint16) if dtype is torch.bfloat16 else weight
    packed = native.pack_weight(bits.numpy())
    expected = torch.ops.beit3_fast.pack_weight(weight)
    assert packed.dtype == bits.numpy().dtype
    assert packed.shape == expected.shape
    assert packed.tobytes() == expected.view(torch.uint8).numpy().tobytes()


def test_packing_reads_any_strides(native: ModuleType) -> None:
    weight = np.arange(40 * 24, dtype=np.float32).reshape(24, 40).T[::2]
    expected = native.pack_weight(np.ascontiguousarray(weight))
    assert native.pack_weight(weight).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "weight",
    [
        np.ones(4, np.float32),
        np.ones((2, 2, 2), np.float32),
        np.ones((2, 2)),
        np.ones((2, 2), np.float16),
        np.ones((2, 2), np.int16),
        np.ones((2, 2), ">f4"),
        np.ones((0, 5), np.float32),
        np.ones((5, 0), np.uint16),
    ],
    ids=["1d", "3d", "float64", "float16", "int16", "big-endian", "no rows", "no columns"],
)
def test_other_arrays_are_refused(native: ModuleType, weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected an array \[out, in\] of float32"):
        native.pack_weight(weight)
