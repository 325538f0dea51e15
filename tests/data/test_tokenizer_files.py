"""Files that are no usable SentencePiece model: an InputError in words, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from spm import tiny_sentencepiece_bytes

from beit3_fast.data import Tokenizer
from beit3_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
_MODEL = tiny_sentencepiece_bytes()


class TestFiles:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"not a model",
            b"\0" * 4096,
            b"\xff" * 4096,
            _MODEL[:1],
            _MODEL[:1000],
            _MODEL[: len(_MODEL) // 2],
            _MODEL[:-1],
            b"PK\x03\x04" + bytes(100),
            b"<html>404</html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            # Only the trainer's part: no pieces at all.
            b"\x12\x00",
        ],
        ids=range(12),
    )
    def test_damaged(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "beit3.spm"
        path.write_bytes(content)
        for source in (path, content):
            with pytest.raises(InputError, match=r"SentencePiece|<unk>"):
                Tokenizer(source)

    def test_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "beit3.spm"
        path.touch()
        with pytest.raises(InputError, match=r"beit3\.spm' is empty"):
            Tokenizer(path)

    @pytest.mark.parametrize(
        "ids",
        [
            {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": 3},
            {"unk_id": 0, "bos_id": -1, "eos_id": -1},
            {"unk_id": 0, "bos_id": 2, "eos_id": 1},
            {"unk_id": 3, "bos_id": 1, "eos_id": 2, "pad_id": 0},
        ],
        ids=["T5", "none", "swapped", "only unk elsewhere"],
    )
    def test_other_layout(self, ids: dict[str, int]) -> None:
        with pytest.raises(InputError, match=r"<unk>, <s>, </s> as pieces 0, 1, 2"):
            Tokenizer(tiny_sentencepiece_bytes(**ids))

    @pytest.mark.parametrize("source", [None, 5, 1.5, bytearray(b"x"), ["a"], "a\0b"], ids=repr)
    def test_not_a_path(self, source: Any) -> None:
        with pytest.raises(InputError, match="path or the bytes"):
            Tokenizer(source)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"nowhere\.spm"):
            Tokenizer(tmp_path / "nowhere.spm")

    def test_not_a_regular_file(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        for path in (tmp_path, fifo):
            with pytest.raises(InputError, match="not a regular file"):
                Tokenizer(path)

    def test_too_large(self, tmp_path: Path) -> None:
        path = tmp_path / "beit3_base.pth"
        with open(path, "wb") as file:
            file.truncate(2**30)
        with pytest.raises(InputError, match="checkpoint"):
            Tokenizer(path)

    def test_crafted_files_do_not_crash(self, tmp_path: Path) -> None:
        """In a process of its own: what could go wrong here ends the process."""
        (tmp_path / "model").write_bytes(_MODEL)
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", _CRAFTED, str(tmp_path / "model")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        refused, loaded = map(int, done.stdout.split())
        assert refused > 50
        assert loaded > 50


_CRAFTED = """
import random, sys
from beit3_fast.data.tokenizer import Tokenizer
from beit3_fast.errors import InputError
model = open(sys.argv[1], "rb").read()

def field(number, content):
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content

piece = lambda name, rest=b"": model + field(1, field(1, name) + rest)
crafted = [piece(b"x" * n) for n in (0, 1, 5_000, 100_000, 4_000_000)]
crafted += [piece(b"new", b"\\x15" + score) for score in (b"\\0\\0\\xc0\\x7f", b"\\0\\0\\x80\\x7f", b"\\0\\0\\x80\\xff")]
crafted += [piece(b"new", b"\\x18" + bytes([kind])) for kind in range(8)]
crafted += [piece(name) for name in (b"a", b"<unk>", b"</s>", b"\\0", b"\\xff\\xfe", b"\\xed\\xa0\\x80")]
# The normaliser's compiled table is read by offset: the place for an overflow.
crafted += [model + field(3, field(2, table)) for table in (b"", b"\\1", b"\\xff" * 8, b"\\0\\4\\0\\0" + b"\\xff" * 2048)]
random = random.Random(0)
for n in range(300):
    damaged = bytearray(model)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        damaged[random.randrange(len(model) if n % 2 else 1500)] = random.randrange(256)
    crafted.append(bytes(damaged))
refused = loaded = 0
for content in crafted:
    try:
        tokenizer = Tokenizer(content)
    except InputError:
        refused += 1
        continue
    loaded += 1
    try:
        ids = tokenizer.encode("A red cat! leans on \\u5b57 \\ufb01 \\0 its stand " * 5)
        tokenizer.decode(ids, skip_special=False)
    except Exception:
        pass
print(refused, loaded)
"""
