"""The index: what it finds, what it keeps, and what it refuses."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from beit3_fast import EmbeddingIndex
from beit3_fast.errors import Beit3FastError, CheckpointError, ConfigError
from beit3_fast.model import create_model
from beit3_fast.retrieval import index as index_module

ROWS = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
NAMES = [f"photo {i} é.jpg" for i in range(50)]
QUERIES = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))


class FakeFlat:
    """FAISS's exact index, as far as it is used here."""

    def __init__(self, width: int) -> None:
        self.rows = np.zeros((0, width), np.float32)

    def add(self, rows: np.ndarray) -> None:
        assert rows.dtype == np.float32
        self.rows = np.concatenate([self.rows, rows])

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ self.rows.T
        places = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(scores, places, axis=1), places


@pytest.fixture(params=["torch", "faiss"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """PyTorch, and FAISS itself or what stands for it where it is not installed."""
    if request.param == "faiss":
        try:
            import faiss  # noqa: F401
        except Exception:
            fake = ModuleType("faiss")
            fake.IndexFlatIP = FakeFlat  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "faiss", fake)
    return str(request.param)


def test_the_nearest_first(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_SCORES_AT_ONCE", 100)
    index = EmbeddingIndex(ROWS, NAMES, backend)
    assert index.backend == backend
    assert len(index) == 50
    scores = torch.cosine_similarity(QUERIES[:, None], ROWS[None], dim=2)
    for own, expected in zip(index.search(QUERIES, 5), scores, strict=True):
        order = expected.argsort(descending=True)[:5].tolist()
        assert [hit.name for hit in own] == [NAMES[i] for i in order]
        assert [hit.score for hit in own] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert index.search(QUERIES[0], 3) == index.search(QUERIES[:1], 3)
    assert len(index.search(QUERIES[0], 99)[0]) == 50


def test_autocast_rounds_nothing(backend: str) -> None:
    index = EmbeddingIndex(ROWS, NAMES, backend)
    expected = index.search(QUERIES, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert EmbeddingIndex(ROWS, NAMES, backend).search(QUERIES, 5) == expected


def test_two_threads_search_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeFlat):
        def add(self, rows: np.ndarray) -> None:
            time.sleep(0.2)
            super().add(rows)

    fake = ModuleType("faiss")
    fake.IndexFlatIP = Slow  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faiss", fake)
    index = EmbeddingIndex(ROWS, NAMES, "faiss")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(index.search, QUERIES, 5)
        time.sleep(0.05)
        assert index.search(QUERIES, 5) == first.result()


def test_adding_and_keeping(backend: str, tmp_path: Path) -> None:
    index = EmbeddingIndex(ROWS[:20], NAMES[:20], backend)
    index.search(QUERIES, 1)
    index.add(ROWS[20:], NAMES[20:])
    whole = EmbeddingIndex(ROWS, NAMES, backend)
    assert index.search(QUERIES, 9) == whole.search(QUERIES, 9)
    path = index.save(tmp_path / "photos.index")
    again = EmbeddingIndex.load(path, backend)
    assert again.names == NAMES
    assert torch.equal(again.embeddings, ROWS)
    assert again.search(QUERIES, 9) == whole.search(QUERIES, 9)


def test_an_index_of_nothing(backend: str, tmp_path: Path) -> None:
    index = EmbeddingIndex(ROWS[:0], [], backend)
    assert index.search(QUERIES) == [[] for _ in QUERIES]
    assert len(EmbeddingIndex.load(index.save(tmp_path / "none.index"))) == 0


def test_images_and_texts(model: Any, processor: Any, photos: Any, tmp_path: Path) -> None:
    from PIL import Image

    paths = []
    for i, photo in enumerate(photos):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(photo).save(paths[-1])
    index = EmbeddingIndex.build(model, paths, processor=processor, backend="torch")
    assert index.names == [str(path) for path in paths]
    named = EmbeddingIndex.build(model, photos, list("abcd"), processor=processor, batch_size=3)
    assert torch.allclose(index.embeddings, named.embeddings, atol=1e-6)
    for i, hits in enumerate(named.search(model.encode_image(photos, processor=processor), 1)):
        assert hits[0].name == "abcd"[i]
        assert hits[0].score == pytest.approx(1.0, abs=1e-5)
    words = ["A cat with big green eyes", "A red cup of coffee"]
    embedded = model.encode_text(words, processor=processor)
    assert named.search_text(model, words, 3, processor=processor) == named.search(embedded, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, []), "embeddings must be a tensor .* got NoneType"),
        ((ROWS[0], ["a"]), r"embeddings must be a tensor \[M, C\], .* got \[8\]"),
        ((ROWS[:2], ["a"]), "got 2 embeddings and 1 names"),
        ((ROWS[:1], "a"), "names must be a list of str, got 'a'"),
        ((ROWS[:1], [1]), r"names must be a list of str, got \[1\]"),
        ((ROWS[:1] * float("nan"), ["a"]), "embeddings must be finite"),
        ((ROWS[:1].double() * 1e300, ["a"]), "embeddings must be finite"),
        (
            (ROWS[:1].to(torch.complex64), ["a"]),
            "embeddings must be real numbers, got torch.complex64",
        ),
        (
            (ROWS[:1, :0], ["a"]),
            r"embeddings must be a tensor \[M, C\], C at least 1, got \[1, 0\]",
        ),
        ((ROWS[:1], ["a"], "annoy"), "backend must be one of.*'annoy'"),
    ],
)
def test_bad_entries(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        EmbeddingIndex(*arguments)


def test_bad_calls(model: Any, processor: Any, photos: Any) -> None:
    index = EmbeddingIndex(ROWS, NAMES, "torch")
    for call, message in (
        (lambda: index.search(None), "queries must be a tensor .* got NoneType"),
        (lambda: index.search(ROWS[:, :4]), r"queries must be \[Q, 8\] .* got \[50, 4\]"),
        (lambda: index.search(torch.ones(0)), r"queries must be \[Q, 8\] .* got \[0\]"),
        (lambda: index.search(torch.ones(())), r"queries must be \[Q, 8\] .* got \[\]"),
        (
            lambda: index.search(ROWS.to(torch.complex64)),
            "queries must be real numbers, got torch.c",
        ),
        (
            lambda: index.search(ROWS * torch.nan),
            "queries must be finite, 50 of its 50 rows are not",
        ),
        (lambda: index.search(ROWS * torch.inf), "queries must be finite"),
        (lambda: index.search(torch.zeros(8)), "a query of zeros has no direction"),
        (lambda: index.search(ROWS, 0), "top_k must be a positive integer, got 0"),
        (lambda: index.add(ROWS[:, :4], NAMES), "width 8, got 4"),
        (lambda: index.search_text(None, "a"), "a retrieval model.*got NoneType"),
        (lambda: EmbeddingIndex.build(model, photos), "images without paths need names"),
        (lambda: EmbeddingIndex.build(create_model("beit3_tiny_patch16_32"), ["a"]), "got BEiT3;"),
        (
            lambda: EmbeddingIndex.build(model, ["missing.jpg"], processor=processor),
            "missing.jpg",
        ),
    ):
        with pytest.raises(Beit3FastError, match=message):
            call()


def test_faiss_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "faiss":
                raise RuntimeError("built for another numpy")

    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert EmbeddingIndex(ROWS, NAMES).backend == "torch"
    with pytest.raises(Beit3FastError, match=r"built for another numpy.*pip install faiss-cpu"):
        EmbeddingIndex(ROWS, NAMES, "faiss")


def test_files_that_are_no_index(tmp_path: Path) -> None:
    from beit3_fast import save_checkpoint

    path = EmbeddingIndex(ROWS, NAMES).save(tmp_path / "photos.index")
    whole = path.read_bytes()
    (tmp_path / "short").write_bytes(whole[:4])
    (tmp_path / "cut").write_bytes(whole[:-3])
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    save_checkpoint(create_model("beit3_tiny_patch16_32"), tmp_path / "model.safetensors")
    for name, message in {
        "short": "no index; make one with",
        "cut": "cut off",
        "flipped": "damaged",
        "model.safetensors": "no index; make one with",
        "missing": "cannot be read.*make an index",
        "": "is a folder; beit3_fast.load_embeddings",
    }.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            EmbeddingIndex.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ConfigError, match="backend must be one of"):
        EmbeddingIndex.load(path, "other")
    for value in (None, 3):
        with pytest.raises(CheckpointError, match="expected the path of an index"):
            EmbeddingIndex.load(value)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="folder"):
        EmbeddingIndex(ROWS, NAMES).save(tmp_path / "no" / "photos.index")
