"""Commands that fail, as tests look at them."""

from __future__ import annotations

import pytest

from beit3_fast import cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command that fails: exit code 1, nothing on stdout, one line on stderr."""
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"beit3-fast {arguments[0]}: ")
    assert captured.err.count("\n") == 1
    return captured.err


def usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    """Exit code, stdout and stderr of a call that leaves through SystemExit."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err
