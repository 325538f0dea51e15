"""Micro-batches of fine-tuning: every row once an epoch, with its target, and lines that cannot be used are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from spm import tiny_sentencepiece_bytes

from beit3_fast.data import Augment, Processor
from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.data.paired import PairedData, read_paired
from beit3_fast.data.question_batch import answer_scores, question_batch
from beit3_fast.errors import ConfigError, InputError

ROWS = 5


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row n has an image of grey 40 n, a text that begins with word 10 + n and is n words longer, and answer n."""
    root = tmp_path_factory.mktemp("paired")
    lines = []
    for n in range(ROWS):
        Image.new("RGB", (20, 20), (40 * n,) * 3).save(root / f"{n}.png")
        text = [10 + n, *[20] * n]
        row = {"image_path": f"{n}.png", "text_segment": text, "labels": [n], "scores": [0.5]}
        lines.append(json.dumps(row))
    (root / "vqa.jsonl").write_text("\n".join(lines))
    return root / "vqa.jsonl"


def paired(index: Path, **changes: Any) -> PairedData[Any]:
    options: dict[str, Any] = {
        "rows": read_paired(index, answer_scores),
        "batch_size": 2,
        "processor": Processor(tiny_sentencepiece_bytes(), image_size=8),
        "collate": lambda batch, targets: question_batch(batch, targets, ROWS),
        "seed": 3,
    }
    return PairedData(**{**options, **changes})


def numbers(batch: PairBatch) -> list[int]:
    """Which rows these are, as image, text and answer each say."""
    by_image = ((batch.image.mean((1, 2, 3)) + 1) * 127.5 / 40).round().long().tolist()
    assert (batch.tokens[:, 1] - 10).tolist() == by_image
    assert [length - 3 for length in batch.lengths] == by_image
    assert batch.scores.argmax(1).tolist() == by_image  # type: ignore[attr-defined]
    return by_image


def test_every_row_comes_once_an_epoch(index: Path) -> None:
    data = paired(index)
    seen = [n for number in range(ROWS) for n in numbers(data[number])]
    assert sorted(seen[:ROWS]) == sorted(seen[ROWS:]) == list(range(ROWS))
    assert seen[:ROWS] != seen[ROWS:]
    again = paired(index)[3]
    assert torch.equal(again.tokens, data[3].tokens)
    assert [n for batch in data.in_order() for n in numbers(batch)] == list(range(ROWS))


def test_views_change_with_the_epoch_but_held_out_images_do_not(index: Path) -> None:
    data = paired(index, augment=Augment(jitter=0.9), batch_size=ROWS)
    first, second = (data[n].image.flatten(1).mean(1).sort().values for n in (0, 1))
    assert not torch.allclose(first, second)
    assert torch.equal(
        data[0].image, paired(index, augment=Augment(jitter=0.9), batch_size=ROWS)[0].image
    )
    (whole,) = data.in_order()
    assert numbers(whole) == list(range(ROWS))


def test_another_run_is_known_by_its_data(index: Path) -> None:
    own = paired(index)
    rows = own.rows
    changed = [rows[0]._replace(target=((1, 0.5),)), *rows[1:]]
    others = [paired(index, **c) for c in ({"seed": 4}, {"batch_size": 3}, {"rows": changed},
                                           {"augment": Augment(flip=0.5)})]  # fmt: skip
    assert paired(index).identity == own.identity
    assert len({own.identity, *(other.identity for other in others)}) == 1 + len(others)


def test_sentences_need_a_tokenizer(tmp_path: Path, index: Path) -> None:
    (tmp_path / "0.png").write_bytes((index.parent / "0.png").read_bytes())
    line = {"image_path": "0.png", "text_segment": "a b", "labels": [0], "scores": [1]}
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    rows = read_paired(tmp_path / "own.jsonl", answer_scores)
    assert paired(index, rows=rows, batch_size=1)[0].lengths[0] > 2
    with pytest.raises(ConfigError, match="sentences, not ids; name the SentencePiece file"):
        paired(index, rows=rows, processor=Processor(image_size=8))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 2]}, "equally many"),
        ({"labels": [-1]}, "labels from 0 on"),
        ({"scores": [1.5]}, r"scores in \[0, 1\]"),
        ({"labels": [1, 1], "scores": [1, 0.3]}, "each once"),
        ({"scores": [True]}, r"scores in \[0, 1\]"),
        ({"scores": None}, 'expected "labels"'),
        ({"image_path": None}, 'expected "image_path"'),
        ({"text_segment": []}, r"its text_segment \(\) has no words"),
        ({"text_segment": [1, 2, 1]}, "has no words; leave the line out"),
        ({"text_segment": " \t\u200b"}, "has no words"),
        ({"text_segment": None}, "is null, as in official captioning files"),
    ],
)
def test_lines_that_cannot_be_used(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    line = {"image_path": "0.png", "text_segment": [5], "labels": [0], "scores": [1.0], **change}
    (tmp_path / "bad.jsonl").write_text("\n" + json.dumps(line))
    with pytest.raises(InputError, match=rf"line 2 of .*bad\.jsonl.*{message}"):
        read_paired(tmp_path / "bad.jsonl", answer_scores)


def test_answers_that_the_model_does_not_have(index: Path) -> None:
    data = paired(index, collate=lambda batch, targets: question_batch(batch, targets, 3))
    with pytest.raises(InputError, match=r"but the model only 0 to 2; set .* num_classes"):
        [data[n] for n in range(3)]
    with pytest.raises(InputError, match="at least one line"):
        paired(index, rows=[])
    with pytest.raises(ConfigError, match="batch_size must be a positive integer"):
        paired(index, batch_size=0)
