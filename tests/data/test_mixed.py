"""Micro-batches of images, texts and pairs: every sample once an epoch, whoever prepares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from spm import tiny_sentencepiece_bytes
from torch import Tensor
from torch.utils.data import DataLoader

from beit3_fast.data import Augment, MaskedBatch, Masking, Processor
from beit3_fast.data.index_files import read_index
from beit3_fast.data.mixed import Mix, MixedData
from beit3_fast.data.patch_codes import PatchCodes
from beit3_fast.errors import ConfigError, InputError, ShapeError

PIXELS, PATCH = 16, 4
IMAGES, TEXTS = 7, 5


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Image n is of grey 10 n, text n begins with word 10 + n, pair n has both."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(IMAGES):
        Image.new("RGB", (20, 20), (10 * number,) * 3).save(root / f"{number}.png")
    rows = {
        "image": [{"image_path": f"{n}.png", "label": 0} for n in range(IMAGES)],
        "text": [{"text_segment": [10 + n, 20, 21, 22, 23, 24]} for n in range(TEXTS)],
        "pair": [
            {"image_path": f"{n}.png", "text_segment": [10 + n, 30, 31, 32]} for n in range(IMAGES)
        ],
    }
    for kind, own in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return {kind: root / f"{kind}.jsonl" for kind in rows}


def codes(images: Tensor) -> Tensor:
    """All patches of an image have its grey as their code."""
    grey = ((images.mean((1, 2, 3)) + 1) * 12.75).round().long()
    return grey[:, None].expand(-1, (PIXELS // PATCH) ** 2)


def mixed(sources: dict[str, Path], **changes: Any) -> MixedData:
    options: dict[str, Any] = {
        "mix": Mix(image=2, text=2, pair=1),
        "processor": Processor(tiny_sentencepiece_bytes(), image_size=PIXELS),
        "visual_tokens": codes,
        "patch_size": PATCH,
        "masking": Masking(min_block=2),
    }
    return MixedData(sources, **{**options, **changes})


def same(a: MaskedBatch, b: MaskedBatch) -> bool:
    return all(
        torch.equal(own, other) if isinstance(own, Tensor) else own == other
        for own, other in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def first_words(batch: MaskedBatch) -> list[int]:
    """What the first word of each text was, where it is not hidden: read from the tokens."""
    assert batch.tokens is not None
    return [int(text[1]) for text in batch.tokens.split(batch.text_lengths)]


def test_every_sample_once_an_epoch(sources: dict[str, Path]) -> None:
    data = mixed(sources, masking=Masking(text=0.0, pair_text=0.0, min_block=2))
    greys: list[int] = []
    texts: list[int] = []
    for number in range(3 * IMAGES):
        batch = data[number]
        assert (batch.num_images, batch.num_pairs, batch.num_texts) == (2, 1, 2)
        assert batch.images is not None
        greys += [round(float(image.mean() + 1) * 12.75) for image in batch.images[:2]]
        assert batch.hidden_patches is not None
        per_image = batch.hidden_patches.sum(1).tolist()
        seen = [int(own[0]) for own in batch.codes.split(per_image)]
        assert seen[:2] == greys[-2:], "codes belong to their images"
        word = first_words(batch)[0]
        assert seen[2] == word - 10, "an image goes with its own text"
        texts += [own - 10 for own in first_words(batch)[1:]]
    for listed, count in ((greys, IMAGES), (texts, TEXTS)):
        epochs = [listed[i : i + count] for i in range(0, len(listed) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1, "each epoch has its own order"


def test_a_batch_follows_from_its_number(sources: dict[str, Path]) -> None:
    data = mixed(sources)
    backwards = [data[number] for number in reversed(range(6))][::-1]
    fresh = mixed(sources)
    assert all(same(fresh[number], batch) for number, batch in enumerate(backwards))
    assert not same(mixed(sources, seed=1)[0], backwards[0])
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=None, sampler=range(6), num_workers=workers)  # type: ignore[arg-type]
        assert all(same(own, batch) for own, batch in zip(loader, backwards, strict=True))


def test_a_sample_is_masked_anew_in_each_epoch(sources: dict[str, Path]) -> None:
    data = mixed(sources, mix=Mix(text=TEXTS), masking=Masking(text=0.5))
    masks: dict[int, set[tuple[bool, ...]]] = {}
    for epoch in range(6):
        batch = data[epoch]
        assert batch.tokens is not None
        assert batch.hidden_words is not None
        whole = batch.tokens.masked_scatter(batch.hidden_words, batch.words)
        texts = (own.split(batch.text_lengths) for own in (whole, batch.hidden_words))
        for text, hidden in zip(*texts, strict=True):
            assert int(hidden.sum()) == 3
            masks.setdefault(int(text[1]), set()).add(tuple(hidden.tolist()))
    assert sorted(masks) == [10 + number for number in range(TEXTS)]
    assert all(len(own) > 2 for own in masks.values())


def test_views_are_drawn_anew_and_change_no_mask(sources: dict[str, Path]) -> None:
    plain, other = (
        mixed(sources, mix=Mix(pair=IMAGES), augment=own) for own in (None, Augment(jitter=0.4))
    )
    assert same(other[1], other[1])
    images = [other[epoch].images for epoch in range(2)]
    greys = [sorted(own.mean((1, 2, 3)).tolist()) for own in images if own is not None]
    assert greys[0] != greys[1]
    for epoch in range(2):
        a, b = plain[epoch], other[epoch]
        assert torch.equal(a.tokens, b.tokens)  # type: ignore[arg-type]
        assert torch.equal(a.hidden_patches, b.hidden_patches)  # type: ignore[arg-type]
        assert not torch.equal(a.images, b.images)  # type: ignore[arg-type]


def test_what_a_run_is_made_of(sources: dict[str, Path]) -> None:
    own = mixed(sources).identity
    assert mixed(sources).identity == own
    for changes in (
        {"seed": 1},
        {"mix": Mix(image=1, text=2, pair=1)},
        {"masking": Masking(text=0.2)},
        {"patch_size": 8},
        {"augment": Augment(flip=0.5)},
        {"processor": Processor(tiny_sentencepiece_bytes(model_type="bpe"), image_size=PIXELS)},
    ):
        assert mixed(sources, **changes).identity != own


def test_sources_that_do_not_fit(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mix has samples of kind 'pair', but sources has none"):
        mixed({kind: path for kind, path in sources.items() if kind != "pair"})
    with pytest.raises(ConfigError, match="need a processor with a tokenizer"):
        mixed(sources, processor=Processor(image_size=PIXELS))
    with pytest.raises(ConfigError, match="images need visual_tokens"):
        mixed(sources, visual_tokens=None)
    with pytest.raises(ConfigError, match=r"one of them above it, got \[0, 0, 0\]"):
        Mix()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"image_path": "a.png"}\n{"image_path": 3}\n')
    with pytest.raises(InputError, match=r"line 2 of '.*broken.jsonl' .*expected \"image_path\""):
        read_index(broken, "image")
    with pytest.raises(InputError, match="cannot be read"):
        read_index(tmp_path / "absent.jsonl", "text")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_where_json_lines_do(end: str, tmp_path: Path) -> None:
    texts = ["one\u2028line", "next\x85line"]
    lines = [json.dumps({"text_segment": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "index.jsonl").write_bytes(end.join([*lines, "", lines[0]]).encode())
    read = read_index(tmp_path / "index.jsonl", "text")
    assert [row.text for row in read] == [texts[0], texts[1], texts[0]]


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text('{"text_segment": "a cup"}\n', encoding="utf-8-sig")
    assert [row.text for row in read_index(tmp_path / "index.jsonl", "text")] == ["a cup"]


def test_patch_codes_name_the_nearest_patch() -> None:
    draw = torch.Generator().manual_seed(0)
    colours = torch.randn(6, 3, 1, 1, generator=draw)
    which = torch.randint(0, 6, (9, 16), generator=draw)
    images = colours[which].view(9, 4, 4, 3, 1, 1).permute(0, 3, 1, 4, 2, 5)
    images = images.expand(-1, -1, -1, 4, -1, 4).reshape(9, 3, 16, 16)
    images = images + 0.01 * torch.randn(images.shape, generator=draw)
    codes = PatchCodes.fit(list(images), 6, 4)
    own = codes(images)
    assert own.shape == (9, 16)
    assert own.dtype == torch.int64
    pairs = set(zip(which.flatten().tolist(), own.flatten().tolist(), strict=True))
    assert len(pairs) == len({code for _, code in pairs}) == 6, "one code for one colour"
    again = PatchCodes.fit(list(images), 6, 4)
    assert torch.equal(again.centres, codes.centres)
    with pytest.raises(ConfigError, match="num_codes must be at most 16"):
        PatchCodes.fit([images[0]], 17, 4)
    with pytest.raises(ShapeError, match=r"multiples of 4, got \[1, 3, 15, 16\]"):
        codes(torch.zeros(1, 3, 15, 16))
