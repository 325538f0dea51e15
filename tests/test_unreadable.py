"""Why a file cannot be read: each reason names the way on."""

from __future__ import annotations

import errno
import os

import pytest

from beit3_fast import unreadable


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOENT, "check the path"),
        (errno.EISDIR, "give the path of a file in it"),
        (errno.EACCES, "chmod u+r"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "the disk failed"),
    ],
)
def test_the_mend(number: int, mend: str) -> None:
    said = unreadable.why(OSError(number, os.strerror(number), "a.jpg"))
    assert said.startswith(f"{os.strerror(number)}; ")
    assert mend in said
    assert "a.jpg" not in said


def test_what_has_no_mend_is_said_as_it_is() -> None:
    assert unreadable.why(ValueError("embedded null byte")) == "embedded null byte"
    assert unreadable.why(OSError("image file is truncated")) == "image file is truncated"
    assert unreadable.why(OSError(errno.EPIPE, "Broken pipe")) == "Broken pipe"


def test_what_may_pass() -> None:
    def caused(by: BaseException) -> ValueError:
        error, outer = ValueError("inner"), ValueError("outer")
        error.__cause__ = by
        outer.__cause__ = error
        return outer

    passing = OSError(errno.EIO, "x")
    assert unreadable.may_pass(passing)
    assert unreadable.may_pass(caused(passing))
    assert unreadable.may_pass(caused(MemoryError()))
    for lasting in (OSError(errno.ENOENT, "x"), OSError("damaged"), ValueError("x")):
        assert not unreadable.may_pass(lasting)
        assert not unreadable.may_pass(caused(lasting))
