"""A folder of embeddings as one index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from embed_cases import Data

import beit3_fast
from beit3_fast.embed import EmbedReport, load_embeddings
from beit3_fast.errors import CheckpointError, ConfigError
from beit3_fast.retrieval import EmbeddingIndex


@pytest.fixture
def embed(model: Any, processor: Any, data: Data, tmp_path: Path) -> Any:
    def call(**options: Any) -> EmbedReport:
        photos = [data.folder / f"{number}.png" for number in range(6)]
        options = {"processor": processor, "workers": 0, "shard_size": 2} | options
        return beit3_fast.embed_dataset(model, photos, tmp_path, **options)

    return call


def test_all_shards_in_their_order(embed: Any, model: Any, tmp_path: Path) -> None:
    shards = [EmbeddingIndex.load(path, "torch") for path in embed().shards]
    assert [len(shard) for shard in shards] == [2, 2, 2]
    whole = beit3_fast.load_embeddings(tmp_path, "torch")
    assert whole.names == [name for shard in shards for name in shard.names]
    assert torch.equal(whole.embeddings, torch.cat([shard.embeddings for shard in shards]))
    assert whole.backend == "torch"
    whole.check_model(model)
    for place, name in enumerate(whole.names):
        assert whole.search(whole.embeddings[place], 1)[0][0].name == name


def test_what_is_no_whole_folder(embed: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no manifest\.json; name such a folder"):
        load_embeddings(tmp_path)
    with pytest.raises(CheckpointError, match="expected the path of a folder, got 3"):
        load_embeddings(3)  # type: ignore[arg-type]
    embed()
    with pytest.raises(ConfigError, match="backend must be one of"):
        load_embeddings(tmp_path, "other")
    shard, manifest = tmp_path / "000001.safetensors", tmp_path / "manifest.json"
    whole, said = shard.read_bytes(), json.loads(manifest.read_text())
    for damage in (whole[:-1], None):
        shard.unlink() if damage is None else shard.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"1 of 3 shards are not finished; call embed"):
            load_embeddings(tmp_path)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"000001\.safetensors is damaged; delete it and call"
    ):
        load_embeddings(tmp_path)
    shard.write_bytes(whole)
    for change in (
        lambda own: own["shards"].pop("2"),
        lambda own: own["job"].update(items=7),
    ):
        changed = json.loads(json.dumps(said))
        change(changed)
        manifest.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="shards are not finished"):
            load_embeddings(tmp_path)
    for name in ("items", "shard_size"):
        for value in (0, "6", None):
            manifest.write_text(json.dumps(said | {"job": said["job"] | {name: value}}))
            with pytest.raises(CheckpointError, match="its job is not described as expected"):
                load_embeddings(tmp_path)


def test_parquet_is_not_searched(embed: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    embed(format="parquet")
    with pytest.raises(CheckpointError, match="in 'parquet', which is not searched; embed with"):
        load_embeddings(tmp_path)
