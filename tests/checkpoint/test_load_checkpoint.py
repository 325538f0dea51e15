"""What load_checkpoint promises beside the official files: names, dtypes, all or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    SHAPES,
    SMALL_BASE,
    Standin,
    branch_of,
    layout,
    model,
    same,
    snapshot,
    torch_file,
    weights,
)
from torch import Tensor, nn

from beit3_fast.checkpoint import (
    CheckpointMismatch,
    check_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from beit3_fast.errors import CheckpointError
from beit3_fast.model import create_model


@pytest.mark.parametrize(
    "content",
    [
        lambda s: s,
        lambda s: {"module": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_state": s},
        lambda s: {"model_ema": s},
        lambda s: {"state_dict": {"model": s}},
        lambda s: {"model": {f"module.{n}": t for n, t in s.items()}},
        lambda s: {"model": {f"module._orig_mod.{n}": t for n, t in s.items()}},
        lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}},
        lambda s: {n.removeprefix("beit3."): t for n, t in s.items()},
        lambda s: {"model": {n: nn.Parameter(t) for n, t in s.items()}},
        lambda s: {"model": None, "module": s},
    ],
)
def test_wrappers_and_prefixes(content: Any, tmp_path: Path) -> None:
    state = weights(SHAPES)
    target = model()
    report = load_checkpoint(target, torch_file(tmp_path / "x.pth", content(state)))
    assert same(target.state_dict(), state)
    assert len(report.loaded) == len(state)


def test_a_module_saved_with_its_metadata_loads(tmp_path: Path) -> None:
    source = Standin(SHAPES, seed=1)
    path = torch_file(tmp_path / "x.pth", source.state_dict())
    target = model()
    load_checkpoint(target, path)
    assert same(target.state_dict(), source.state_dict())


def test_names_that_meet_when_prefixes_go_are_refused() -> None:
    state = {f"beit3.{n}": t for n, t in weights({"encoder.x.weight": (2,)}).items()}
    state["encoder.x.weight"] = torch.ones(2)
    with pytest.raises(CheckpointError, match="two of its names become one"):
        load_checkpoint(Standin({"encoder.x.weight": (2,)}), state)


def test_parameters_keep_their_identity_and_notice_the_change() -> None:
    target = model()
    before = {n: (id(p), p.data_ptr(), p._version) for n, p in target.named_parameters()}
    load_checkpoint(target, weights(SHAPES))
    for name, parameter in target.named_parameters():
        identity, pointer, version = before[name]
        assert (id(parameter), parameter.data_ptr()) == (identity, pointer)
        assert parameter._version > version
        assert parameter.requires_grad


@pytest.mark.parametrize(
    "file_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_floating_dtypes_are_cast(
    file_dtype: torch.dtype, model_dtype: torch.dtype, tmp_path: Path
) -> None:
    state = weights(SHAPES, dtype=file_dtype)
    path = save_checkpoint(state, tmp_path / "x.safetensors")
    target = Standin(SHAPES, dtype=model_dtype)
    report = load_checkpoint(target, path)
    assert same(target.state_dict(), {n: t.to(model_dtype) for n, t in state.items()})
    pair = (str(file_dtype)[6:], str(model_dtype)[6:])
    assert report.casts == ({} if file_dtype == model_dtype else {pair: len(state)})


def test_integer_buffers_need_their_own_dtype() -> None:
    module = nn.BatchNorm1d(2)
    state = {n: t.clone() for n, t in module.state_dict().items()}
    state["num_batches_tracked"] += 5
    load_checkpoint(module, state)
    assert int(module.num_batches_tracked) == 5  # type: ignore[arg-type]
    with pytest.raises(CheckpointMismatch, match=r"num_batches_tracked: has dtype torch.float32"):
        load_checkpoint(module, {**state, "num_batches_tracked": torch.tensor(5.0)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "holds NaN"),
        (float("inf"), "holds infinity"),
        (-float("inf"), "holds infinity"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(value: float, message: str) -> None:
    state, target = weights(SHAPES), model()
    name = "beit3.encoder.layers.1.ffn.B.fc1.weight"
    state[name][3, 1] = value
    before = snapshot(target)
    with pytest.raises(CheckpointMismatch, match=f"{re.escape(name)}: {message}"):
        load_checkpoint(target, state)
    assert snapshot(target) == before
    load_checkpoint(target, state, allow_nonfinite=True)
    assert same(target.state_dict(), state)


def test_values_beyond_the_models_dtype_are_refused() -> None:
    state = weights(SHAPES)
    state["vision_head.weight"][0, 0] = 70_000.0
    target = Standin(SHAPES, dtype=torch.float16)
    before = snapshot(target)
    with pytest.raises(CheckpointMismatch, match=r"vision_head.weight: .* beyond 65504.*float16"):
        load_checkpoint(target, state)
    assert snapshot(target) == before
    load_checkpoint(Standin(SHAPES, dtype=torch.bfloat16), state)


def test_not_strict_reports_instead_of_raising(caplog: pytest.LogCaptureFixture) -> None:
    state, target = weights(SHAPES), model()
    before = {n: t.clone() for n, t in target.state_dict().items()}
    del state["vision_head.weight"]
    state["strange.weight"] = torch.ones(1)
    with caplog.at_level("WARNING", logger="beit3_fast"):
        report = load_checkpoint(target, state, strict=False)
    assert report.missing == ["vision_head.weight"]
    assert report.unexpected == ["strange.weight"]
    assert torch.equal(target.state_dict()["vision_head.weight"], before["vision_head.weight"])
    assert "missing: vision_head.weight" in caplog.text
    assert "unexpected: strange.weight" in caplog.text
    with pytest.raises(
        CheckpointMismatch, match=r"wrong shape: logit_scale: \[1\] in the file, \[\]"
    ):
        load_checkpoint(target, {**state, "logit_scale": torch.ones(1)}, strict=False)
    with pytest.raises(CheckpointMismatch, match="no name of the file is a name of the model"):
        load_checkpoint(target, {"strange.weight": torch.ones(1)}, strict=False)


def test_the_error_names_every_key() -> None:
    state, target = weights(SHAPES), model()
    missing = [n for n in state if "layers.0.ffn.A" in n]
    shapes = [n for n in state if "layers.1.self_attn.q_proj" in n]
    for name in missing:
        del state[name]
    for name in shapes:
        state[name] = torch.ones(3)
    state["beit3.encoder.layers.7.extra"] = torch.ones(1)
    before = snapshot(target)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(target, state)
    assert snapshot(target) == before
    report = caught.value.report
    assert set(report.missing) == set(missing)
    assert set(report.mismatched) == set(shapes)
    assert report.unexpected == ["beit3.encoder.layers.7.extra"]
    text = str(caught.value)
    for words in (
        "missing: beit3.encoder.layers.0.ffn.A.fc1.{weight,bias}, "
        "beit3.encoder.layers.0.ffn.A.fc2.{weight,bias}, "
        "beit3.encoder.layers.0.ffn.A.ffn_layernorm.{weight,bias}",
        "unexpected: beit3.encoder.layers.7.extra",
        "beit3.encoder.layers.1.self_attn.q_proj.{A,B}.weight: [3] in the file, [8, 8] in the model",
        "beit3.encoder.layers.1.self_attn.q_proj.{A,B}.bias: [3] in the file, [8] in the model",
        "left as it was",
    ):
        assert words in text


def test_prefixes_cover_whole_parts_of_names_only() -> None:
    shapes = {"head.weight": (2,), "head_norm.weight": (2,), "body.weight": (2,)}
    state = weights({"body.weight": (2,)})
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(Standin(shapes), state, allow_missing="head")
    assert caught.value.report.missing == ["head_norm.weight"]
    load_checkpoint(Standin(shapes), state, allow_missing=["head.", "head_norm.weight"])


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("head.2.weight", "vqav2"),
        ("beit3.encoder.layers.0.ffn.C.fc1.weight", "retrieval"),
        ("beit3.encoder.layer_norm.C.weight", "retrieval"),
        ("mlm_head.dense.weight", "retrieval"),
        ("beit3.encoder.output_projection.weight", "nlvr2"),
    ],
)
def test_what_no_table_knows_is_never_dropped(extra: str, kind: str) -> None:
    shapes = layout(kind, SMALL_BASE, (2, 2), 4)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(Standin(shapes), {**weights(shapes), extra: torch.ones(1)})
    assert caught.value.report.unexpected == [extra]


def test_a_head_that_the_model_has_is_never_dropped_in_part() -> None:
    shapes = layout("captioning", SMALL_BASE, (2, 2))
    state = weights(shapes)
    del shapes["mlm_head.bias"]
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(Standin(shapes), state)
    assert caught.value.report.unexpected == ["mlm_head.bias"]


@pytest.mark.parametrize(
    ("branch", "own", "other"),
    [("vision", "vision", "language"), ("text", "language", "vision")],
)
def test_half_a_retrieval_model_leaves_the_other_half(branch: str, own: str, other: str) -> None:
    shapes = branch_of(SHAPES, branch)
    shapes[f"{own}_head.weight"] = SHAPES["vision_head.weight"]
    shapes["logit_scale"] = ()
    state, half = weights(SHAPES), Standin(shapes)
    report = load_checkpoint(half, state)
    assert f"{other}_head.weight" in report.dropped
    assert torch.equal(half.state_dict()[f"{own}_head.weight"], state[f"{own}_head.weight"])


def test_a_final_norm_is_dropped_only_where_the_model_has_none() -> None:
    with_norm, without = layout("nlvr2", SMALL_BASE, (2, 2)), layout("vqav2", SMALL_BASE, (2, 2))
    state = {
        **weights(without),
        **{n: t for n, t in weights(with_norm).items() if "encoder.layer_norm" in n},
    }
    report = load_checkpoint(Standin(without), state)
    assert set(report.dropped.values()) == {"the model has no final LayerNorm"}
    assert len(report.dropped) == 4


def test_swapped_branches_are_noticed() -> None:
    state = weights(SHAPES)
    swap = {"A": "B", "B": "A"}
    swapped = {
        ".".join(swap.get(part, part) for part in name.split(".")): tensor
        for name, tensor in state.items()
    }
    target = model()
    before = snapshot(target)
    with pytest.raises(CheckpointMismatch, match="look swapped"):
        load_checkpoint(target, swapped)
    assert snapshot(target) == before


def test_paper_form_loads_and_single_branches_leave_the_joint_expert(tmp_path: Path) -> None:
    import beit3_fast

    options: dict[str, Any] = {"attention": "shared", "vl_expert_layers": 1}
    source = beit3_fast.create_model("beit3_tiny_patch16_32", **options)
    path = save_checkpoint(source, tmp_path / "x.safetensors")
    target = beit3_fast.create_model("beit3_tiny_patch16_32", checkpoint=path, **options)
    assert same(target.state_dict(), source.state_dict())
    vision = beit3_fast.create_model(
        "beit3_tiny_patch16_32", modalities=("vision",), attention="shared", vl_expert_layers=0
    )
    report = load_checkpoint(vision, path)
    assert any(".C." in name for name in report.dropped)
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in vision.state_dict().items())


def test_a_check_changes_nothing_and_takes_a_model_without_memory() -> None:
    import beit3_fast

    with torch.device("meta"):
        empty = beit3_fast.create_model("beit3_tiny_patch16_32_retrieval", device="meta")
    state = {n: torch.randn(t.shape) for n, t in empty.state_dict().items()}
    assert not check_checkpoint(empty, state).problems()
    with pytest.raises(CheckpointError, match=r"meta device.*to_empty"):
        load_checkpoint(empty, state)
    target = model()
    before = snapshot(target)
    check_checkpoint(target, weights(SHAPES))
    assert snapshot(target) == before


def test_timm_vision_names(tmp_path: Path) -> None:
    shapes = layout("imageclassification", SMALL_BASE, (3, 3), 5)
    official = {
        n: t for n, t in weights(shapes).items() if ".B." not in n and "text_embed" not in n
    }
    timm: dict[str, Tensor] = {}
    rules = (
        ("beit3.vision_embed.cls_token", "cls_token"),
        ("beit3.vision_embed.", "patch_embed."),
        ("beit3.encoder.layers.", "blocks."),
        ("self_attn_layer_norm.A.", "norm1."),
        ("final_layer_norm.A.", "norm2."),
        ("self_attn.inner_attn_ln.A.", "attn.norm."),
        ("self_attn.out_proj.A.", "attn.proj."),
        ("ffn.A.ffn_layernorm.", "mlp.norm."),
        ("ffn.A.", "mlp."),
    )
    for name, tensor in official.items():
        if "mask_token" in name or re.search(r"[qkv]_proj", name):
            continue
        if "embed_positions" in name:
            timm["pos_embed"] = tensor[2:].unsqueeze(0)
            continue
        for old, new in rules:
            name = name.replace(old, new)
        timm[name] = tensor
    for layer in range(SMALL_BASE.layers):
        for kind in ("weight", "bias"):
            timm[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(
                [
                    official[f"beit3.encoder.layers.{layer}.self_attn.{p}_proj.A.{kind}"]
                    for p in "qkv"
                ]
            )
    path = save_checkpoint(timm, tmp_path / "timm.safetensors")
    target = Standin({n: tuple(t.shape) for n, t in official.items()})
    report = load_checkpoint(target, path)
    assert any("timm" in remark for remark in report.remarks)
    official["beit3.vision_embed.mask_token"].zero_()
    official["beit3.encoder.embed_positions.A.weight"][:2] = 0
    assert same(target.state_dict(), official)


@pytest.mark.parametrize("change", [{"num_heads": 1}, {"layer_norm_eps": 1e-2}])
def test_a_configuration_that_no_shape_shows(change: dict[str, Any], tmp_path: Path) -> None:
    name = "beit3_tiny_patch16_32_imageclassification"
    path = save_checkpoint(create_model(name, **change), tmp_path / "x.safetensors")
    (field,) = change
    with pytest.raises(CheckpointError, match=rf"another one: {field} .* in the file and"):
        create_model(name, path)
    other = create_model(name)
    load_checkpoint(other, path, strict=False)
    create_model(name, path, **change)
