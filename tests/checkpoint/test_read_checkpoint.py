"""What read_checkpoint promises: threads, devices, digests, remarks."""

from __future__ import annotations

import argparse
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    same,
    torch_file,
    weights,
)

from beit3_fast.checkpoint import (
    read_checkpoint,
    save_checkpoint,
)
from beit3_fast.checkpoint.pickle_names import ALLOWED, refusal
from beit3_fast.errors import CheckpointError

BESIDE: dict[str, Any] = {
    "set": {1, "a", None},
    "no set": set(),
    "bytes": b"\xff\0a",
    "bytearray": bytearray(b"\xff\0a"),
    "no bytearray": bytearray(),
    "Counter": Counter("aab"),
    "complex": 1 + 2j,
    "layout": torch.strided,
    "dtype": torch.bfloat16,
    "size": torch.Size([2, 3]),
    "device": torch.device("cuda", 1),
    "scheme": torch.per_tensor_affine,
    "class": torch.nn.Parameter,
    "ordered": OrderedDict(a=1.5),
    "large number": 10**30,
    "Namespace": argparse.Namespace(device=torch.device("cpu"), seen={3}),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_torch_takes_beside_weights_is_taken(name: str, zipped: bool, tmp_path: Path) -> None:
    content = {"model": weights({"a": (4, 4)}), "x": BESIDE[name]}
    path = torch_file(tmp_path / "x.pth", content, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path)
    assert checkpoint.left_out == ("x",)
    assert same(checkpoint.state, content["model"])


def test_what_torch_takes_and_we_do_not_is_refused_for_what_it_is() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    assert ALLOWED - set(_get_allowed_globals()) == {"argparse.Namespace"}
    for name in set(_get_allowed_globals()) - ALLOWED:
        assert "only dense, plain tensors can be weights" in refusal(name), name


def test_threads_share_the_one_allowed_type(tmp_path: Path) -> None:
    """Files with a Namespace in eight threads at once; the process's own list is the same before and after."""
    state = weights({"a": (4, 4)})
    path = torch_file(tmp_path / "x.pth", {"model": state, "args": argparse.Namespace(lr=1.0)})
    problems: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(20):
                assert same(read_checkpoint(path).state, state)
        except BaseException as error:
            problems.append(error)

    def run() -> None:
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    run()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([argparse.Namespace]):
        run()
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert not problems


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "legacy"])
def test_files_are_read_onto_the_cpu_whatever_the_default_device(name: str, tmp_path: Path) -> None:
    state, path = weights({"a": (4, 4)}), tmp_path / name
    if name == "legacy":
        torch_file(path, {"model": state}, _use_new_zipfile_serialization=False)
    else:
        save_checkpoint(state, path)
    with torch.device("meta"):
        found = read_checkpoint(path).state
    assert same(found, state)


def test_the_digest_of_a_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    import hashlib

    path = torch_file(tmp_path / "x.pth", {"model": weights({"a": (4, 4)})})
    fresh, stale = read_checkpoint(path), read_checkpoint(path)
    assert fresh.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    torch_file(path, {"model": weights({"a": (5, 5)})})
    with pytest.raises(CheckpointError, match="changed since it was read"):
        _ = stale.sha256


def test_files_without_checksums_say_so(tmp_path: Path) -> None:
    state = weights({"a": (4, 4)})
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        plain = torch_file(tmp_path / "x.pth", {"model": state})
    finally:
        torch.serialization.set_crc32_options(before)
    legacy = torch_file(tmp_path / "y.pth", {"model": state}, _use_new_zipfile_serialization=False)
    for path in (plain, legacy):
        checkpoint = read_checkpoint(path)
        assert same(checkpoint.state, state)
        assert any("unnoticed" in remark for remark in checkpoint.remarks)
    assert not read_checkpoint(torch_file(tmp_path / "z.pth", {"model": state})).remarks
