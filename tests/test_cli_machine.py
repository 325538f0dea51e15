"""``verify`` and ``bench``: the commands that speak of this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _compat import fill, import_torchscale, need_torchscale

import beit3_fast
from beit3_fast import cli
from beit3_fast.integrations import torchscale_models, verification
from beit3_fast.model import create_model

SUFFIXES = ("", "_retrieval", "_captioning", "_vqav2", "_nlvr2", "_imageclassification")


@pytest.fixture
def torchscale() -> None:
    need_torchscale()
    import_torchscale()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for suffix in SUFFIXES:
        model = create_model(f"beit3_tiny_patch16_32{suffix}")
        fill(model)
        beit3_fast.save_checkpoint(model, folder / f"tiny{suffix}.safetensors")
    torch.save({"model": model.state_dict()}, folder / "classes.pth")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_the_same_here_and_on_torchscale(
    suffix: str, dtype: str, folder: Path, capsys: pytest.CaptureFixture[str], torchscale: None
) -> None:
    path = str(folder / f"tiny{suffix}.safetensors")
    code, out, err = run(capsys, "verify", path, "--dtype", dtype, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["passed"] is True
    assert report["model"] == f"beit3_tiny_patch16_32{suffix}"
    state = beit3_fast.create_model(report["model"]).state_dict()
    assert report["weights"] == {"compared": len(state), "changed": [], "interpolated": []}
    assert report["outputs"]
    for own in report["outputs"]:
        assert 0 < own["max_abs"] <= own["max_abs_limit"]
        assert own["passed"] is True
        if dtype == "float32":
            assert own["rel_rms_limit"] is None
            assert own["max_abs_limit"] < 1e-4
        else:
            assert 0 < own["rel_rms"] <= own["rel_rms_limit"]
            assert own["baseline_rel_rms"] > 1e-4


def test_the_verdict_for_people(
    folder: Path, capsys: pytest.CaptureFixture[str], torchscale: None
) -> None:
    name = "beit3_tiny_patch16_32_imageclassification"
    code, out, _ = run(capsys, "verify", str(folder / "classes.pth"), "--model", name)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{name} in float32 on cpu, against torchscale ")
    assert lines[1] == "weights: 91 of 91 are those of the file, bit for bit"
    assert lines[2].startswith("logits: largest error ")
    assert lines[-1] == "verdict: the same up to rounding"


def test_what_is_not_the_same_is_seen(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    torchscale: None,
) -> None:
    path = str(folder / "tiny_retrieval.safetensors")
    with monkeypatch.context() as patch:

        def nearly(*arguments: Any, **options: Any) -> Any:
            model = create_model(*arguments, **options)
            model.beit3.encoder.layer_norm.A.weight.mul_(1 + 1e-3)
            return model

        patch.setattr(verification, "create_model", nearly)
        code, out, err = run(capsys, "verify", path)
        assert (code, err) == (3, "")
        assert "weights: 93 of 94 are those of the file" in out
        assert "others: beit3.encoder.layer_norm.A.weight" in out
        assert "image embeddings: " in out
        assert out.count("WRONG: largest error") == 1
        assert "verdict: NOT the same" in out
    compare = verification._compare_weights
    monkeypatch.setattr(
        verification, "_compare_weights", lambda *given: (compare(*given)[0], ("one",))
    )
    code, out, _ = run(capsys, "verify", path, "--json")
    assert code == 3
    assert json.loads(out)["passed"] is False


def test_positions_of_another_image_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], torchscale: None
) -> None:
    model = create_model("beit3_tiny_patch16_32_retrieval", img_size=64)
    fill(model)
    path = tmp_path / "64.pth"
    torch.save({"model": model.state_dict()}, path)
    name = "beit3_tiny_patch16_32_retrieval"
    code, out, _ = run(capsys, "verify", str(path), "--model", name)
    assert code == 0
    assert "weights: 93 of 93 are" in out
    assert "interpolated to this image size: beit3.encoder.embed_positions.A.weight" in out


def test_verify_refuses_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], torchscale: None
) -> None:
    path = str(folder / "tiny_retrieval.safetensors")
    classes = str(folder / "classes.pth")
    for arguments, message in (
        ((path, "--dtype", "int8"), "dtype must be one of"),
        ((path, "--dtype", "x"), "which torchscale has, got 'x'"),
        ((path, "--model", "beit3_tiny_retrieval"), "did you mean beit3_tiny_patch16_32_retrieval"),
        ((path, "--model", "beit3_tiny_patch16_32_nlvr2"), "missing: head.norm1"),
        ((path, "--model", "beit3_tiny_patch16_32_pretraining"), "no pretraining to compare"),
        ((path, "--num-classes", "3"), "has no classes"),
        ((path, "--device", "cuda:99"), "is not there"),
        ((path, "--impl", "x"), "impl must be"),
        ((classes,), "does not say which model it is of; name the model"),
        (("missing.pth",), "missing.pth"),
    ):
        code, out, err = run(capsys, "verify", *arguments)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert message in err


@pytest.mark.parametrize("arguments", [(), ("x.pth", "--kernels"), ("x.pth", "--samples", "0")])
def test_wrong_usage_of_verify(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", *arguments])
    assert caught.value.code == 2


def test_without_torchscale_or_with_one_that_does_not_import(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(folder / "tiny_retrieval.safetensors")
    torchscale_models.import_torchscale.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchscale.architecture.config", None)
        code, out, err = run(capsys, "verify", path)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert "pip install --no-deps torchscale==0.3.0" in err

        def broken(name: str) -> None:
            raise RuntimeError("operator torchvision::nms does not exist")

        patch.setattr(torchscale_models, "import_module", broken)
        _, _, err = run(capsys, "verify", path)
        assert "built for torch" in err
        assert err.count("\n") == 1


BENCH = ("bench", "--model", "beit3_tiny_patch16_32_retrieval", "--seconds", "1")


def test_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(folder / "tiny_retrieval.safetensors")
    options = ("--checkpoint", checkpoint, "--batch-size", "3", "--tokens", "5", "--json")
    code, out, err = run(capsys, *BENCH, *options)
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["input"] for row in rows] == ["image", "text", "pair"]
    for row in rows:
        assert row["rounds"] >= 3
        # the median of one is the other's, batch by batch
        found = row["samples_per_s"]["p50"] * row["latency_ms"]["p50"] / 1e3
        assert found == pytest.approx(3, rel=0.2)


def test_bench_measures_whole_batches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from beit3_fast.model.embeddings import Embeddings

    seen: list[tuple[str, list[int] | None, int | None]] = []

    def encoded(self: Any, kind: str, output: str, images: Any, texts: Any) -> Any:
        shape = None if images is None else [len(images), *images[0].shape]
        seen.append((kind, shape, None if texts is None else len(texts)))
        return torch.zeros(1)

    monkeypatch.setattr(Embeddings, "_encoded", encoded)
    code, out, _ = run(capsys, *BENCH, "--batch-size", "4")
    assert code == 0
    image = [4, 3, 32, 32]
    assert seen[:3] == [("image", image, None), ("text", None, 4), ("pair", image, 4)]
    assert len(seen) % 3 == 0
    lines = out.splitlines()
    assert lines[0].startswith("beit3_tiny_patch16_32_retrieval in float32 on cpu, ")
    assert [line.split(":")[0] for line in lines[1:]] == ["image", "text", "pair"]


def test_bench_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--tokens", "1"), "--tokens must be between 2 and"),
        (("--tokens", "99999"), "got 99999"),
        (("--model", "beit3_tiny"), "did you mean"),
        (("--checkpoint", "missing.pth"), "missing.pth"),
        (("--dtype", "x"), "dtype must be"),
        (("--device", "cuda:99"), "is not there"),
        (("--threads", "99999"), "--threads takes at most"),
        (("--batch-size", str(2**31 - 1)), "not enough memory"),
    ):
        code, out, err = run(capsys, *BENCH, *arguments)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert message in err
    for usage in (("--seconds", "0"), ("--batch-size", "x"), ("--threads", "0")):
        with pytest.raises(SystemExit) as caught:
            cli.main([*BENCH, *usage])
        assert caught.value.code == 2
