"""Embeddings with names, to be searched: exact cosines by FAISS where it is installed, by PyTorch elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast import unreadable
from beit3_fast.checkpoint import safetensors_file
from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.data import Processor
from beit3_fast.errors import CheckpointError, ConfigError, InputError, ShapeError
from beit3_fast.model.guess import check_top_k
from beit3_fast.retrieval.model import check_retrieval
from beit3_fast.retrieval.origin import Origin, origin_of
from beit3_fast.retrieval.rows import finite_rows

BACKENDS = ("auto", "faiss", "torch")
_FORMAT = "beit3_fast index 2"
# It does not say what made it.
_OLD_FORMAT = "beit3_fast index 1"
_NO_INDEX = "it is no index; make one with beit3-fast search --build"
# Scores of a block of queries are held at once.
_SCORES_AT_ONCE = 1 << 24


class Hit(NamedTuple):
    """An entry that was found, and its cosine with the query."""

    name: str
    score: float


class EmbeddingIndex:
    """``embeddings`` fp32 [M, C] on the CPU and their ``names``; images and texts of a retrieval model alike.

    ``backend`` is "faiss", "torch" or "auto" (FAISS where it imports). Both are exact; scores are cosines, whatever
    the lengths of the embeddings, which are kept as they are. ``origin`` says what made them; an index without one is
    searched with tensors only. Raises ShapeError for embeddings of another shape, InputError for names that do not fit
    them, ConfigError for a backend that is not there.
    """

    def __init__(
        self,
        embeddings: Tensor,
        names: Sequence[str],
        backend: str = "auto",
        *,
        origin: Origin | None = None,
    ) -> None:
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or not embeddings.shape[1]:
            what = (
                list(embeddings.shape)
                if isinstance(embeddings, Tensor)
                else type(embeddings).__name__
            )
            raise ShapeError(f"embeddings must be a tensor [M, C], C at least 1, got {what}")
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise InputError(f"names must be a list of str, got {names!r:.80}")
        if len(names) != len(embeddings):
            raise InputError(
                f"every embedding has one name, got {len(embeddings)} embeddings and {len(names)} names"
            )
        self.embeddings = finite_rows("embeddings", embeddings).cpu().contiguous()
        self.names = list(names)
        self.origin = origin
        self.backend, self._faiss = _backend(backend)
        self._searcher: Any = None

    @classmethod
    def build(
        cls,
        model: Any,
        images: Any,
        names: Sequence[str] | None = None,
        *,
        processor: Processor | None = None,
        batch_size: int = 32,
        backend: str = "auto",
    ) -> EmbeddingIndex:
        """An index of images (a path or a list, as for ``encode_image``), each encoded once by a retrieval model.

        Names default to the images' paths.

        Raises ConfigError for another model, InputError for an image that cannot be read or has no name.
        """
        model = check_retrieval(model)
        images = [images] if isinstance(images, (str, PathLike)) else images
        if names is None:
            if not isinstance(images, (list, tuple)) or not all(
                isinstance(image, (str, PathLike)) for image in images
            ):
                raise InputError("images without paths need names; pass names=[...]")
            names = [str(image) for image in images]
        embedded = model.encode_image(images, processor=processor, batch_size=batch_size)
        return cls(embedded, names, backend, origin=origin_of(model, "pooled image"))

    def __len__(self) -> int:
        """M."""
        return len(self.names)

    def __repr__(self) -> str:
        return f"EmbeddingIndex({len(self)} entries of width {self.embeddings.shape[1]}, {self.backend})"

    def add(self, embeddings: Tensor, names: Sequence[str]) -> None:
        """Append entries that the same model made.

        Raises ShapeError and InputError as the constructor, and for another width.
        """
        more = EmbeddingIndex(embeddings, names, "torch")
        if more.embeddings.shape[1] != self.embeddings.shape[1]:
            raise ShapeError(
                f"embeddings must have the index's width {self.embeddings.shape[1]}, "
                f"got {more.embeddings.shape[1]}"
            )
        self.embeddings = torch.cat([self.embeddings, more.embeddings])
        self.names += more.names
        self._searcher = None

    def search(self, queries: Tensor, top_k: int = 10) -> list[list[Hit]]:
        """The ``top_k`` entries nearest to each query, best first; queries [Q, C], or [C] for one.

        Raises ShapeError for queries of another width, InputError for those that are not finite or all zeros,
        ConfigError for a top_k below 1.
        """
        check_top_k(top_k)
        width = self.embeddings.shape[1]
        if not isinstance(queries, Tensor):
            raise ShapeError(f"queries must be a tensor [Q, {width}], got {type(queries).__name__}")
        if queries.dim() not in (1, 2) or queries.shape[-1] != width:
            raise ShapeError(
                f"queries must be [Q, {width}] as in the index, got {list(queries.shape)}"
            )
        rows = finite_rows("queries", queries.reshape(-1, width)).cpu()
        if not bool(rows.any(1).all()):
            raise InputError("a query of zeros has no direction, and nothing is near it")
        count = min(top_k, len(self))
        if not count or not len(rows):
            return [[] for _ in rows]
        with torch.autocast("cpu", enabled=False):
            scores, places = self._nearest(_unit(rows), count)
        return [
            [Hit(self.names[place], score) for place, score in zip(own, best, strict=True)]
            for own, best in zip(places.tolist(), scores.tolist(), strict=True)
        ]

    def search_text(
        self,
        model: Any,
        texts: str | Sequence[str],
        top_k: int = 10,
        *,
        processor: Processor | None = None,
    ) -> list[list[Hit]]:
        """``search`` with the text embeddings of the model that the index was built with, in any dtype.

        Raises what ``check_model`` raises.
        """
        self.check_model(model)
        return self.search(model.encode_text(texts, processor=processor), top_k)

    def check_model(self, model: Any) -> None:
        """Raises ConfigError for no retrieval model, InputError unless the rows can be compared with its texts and images."""
        check_retrieval(model)
        if self.origin is None:
            raise InputError(
                "the index does not say which model made it: it was made of tensors, or by an older beit3_fast; make it "
                "again (beit3-fast search --build, or embed), or search it with index.search(model.encode_text(...))"
            )
        self.origin.check_comparable(model)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write one file, whole or not at all: a safetensors file with digests. Raises CheckpointError."""
        target = _path(path)
        names = json.dumps(self.names, ensure_ascii=False).encode("utf-8", "surrogatepass")
        state = {
            "embeddings": self.embeddings,
            "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        }
        metadata = {"format": "pt", "content": _FORMAT}
        if self.origin is not None:
            metadata["rows"] = self.origin.rows
            state |= {"outside": self.origin.outside, "layers": self.origin.layers}
        try:
            with replacing(target) as file:
                safetensors_file.write(file, state, metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{target}: {error}") from error
        return target

    @classmethod
    def load(cls, path: str | PathLike[str], backend: str = "auto") -> EmbeddingIndex:
        """Read what ``save`` wrote, or one shard of ``embed_dataset``; ``load_embeddings`` reads all of a folder.

        Raises CheckpointError for another or a damaged file, ConfigError for a backend that is not there.
        """
        source = _path(path)
        if os.path.isdir(source):
            raise CheckpointError(
                f"{source} is a folder; beit3_fast.load_embeddings reads those of embed_dataset"
            )
        try:
            with source.open("rb") as file:
                size = source.stat().st_size
                if file.read(9)[8:] != b"{":
                    raise CheckpointError(_NO_INDEX)
                state, metadata = safetensors_file.read(file, size, verify=True)
            origin = None
            if "rows" in metadata and {"outside", "layers"} <= set(state):
                origin = Origin(metadata["rows"], state.pop("outside"), state.pop("layers"))
            if metadata.get("content") not in (_FORMAT, _OLD_FORMAT) or set(state) != {
                "embeddings",
                "names",
            }:
                raise CheckpointError(_NO_INDEX)
            names = json.loads(state["names"].numpy().tobytes().decode("utf-8", "surrogatepass"))
            return cls(state["embeddings"], names, backend, origin=origin)
        except ConfigError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"{source}: cannot be read: {unreadable.why(error)}, or make an index with beit3-fast search --build"
            ) from error
        except (CheckpointError, InputError, ShapeError, ValueError) as error:
            raise CheckpointError(f"{source}: {error}") from error

    def _nearest(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The best cosines with unit rows [Q, C], and their places."""
        if self._faiss is not None:
            if self._searcher is None:
                # whole before another thread sees it
                searcher = self._faiss.IndexFlatIP(rows.shape[1])
                searcher.add(_unit(self.embeddings).numpy())
                self._searcher = searcher
            scores, places = self._searcher.search(rows.numpy(), count)
            return torch.from_numpy(scores), torch.from_numpy(places)
        if self._searcher is None:
            self._searcher = _unit(self.embeddings)
        step = max(1, _SCORES_AT_ONCE // len(self))
        parts = [
            (rows[start : start + step] @ self._searcher.T).topk(count, dim=1)
            for start in range(0, len(rows), step)
        ]
        return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay so."""
    # squares of very large or small numbers are not in fp32
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return F.normalize(rows / largest, dim=1).contiguous()


def _backend(wanted: str) -> tuple[str, Any]:
    if wanted not in BACKENDS:
        raise ConfigError(f"backend must be one of {list(BACKENDS)}, got {wanted!r}")
    if wanted == "torch":
        return "torch", None
    try:
        import faiss
    # A package that was built for another numpy fails in ways of its own.
    except Exception as error:
        if wanted == "faiss":
            raise ConfigError(
                f"backend='faiss' was asked for, but it does not import ({error}); pip install faiss-cpu, or use "
                "backend='torch'"
            ) from error
        return "torch", None
    return "faiss", faiss


def _path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError as error:
        raise CheckpointError(f"expected the path of an index, got {path!r:.80}") from error
