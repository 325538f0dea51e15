"""What a command prints into: JSON for any reader, terminals of any encoding, disks that are full; and errors of the system."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_calls import refused, usage

from beit3_fast import cli
from beit3_fast.cli.options import show

ROOT = Path(__file__).resolve().parent.parent
STRANGE = "été bad\udcff.png"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a command "own" that does what it is given."""

    def add(run: Any) -> None:
        own = cli.Command("x", "x", lambda parser: None, run)
        monkeypatch.setitem(cli.COMMANDS, "own", own)

    return add


def test_json_is_ascii_and_has_null_for_what_is_not_finite(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = [float("nan"), (0.5, {"x": float("-inf")})]

    def run(arguments: argparse.Namespace) -> int:
        arguments.json = True
        return show(arguments, [{"image": STRANGE, "scores": scores}], [])

    command(run)
    assert cli.main(["own"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    (entry,) = json.loads(out, parse_constant=pytest.fail)
    assert entry == {"image": STRANGE, "scores": [None, [0.5, {"x": None}]]}


@pytest.mark.parametrize(
    ("encoding", "errors", "expected"),
    [
        ("ascii", "strict", rb"\xe9t\xe9 bad\udcff.png"),
        ("ascii", "surrogateescape", rb"\xe9t\xe9 bad\udcff.png"),
        ("ascii", "replace", b"?t? bad?.png"),
        ("utf-8", "strict", "été bad\\udcff.png".encode()),
        ("utf-8", "surrogateescape", "été bad".encode() + b"\xff.png"),
    ],
)
def test_what_an_encoding_has_not_is_escaped(
    encoding: str, errors: str, expected: bytes, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors))
    command(lambda _: print(STRANGE) or 0)
    assert cli.main(["own"]) == 0
    assert raw.getvalue() == expected + b"\n"


def test_a_path_that_is_too_long(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _: Path("a" * 300).stat().st_size)
    assert "File name too long: 'aaa" in refused(capsys, "own")


@pytest.mark.parametrize("arguments", ["info", "info --json"])
def test_a_disk_that_is_full(arguments: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "beit3_fast", *arguments.split()],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device (make room" in done.stderr


def test_no_output_at_all(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed stdout is None in Python."""
    monkeypatch.setattr(sys, "stdout", None)
    command(lambda _: print("x") or 0)
    assert cli.main(["own"]) == 0


@pytest.mark.parametrize("number", ["0", "-1", "1" + 24 * "0", "x"])
def test_counts_are_numbers_that_a_tensor_can_have(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for call in (("caption", "a.png", "--captions", number), ("bench", "--batch-size", number)):
        code, _, err = usage(capsys, *call)
        assert code == 2
        assert f"expected an integer from 1 to 2147483647, got {number!r}" in err
