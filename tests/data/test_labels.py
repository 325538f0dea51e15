"""Names of classes from files, official and plain, whole and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from beit3_fast.data import read_labels
from beit3_fast.data.labels import labels_for
from beit3_fast.errors import InputError


def test_the_official_form(tmp_path: Path) -> None:
    path = tmp_path / "answer2label.txt"
    path.write_text(
        '{"answer": "no", "label": 1}\n\n{"answer": "{a} café", "label": 2}\n{"answer": "yes", "label": 0}\n\n'
    )
    assert read_labels(path) == ("yes", "no", "{a} café")
    assert read_labels(str(path)) == labels_for(path, 3) == ("yes", "no", "{a} café")


def test_one_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("tench\n great white shark \n\n")
    assert read_labels(path) == ("tench", "great white shark")


def test_a_line_ends_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("a\u2028cat\nb\x0bdog\n", encoding="utf-8")
    assert read_labels(path) == ("a\u2028cat", "b\x0bdog")
    path.write_bytes(b"a cat\r\na dog\r\n")
    assert read_labels(path) == ("a cat", "a dog")


@pytest.mark.parametrize("form", ['{"answer": "yes", "label": 0}\n', "yes\n"])
def test_a_byte_order_mark_belongs_to_no_name(form: str, tmp_path: Path) -> None:
    """Some editors begin every file with it; as a part of the first line it made a name of each line of JSON."""
    path = tmp_path / "labels.txt"
    path.write_text(form, encoding="utf-8-sig")
    assert read_labels(path) == ("yes",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("yes\n\nno\n", "line 2 .* names no class"),
        ('{"answer": "yes", "label": 0}\nno', r"line 2 .* must be .*got 'no'"),
        ('{"answer": "yes"}', "line 1"),
        ('{"answer": 3, "label": 0}', "line 1"),
        ('{"answer": "yes", "label": true}', "line 1"),
        ('{"answer": "yes", "label": "0"}', "line 1"),
        ("{", "line 1"),
        (
            '{"answer": "a", "label": 0}\n{"answer": "b", "label": 0}',
            "line 2 .* names class 0 again",
        ),
        ('{"answer": "a", "label": 0}\n{"answer": "b", "label": 2}', "but not class 1"),
        ('{"answer": "a", "label": -1}', "but not class 0"),
        (b"\xff\xfe\x00", "no text in UTF-8 .*one name a line"),
    ],
)
def test_damaged_files(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_labels(path)
    assert "labels.txt" in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for value in (tmp_path, tmp_path / "missing", None, 3.5, "a\0b"):
        with pytest.raises(InputError, match="label file"):
            read_labels(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes"], "2 classes, got 1 labels"),
        ([1, 2], "a file or a list of str"),
        (3, "a file or a list of str, got 3"),
    ],
)
def test_labels_that_do_not_fit(labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        labels_for(labels, 2)
    assert labels_for(None, 2) is None
