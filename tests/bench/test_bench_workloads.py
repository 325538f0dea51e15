"""Names, real inputs, and what they become."""

from __future__ import annotations

import pytest
import torch

from beit3_fast.errors import ConfigError, InputError
from bench import inputs, workloads
from bench.baselines import build_reference, fill, our_entrypoint, parse_runtimes
from bench.inputs import SCENES, photo_batch, text_batch, words_to_ids
from bench.torchscale_heads import MODELS
from bench.workloads import TASKS, move, parse_workload


def test_names_round_trip_and_tell_models_apart() -> None:
    for name in workloads.FULL:
        assert parse_workload(name).name == name
    keys = {parse_workload(n).model_key for n in ("image/base/224", "pair/base/224")}
    assert keys == {("backbone", "base", 224)}
    assert not parse_workload("vqa/base/480").config.normalize_output
    assert parse_workload("pair/base/480").config.normalize_output


@pytest.mark.parametrize(
    "name", ["", "pair", "pair/base", "pair/base/x", "pair/huge/224", "walk/base/224", "a/b/c/d"]
)
def test_unknown_workloads_name_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"retrieval-text.*tiny, base, large.*pair/base/224"):
        parse_workload(name)


def test_resolution_must_fit_the_patches() -> None:
    with pytest.raises(ConfigError, match="multiple of the patch size 16"):
        parse_workload("pair/base/225")


def test_unknown_runtimes_name_the_known_ones() -> None:
    assert parse_runtimes(["torchscale", "torchscale"]) == ["torchscale"]
    assert {"beit3_fast", "torchscale", "timm", "openvino"} <= set(parse_runtimes(None))
    assert "beit3_fast-reference" not in parse_runtimes(None)
    with pytest.raises(ConfigError, match="'tensorrt'; there are: beit3_fast, "):
        parse_runtimes(["tensorrt"])


def test_captions_are_ragged_from_8_to_32_tokens() -> None:
    lengths = [len(words_to_ids(scene.caption, 64010)) for scene in SCENES]
    assert (min(lengths), max(lengths)) == (8, 32)
    assert (min(lengths[:8]), max(lengths[:8])) == (8, 32)
    assert len(set(lengths[:8])) == 8
    assert 12 < lengths[0] < 24


def test_ids_are_fixed_and_inside_the_vocabulary() -> None:
    ids, padding = text_batch([s.caption for s in SCENES], 64010)
    assert ids.dtype == torch.int64
    assert bool((ids[:, 0] == inputs.BOS).all())
    assert int(ids.max()) < 64001
    assert torch.equal(ids == inputs.PAD, padding)
    assert [int(row[~p][-1]) for row, p in zip(ids, padding, strict=True)] == [2] * len(SCENES)
    assert words_to_ids("A cat, a Cat.", 64010)[1] == words_to_ids("a", 64010)[1]
    assert words_to_ids("cat", 64010) == words_to_ids("cat", 64010)
    assert len(set(ids[~padding].tolist())) > 80
    small = words_to_ids(SCENES[1].caption, 100)
    assert min(small[1:-1]) >= 4
    assert max(small) < 90


def test_photographs_are_real_different_and_normalised() -> None:
    photos = photo_batch(list(range(2 * len(SCENES))), 32)
    assert photos.shape == (2 * len(SCENES), 3, 32, 32)
    assert float(photos.min()) >= -1
    assert float(photos.max()) <= 1
    assert float(photos.flatten(1).std(1).min()) > 0.05
    distances = torch.cdist(photos.flatten(1), photos.flatten(1))
    assert float(distances.fill_diagonal_(1e9).min()) > 0.5


def test_missing_photographs_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    inputs._pixels.cache_clear()
    with pytest.raises(InputError, match="pip install scikit-image"):
        photo_batch([0], 32)
    inputs._pixels.cache_clear()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_inputs_work_and_a_model_of_ours(task: str) -> None:
    workload = parse_workload(f"{task}/tiny/32")
    batch = workload.inputs(3)
    assert workload.flops(batch) > workload.flops(workload.inputs(2))
    assert all(len(t) == 3 for t in batch.values())
    assert workload.parity_batches(8) * 8 * workload.task.values >= 64
    half = move(batch, torch.bfloat16, torch.device("cpu"))
    assert {t.dtype for t in half.values()} <= {torch.bfloat16, torch.int64, torch.bool}
    name = our_entrypoint(workload)
    assert name.startswith("beit3_tiny_patch16_")


def test_weights_depend_on_names_only_and_nothing_is_trivial() -> None:
    pair = build_reference(parse_workload("pair/tiny/32"))
    again = MODELS["backbone"](parse_workload("pair/tiny/32").config)
    fill(again)
    for name, value in pair.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert float(value.std()) > 0, name
    layer = pair.encoder.layers[0]
    assert not torch.equal(layer.ffn.A.fc1.weight, layer.ffn.B.fc1.weight)
    # The same weights, whether the backbone is alone or in a task model.
    headed = build_reference(parse_workload("vqa/tiny/32"))
    assert torch.equal(headed.beit3.text_embed.weight, pair.text_embed.weight)
