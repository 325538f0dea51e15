"""Parquet: the rows and names of the safetensors files, and the same restart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from embed_cases import Data

import beit3_fast
from beit3_fast.embed.shards import write_shard
from beit3_fast.errors import CheckpointError, ConfigError
from beit3_fast.retrieval import EmbeddingIndex
from beit3_fast.retrieval.origin import Origin

ORIGIN = Origin("pooled image", torch.zeros(2), torch.zeros(2))


@pytest.fixture
def embed(model: Any, processor: Any, data: Data) -> Any:
    def call(folder: Path, **options: Any) -> Any:
        settings = {"processor": processor, "workers": 0, "batch_size": 2, "shard_size": 3}
        return beit3_fast.embed_dataset(
            model, [data.folder, data.tar], folder, **(settings | options)
        )

    return call


def test_the_rows_of_safetensors(embed: Any, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    plain = embed(tmp_path / "safetensors")
    report = embed(tmp_path / "parquet", format="parquet")
    assert (report.embedded, report.skipped) == (plain.embedded, plain.skipped) == (12, 2)
    assert [path.suffix for path in report.shards] == [".parquet"] * 5
    for found, expected in zip(report.shards, plain.shards, strict=True):
        index, table = EmbeddingIndex.load(expected, "torch"), parquet.read_table(found)
        assert table.column_names == ["name", "embedding"]
        assert table["name"].to_pylist() == index.names
        rows = torch.tensor(table["embedding"].to_pylist(), dtype=torch.float32)
        assert torch.equal(rows, index.embeddings)
        kind = table.schema.field("embedding").type
        assert (str(kind.value_type), kind.list_size) == ("float", 64)


def test_it_goes_on_where_it_stopped(
    embed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    embed(tmp_path / "whole", format="parquet")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        def write(folder: Path, number: int, *rest: Any) -> Any:
            if number == 2:
                raise KeyboardInterrupt
            return write_shard(folder, number, *rest)

        patch.setattr("beit3_fast.embed.work.write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            embed(out, format="parquet")
    with pytest.raises(ConfigError, match="another job, of another format"):
        embed(out)
    (out / "000001.parquet").write_bytes(b"cut")
    assert embed(out, format="parquet").resumed == 3
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(CheckpointError, match=r"000000\.parquet"):
        EmbeddingIndex.load(out / "000000.parquet")


def test_names_that_are_no_utf8_and_a_shard_without_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    write_shard(tmp_path, 0, "parquet", torch.ones(1, 2), ["a\udcff.png"], [], ORIGIN)
    assert parquet.read_table(tmp_path / "000000.parquet")["name"].to_pylist() == ["a\\udcff.png"]
    write_shard(
        tmp_path, 1, "parquet", torch.empty(0, 2), [], [{"name": "x", "reason": "y"}], ORIGIN
    )
    assert parquet.read_table(tmp_path / "000001.parquet").num_rows == 0
    assert (tmp_path / "000001.skipped.jsonl").exists()


def test_a_shard_made_again_without_a_fault_keeps_no_list_of_faults(tmp_path: Path) -> None:
    listed = tmp_path / "000000.skipped.jsonl"
    for faults in ([{"name": "x", "reason": "y"}], []):
        write_shard(tmp_path, 0, "safetensors", torch.ones(1, 2), ["a"], faults, ORIGIN)
        assert listed.exists() == bool(faults)


def test_without_pyarrow(embed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow.* pip install pyarrow, or use format="):
        embed(tmp_path / "out", format="parquet")
    with pytest.raises(ConfigError, match=r"format must be one of .*, got 'csv'"):
        embed(tmp_path / "out", format="csv")
    assert not list(tmp_path.iterdir())
