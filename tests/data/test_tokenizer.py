"""The official id map and segment form, odd texts, and what is shared by threads and processes."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spm import SENTENCES, tiny_sentencepiece_bytes, with_pieces

from beit3_fast.data import Batch, Tokenizer, segments
from beit3_fast.data.tokenizer import is_cut
from beit3_fast.errors import ConfigError, InputError

_MODEL = tiny_sentencepiece_bytes()


def xlm_roberta_ids(spm_path: Path, text: str) -> list[int]:
    """The rule of fairseq's XLM-R, written by piece names: a table of four, and everything else moves by one."""
    table = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    ids = []
    for piece in model.encode(text, out_type=str):
        number = model.piece_to_id(piece)
        ids.append(table.get(piece, number + 1 if number else table["<unk>"]))
    return ids


class TestIds:
    def test_special_ids(self, tokenizer: Tokenizer) -> None:
        assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (
            0,
            1,
            2,
            3,
        )
        assert tokenizer.piece_count == 90
        assert tokenizer.mask_id == 91
        assert tokenizer.vocab_size == 92

    def test_official_size(self) -> None:
        # The official 64,000 pieces without the time to train that many.
        names = [f"piece{n}" for n in range(90, 64_000)]
        official = Tokenizer(with_pieces(_MODEL, names))
        assert (official.piece_count, official.mask_id, official.vocab_size) == (
            64_000,
            64_001,
            64_002,
        )
        assert official.encode("piece63999")[-1] == 64_000

    @pytest.mark.parametrize(
        "text", [*SENTENCES, "", " ", "a", "żółw 字 cat", "<s> </s> <mask> <pad>"]
    )
    def test_equals_the_fairseq_rule(self, tokenizer: Tokenizer, spm_path: Path, text: str) -> None:
        assert tokenizer.encode(text) == xlm_roberta_ids(spm_path, text)

    def test_unknown_characters(self, tokenizer: Tokenizer) -> None:
        assert 3 in tokenizer.encode("字")
        assert 0 not in tokenizer.encode("字 cat")

    def test_a_file_that_defines_the_specials_as_symbols(self, tmp_path: Path) -> None:
        path = tmp_path / "symbols.spm"
        path.write_bytes(tiny_sentencepiece_bytes(user_defined_symbols=["<s>", "</s>"]))
        text = "a<s>b</s>"
        ids = Tokenizer(path).encode(text)
        assert {0, 2} <= set(ids)
        assert ids == xlm_roberta_ids(path, text)

    def test_names_of_specials_are_plain_text(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("a</s><mask><s><pad>")
        assert not {0, 1, 2, tokenizer.mask_id} & set(ids)
        assert len(ids) > 5

    @pytest.mark.parametrize("kind", ["path", "str", "bytes"])
    def test_sources(self, spm_path: Path, tokenizer: Tokenizer, kind: str) -> None:
        make: dict[str, Any] = {"path": Path, "str": str, "bytes": Path.read_bytes}
        source = make[kind](spm_path)
        assert Tokenizer(source).encode(SENTENCES[0]) == tokenizer.encode(SENTENCES[0])

    def test_repr(self, tokenizer: Tokenizer) -> None:
        assert repr(tokenizer) == "Tokenizer(90 pieces, vocab_size=92)"


class TestSegments:
    def test_longest(self) -> None:
        batch = segments([[10, 11, 12], [20]])
        assert isinstance(batch, Batch)
        assert batch["text_tokens"].tolist() == [[0, 10, 11, 12, 2], [0, 20, 2, 1, 1]]
        assert batch["text_padding_mask"].tolist() == [[False] * 5, [False] * 3 + [True] * 2]
        assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
        assert batch["text_tokens"].dtype == torch.int64
        assert batch["text_padding_mask"].dtype == torch.bool
        assert batch["attention_mask"].dtype == torch.int64

    def test_max_length_pads_and_cuts(self) -> None:
        batch = segments([list(range(4, 20)), [7]], max_length=6, padding="max_length")
        assert batch["text_tokens"].tolist() == [[0, 4, 5, 6, 7, 2], [0, 7, 2, 1, 1, 1]]

    @pytest.mark.parametrize(("tokens", "expected"), [(3, 5), (4, 6), (5, 6)])
    def test_the_cut_leaves_room_for_bos_and_eos(self, tokens: int, expected: int) -> None:
        row = segments([[9] * tokens], max_length=6)["text_tokens"][0]
        assert len(row) == expected
        assert row[-1] == 2

    @pytest.mark.parametrize(("tokens", "expected"), [(62, False), (63, True)])
    def test_the_longest_text_that_is_not_cut(self, tokens: int, expected: bool) -> None:
        assert is_cut(range(tokens), 64) is expected
        assert (len(segments([range(tokens)], 64)["text_tokens"][0]) < tokens + 2) is expected
        assert not is_cut(range(tokens), None)

    def test_no_cut(self) -> None:
        assert segments([[9] * 500], max_length=None)["text_tokens"].shape == (1, 502)

    def test_ragged(self) -> None:
        batch = segments([[10, 11], []], padding=False)
        assert [row.tolist() for row in batch["text_tokens"]] == [[0, 10, 11, 2], [0, 2]]
        assert [row.tolist() for row in batch["text_padding_mask"]] == [[False] * 4, [False] * 2]
        assert [row.tolist() for row in batch["attention_mask"]] == [[1] * 4, [1] * 2]

    def test_call(self, tokenizer: Tokenizer) -> None:
        batch = tokenizer(["A cat", ""], max_length=8)
        ids = tokenizer.encode("A cat")
        assert batch["text_tokens"].tolist() == [
            [0, *ids, 2],
            [0, 2] + [1] * len(ids),
        ]
        assert tokenizer("A cat")["text_tokens"].tolist() == [[0, *ids, 2]]
        assert tokenizer("A cat", padding="max_length")["text_tokens"].shape == (1, 64)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_length": 1},
            {"max_length": True},
            {"max_length": 8.0},
            {"padding": "longest"},
            {"padding": None},
            {"padding": "max_length", "max_length": None},
        ],
        ids=str,
    )
    def test_wrong_options(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"max_length|padding"):
            segments([[4]], **wrong)


class TestDecode:
    @pytest.mark.parametrize("text", SENTENCES)
    def test_round_trip(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer(text)["text_tokens"][0]) == text

    def test_specials(self, tokenizer: Tokenizer) -> None:
        ids = [
            0,
            *tokenizer.encode("A cat"),
            tokenizer.mask_id,
            3,
            *tokenizer.encode("a cup"),
            2,
            1,
            1,
        ]
        assert tokenizer.decode(ids) == "A cat a cup"
        assert (
            tokenizer.decode(ids, skip_special=False)
            == "<s> A cat <mask> <unk> a cup </s> <pad> <pad>"
        )

    def test_containers(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("A cat")
        for given_ids in (
            tuple(ids),
            np.array(ids),
            torch.tensor(ids),
            torch.tensor(ids).int(),
            iter(ids),
        ):
            assert tokenizer.decode(given_ids) == "A cat"
        assert tokenizer.decode([]) == ""

    def test_batch(self, tokenizer: Tokenizer) -> None:
        texts = list(SENTENCES[:3])
        tokens = tokenizer(texts)["text_tokens"]
        assert tokenizer.batch_decode(tokens) == texts
        assert tokenizer.batch_decode(tokens.tolist()) == texts

    @pytest.mark.parametrize(
        "ids",
        [[-1], [92], [4, 10**9], [2**70], torch.tensor([4, 92]), np.array([-5])],
        ids=["-1", "vocab_size", "1e9", "2**70", "tensor", "array"],
    )
    def test_out_of_range(self, tokenizer: Tokenizer, ids: Any) -> None:
        with pytest.raises(InputError, match=r"\[0, 92\)"):
            tokenizer.decode(ids)

    @pytest.mark.parametrize(
        "ids",
        [4, "abc", [4.0], [[4, 5]], None, [None], [True], torch.tensor([4.0]), torch.tensor(4)],
        ids=str,
    )
    def test_not_a_sequence_of_integers(self, tokenizer: Tokenizer, ids: Any) -> None:
        with pytest.raises(InputError, match="one sequence of integers"):
            tokenizer.decode(ids)

    def test_batch_of_nothing_like_it(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match="sequence"):
            tokenizer.batch_decode(5)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="sequence"):
            tokenizer.batch_decode([4, 5])  # type: ignore[list-item]


class TestOddTexts:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "\0",
            "a\0b",
            "\x01\x02\x1b[31m\x7f",
            "\r\n\t\v\f",
            "\u200b\ufeff\u202e",
            "e\u0301\u0301\u0301",
            "👩‍👩‍👧‍👦🏳️‍🌈",
            "\U0010ffff\ufffe\uffff",
            "ﬁ½①ｆｕｌｌ",
            "\u0f71" * 1000,
            " " * 10_000,
        ],
        ids=ascii,
    )
    def test_defined(self, tokenizer: Tokenizer, spm_path: Path, text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == xlm_roberta_ids(spm_path, text)
        assert all(3 <= i < tokenizer.mask_id for i in ids)
        assert isinstance(tokenizer.decode(ids), str)

    @pytest.mark.parametrize("unit", ["a", "a cat ", "字", "\0", "A\u0301 "])
    def test_one_megabyte(self, tokenizer: Tokenizer, unit: str) -> None:
        text = unit * (2**20 // len(unit.encode()))
        batch = tokenizer(text)
        assert batch["text_tokens"].shape[1] <= 64
        ids = tokenizer.encode(text)
        assert batch["text_tokens"][0].tolist() == [0, *ids[:62], 2]
        tokenizer.decode(ids)

    @pytest.mark.parametrize("text", ["\ud800", "cat \udfff", "a\udc80b" * 1000])
    def test_lone_surrogates(self, tokenizer: Tokenizer, text: str) -> None:
        with pytest.raises(InputError, match="lone surrogate"):
            tokenizer.encode(text)
        mended = text.encode("utf-8", "replace").decode()
        assert tokenizer.encode(mended)

    @pytest.mark.parametrize("text", [b"cat", None, 5, 1.5, ["cat"]], ids=str)
    def test_not_a_text(self, tokenizer: Tokenizer, text: Any) -> None:
        with pytest.raises(InputError, match="must be a str"):
            tokenizer.encode(text)

    def test_the_text_is_named(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match=r"text 2: .*lone surrogate"):
            tokenizer(["a", "b", "\ud800"])

    @pytest.mark.parametrize("texts", [None, 5, {"a": 1}, {"a"}, b"cat", np.array(["a"])], ids=repr)
    def test_not_a_list_of_texts(self, tokenizer: Tokenizer, texts: Any) -> None:
        with pytest.raises(InputError, match="a str or a list of str"):
            tokenizer(texts)

    def test_no_texts(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match="at least one text"):
            tokenizer([])

    @given(text=st.text(max_size=40))
    @settings(max_examples=100, deadline=None)
    def test_any_text(self, text: str) -> None:
        tokenizer = Tokenizer(_MODEL)
        ids = tokenizer.encode(text)
        assert all(3 <= i < tokenizer.mask_id for i in ids)
        # What came through once is normalised and known: a second trip changes nothing.
        once = tokenizer.decode(ids)
        assert tokenizer.decode(tokenizer.encode(once)).split() == once.split()


class TestSharing:
    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_pickle(self, tokenizer: Tokenizer, protocol: int) -> None:
        again = pickle.loads(pickle.dumps(tokenizer, protocol))
        assert again.vocab_size == tokenizer.vocab_size
        assert [again.encode(s) for s in SENTENCES] == [tokenizer.encode(s) for s in SENTENCES]

    def test_copy(self, tokenizer: Tokenizer) -> None:
        for again in (copy.copy(tokenizer), copy.deepcopy(tokenizer)):
            assert again.encode("A cat") == tokenizer.encode("A cat")

    def test_threads(self, tokenizer: Tokenizer) -> None:
        texts = [f"{s} {n}" for n in range(20) for s in SENTENCES]
        expected = [(ids := tokenizer.encode(t), tokenizer.decode(ids)) for t in texts]
        start = threading.Barrier(8)

        def work(_: int) -> list[tuple[list[int], str]]:
            start.wait()
            return [(ids := tokenizer.encode(t), tokenizer.decode(ids)) for t in texts]

        with ThreadPoolExecutor(8) as pool:
            assert all(result == expected for result in pool.map(work, range(8)))
