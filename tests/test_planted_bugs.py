"""The table of planted bugs fits the files that it names; ``make planted-bugs`` plants them."""

from __future__ import annotations

import dataclasses

import pytest
from bugs import BUGS, Bug
from planted_bugs import ROOT, main, table_faults, union


def test_there_are_enough_of_them() -> None:
    assert len(BUGS) >= 40
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
    assert sum(bug.is_native for bug in BUGS) >= 10


def test_every_text_stands_in_its_file_exactly_once() -> None:
    assert table_faults() == []


def test_a_text_that_has_gone_is_named() -> None:
    gone, idle = (dataclasses.replace(BUGS[0], name=name) for name in ("gone", "idle"))
    gone = dataclasses.replace(gone, old="no such text anywhere")
    idle = dataclasses.replace(idle, new=idle.old)
    faults = table_faults([gone, BUGS[0], idle])
    assert faults == [f"gone: {gone.file} has its text 0 times, not once", "idle: changes nothing"]


def test_python_files_stay_python() -> None:
    for bug in BUGS:
        if bug.file.endswith(".py"):
            compile(bug.planted((ROOT / bug.file).read_text()), bug.name, "exec")


def test_every_bug_names_tests_that_may_be_there() -> None:
    for bug in BUGS:
        assert bug.tests, bug.name
        for test in bug.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).exists(), f"{bug.name}: {file}"
            last = name.partition("[")[0].rpartition("::")[2]
            text = (ROOT / file).read_text() if name else ""
            assert not name or f"def {last}(" in text or f"class {last}" in text, test


def test_selections_are_joined_without_repeats() -> None:
    selections = [("a.py::one", "b.py"), ("a.py::two[x]", "b.py::three"), ("a.py::one[y]",)]
    assert union(selections) == ["a.py::one", "b.py", "a.py::two[x]"]


def test_the_list_and_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    first: Bug = BUGS[0]
    assert main(["--list", "--only", first.name]) == 0
    assert capsys.readouterr().out.split() == [first.name, first.file]
    with pytest.raises(SystemExit):
        main(["--only", "no-such-bug"])
    assert "no bug is named no-such-bug" in capsys.readouterr().err
