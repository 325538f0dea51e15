"""What read_checkpoint promises: threads, devices, digests, remarks."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

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
from beit3_fast.errors import CheckpointError


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
