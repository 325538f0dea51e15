"""An index knows what made it, and is searched by nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit3_fast import EmbeddingIndex, embed_dataset, save_checkpoint
from beit3_fast.checkpoint import safetensors_file
from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.errors import InputError
from beit3_fast.model import create_model

NAME = "beit3_tiny_patch16_32_retrieval"
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"inference_only": True},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "inference_only": True},
    {"dtype": "float16"},
    {"dtype": "int8"},
    {"dtype": "float8"},
)


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("origin") / "retrieval.safetensors"
    save_checkpoint(model, path)
    return path


def changed(model: Any, part: str) -> Any:
    """The model with one weight that is 1 % larger."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(part).mul_(1.01)
    return other


@pytest.mark.parametrize("built", OPTIONS)
def test_a_checkpoint_in_every_dtype(
    checkpoint: Path, processor: Any, photos: Any, built: dict[str, Any]
) -> None:
    index = EmbeddingIndex.build(
        create_model(NAME, checkpoint, **built), photos, list("abcd"), processor=processor
    )
    for searched in OPTIONS:
        model = create_model(NAME, checkpoint, **searched)
        assert len(index.search_text(model, "a cat", 3, processor=processor)[0]) == 3


@pytest.mark.parametrize(
    "part",
    ["vision_head.weight", "beit3.encoder.layers.1.ffn.A.fc1.weight", "beit3.text_embed.weight"],
)
def test_another_checkpoint_is_refused(
    model: Any, processor: Any, photos: Any, part: str, tmp_path: Path
) -> None:
    index = EmbeddingIndex.build(changed(model, part), photos, list("abcd"), processor=processor)
    again = EmbeddingIndex.load(index.save(tmp_path / "photos.index"))
    for own in (index, again):
        with pytest.raises(InputError, match=r"made by another model or checkpoint.*make it again"):
            own.search_text(model, "a cat", processor=processor)
    assert again.search_text(changed(model, part), "a cat", processor=processor)


def test_a_model_that_was_trained_on_is_another(model: Any, processor: Any, photos: Any) -> None:
    own = copy.deepcopy(model)
    index = EmbeddingIndex.build(own, photos, list("abcd"), processor=processor)
    assert index.search_text(own, "a cat", processor=processor)
    with torch.no_grad():
        own.language_head.weight.add_(0.1)
    with pytest.raises(InputError, match="another model or checkpoint"):
        index.search_text(own, "a cat", processor=processor)


def test_an_index_that_does_not_say(
    model: Any, processor: Any, photos: Any, tmp_path: Path
) -> None:
    embedded = model.encode_image(photos, processor=processor)
    names = torch.frombuffer(bytearray(json.dumps(list("abcd")).encode()), dtype=torch.uint8)
    with replacing(tmp_path / "old.index") as file:
        safetensors_file.write(
            file, {"embeddings": embedded, "names": names}, {"content": "beit3_fast index 1"}
        )
    old = EmbeddingIndex.load(tmp_path / "old.index")
    made = EmbeddingIndex(embedded, list("abcd"))
    for index in (old, EmbeddingIndex.load(made.save(tmp_path / "new.index")), made):
        assert [hits[0].name for hits in index.search(embedded, 1)] == list("abcd")
        with pytest.raises(InputError, match=r"does not say which model.*search --build"):
            index.search_text(model, "a cat", processor=processor)


@pytest.mark.parametrize(("kind", "output"), [("image", "cls"), ("pair", "pooled")])
def test_rows_of_another_space(
    model: Any, processor: Any, photos: Any, kind: str, output: str, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, photo in zip(paths, photos, strict=True):
        Image.fromarray(photo).save(path)
    lines = [{"image_path": path.name, "text_segment": [5, 7]} for path in paths]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = tmp_path / "pairs.jsonl" if kind == "pair" else paths
    report = embed_dataset(
        model, source, tmp_path / "out", kind, output, processor=processor, workers=0
    )
    index = EmbeddingIndex.load(report.shards[0])
    with pytest.raises(InputError, match=f"holds {output} {kind} embeddings.*--output pooled"):
        index.search_text(model, "a cat", processor=processor)


def test_texts_are_searched_by_texts(model: Any, processor: Any, tmp_path: Path) -> None:
    texts = {"cat.txt": "a cat", "cup.txt": "a red cup"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [tmp_path / name for name in texts]
    report = embed_dataset(model, paths, tmp_path / "out", "text", processor=processor, workers=0)
    index = EmbeddingIndex.load(report.shards[0])
    hit, _ = index.search_text(model, "a red cup", processor=processor)[0]
    assert hit.name == str(tmp_path / "cup.txt")
    assert hit.score == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_scores_are_cosines_of_rows_of_any_length(scale: float) -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((20, 8)) * 10.0 ** np.linspace(-3, 3, 20)[:, None]
    queries = generator.standard_normal((5, 8))
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, rows)]
    cosines = units[0] @ units[1].T
    index = EmbeddingIndex(torch.tensor(rows * scale), [str(i) for i in range(20)], "torch")
    for hits, expected in zip(index.search(torch.tensor(queries / scale), 3), cosines, strict=True):
        order = np.argsort(-expected)[:3]
        assert [int(hit.name) for hit in hits] == order.tolist()
        assert [hit.score for hit in hits] == pytest.approx(expected[order], abs=1e-6)
