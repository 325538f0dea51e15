"""Every name: constructible, with the official parameter names, shapes and published parameter counts."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch

import beit3_fast
from beit3_fast.config import SIZES
from beit3_fast.errors import ConfigError, KernelUnavailable
from beit3_fast.model import (
    BEiT3,
    BEiT3ForCaptioning,
    BEiT3ForImageClassification,
    BEiT3ForPretraining,
    BEiT3ForRetrieval,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
    create_model,
    list_models,
)
from beit3_fast.model.registry import model_config

OFFICIAL = {
    "beit3_base_patch16_224_imageclassification",
    "beit3_large_patch16_224_imageclassification",
    "beit3_base_patch16_224_nlvr2",
    "beit3_large_patch16_224_nlvr2",
    "beit3_base_patch16_384_vqav2",
    "beit3_base_patch16_480_vqav2",
    "beit3_large_patch16_384_vqav2",
    "beit3_large_patch16_480_vqav2",
    "beit3_large_patch16_768_vqav2",
    "beit3_base_patch16_224_captioning",
    "beit3_base_patch16_480_captioning",
    "beit3_large_patch16_480_captioning",
    "beit3_base_patch16_224_retrieval",
    "beit3_base_patch16_384_retrieval",
    "beit3_large_patch16_384_retrieval",
}
OURS = {
    "beit3_large_patch16_224_captioning",
    "beit3_large_patch16_224_retrieval",
    "beit3_base_patch16_224_pretraining",
    "beit3_large_patch16_224_pretraining",
    "beit3_tiny_patch16_32",
    "beit3_base_patch16_224",
    "beit3_large_patch16_224",
    "beit3_giant_patch14_224",
    "beit3_giant_patch14_224_pretraining",
    *(
        f"beit3_tiny_patch16_32_{task}"
        for task in (
            "imageclassification",
            "nlvr2",
            "vqav2",
            "captioning",
            "retrieval",
            "pretraining",
        )
    ),
}
CLASSES = {
    "imageclassification": BEiT3ForImageClassification,
    "nlvr2": BEiT3ForVisualReasoning,
    "vqav2": BEiT3ForVisualQuestionAnswering,
    "captioning": BEiT3ForCaptioning,
    "retrieval": BEiT3ForRetrieval,
    "pretraining": BEiT3ForPretraining,
}
# Counts that the official README publishes (M) or that follow from the released shapes.
COUNTS = {
    "beit3_base_patch16_224": 220_987_392,
    "beit3_large_patch16_224": 672_702_464,
    "beit3_base_patch16_480_vqav2": 228_110_649,
    "beit3_large_patch16_480_vqav2": 682_985_529,
    "beit3_large_patch16_768_vqav2": 684_423_225,
    "beit3_base_patch16_224_nlvr2": 225_719_810,
    "beit3_large_patch16_224_nlvr2": 681_109_506,
    "beit3_base_patch16_480_captioning": 270_751_754,
    "beit3_large_patch16_480_captioning": 739_033_610,
    "beit3_base_patch16_384_retrieval": 222_458_881,
    "beit3_large_patch16_384_retrieval": 675_188_737,
    "beit3_base_patch16_224_pretraining": 276_510_730,
    "beit3_large_patch16_224_pretraining": 746_709_514,
}


@cache
def on_meta(name: str, **overrides: Any) -> Any:
    return create_model(name, device="meta", **overrides)


def backbone_shapes(size: str, pixels: int, normalised: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released layout, written out from what was published."""
    config = SIZES[size]
    width, ffn, patch = config.embed_dim, config.ffn_dim, config.patch_size
    patches = (pixels // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "text_embed.weight": (config.vocab_size, width),
        "vision_embed.cls_token": (1, 1, width),
        "vision_embed.mask_token": (1, 1, width),
        "vision_embed.proj.weight": (width, 3, patch, patch),
        "vision_embed.proj.bias": (width,),
        "encoder.embed_positions.A.weight": (patches + 3, width),
        "encoder.embed_positions.B.weight": (1024, width),
    }

    def linear(name: str, out: int, inner: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inner), (out,)

    def norm(name: str, features: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (features,)

    for index in range(config.num_layers):
        layer = f"encoder.layers.{index}"
        own = [".A", ".B"] if config.attention == "decoupled" else [""]
        fused = index >= config.num_layers - config.vl_expert_layers
        experts = [".A", ".B", ".C"] if fused else [".A", ".B"]
        for expert in own:
            for which in ("k_proj", "v_proj", "q_proj", "out_proj"):
                linear(f"{layer}.self_attn.{which}{expert}", width, width)
            norm(f"{layer}.self_attn.inner_attn_ln{expert}", width)
            norm(f"{layer}.self_attn_layer_norm{expert}", width)
        for expert in experts:
            norm(f"{layer}.final_layer_norm{expert}", width)
            linear(f"{layer}.ffn{expert}.fc1", ffn, width)
            linear(f"{layer}.ffn{expert}.fc2", width, ffn)
            norm(f"{layer}.ffn{expert}.ffn_layernorm", ffn)
    if normalised:
        norm("encoder.layer_norm.A", width)
        norm("encoder.layer_norm.B", width)
    return shapes


def head_shapes(task: str, width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    def linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}

    def norm(name: str, features: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (features,), f"{name}.bias": (features,)}

    if task == "imageclassification":
        return norm("fc_norm", width) | linear("head", 1000, width)
    if task == "nlvr2":
        return (
            norm("head.norm1", 4 * width)
            | linear("head.dense1", 2 * width, 4 * width)
            | norm("head.norm2", 2 * width)
            | linear("head.dense2", 2, 2 * width)
        )
    if task == "vqav2":
        return (
            norm("pooler.norm", width)
            | linear("pooler.dense", width, width)
            | linear("head.0", 2 * width, width)
            | norm("head.1", 2 * width)
            | linear("head.3", 3129, 2 * width)
        )
    if task == "captioning":
        return linear("mlm_head", vocabulary, width)
    if task == "pretraining":
        return linear("mlm_head", vocabulary, width) | linear("mim_head", 8192, width)
    return {
        "language_head.weight": (width, width),
        "vision_head.weight": (width, width),
        "logit_scale": (),
    }


def test_the_names() -> None:
    assert set(list_models()) == OFFICIAL | OURS
    assert list_models() == sorted(list_models())
    assert beit3_fast.list_models() == list_models()


@pytest.mark.parametrize("name", sorted(OFFICIAL | OURS))
def test_official_names_and_shapes(name: str) -> None:
    model = on_meta(name)
    _, size, patch, pixels, *task = name.split("_")
    assert model.name == name
    assert not model.training
    config = model_config(model)
    assert config.patch_size == int(patch.removeprefix("patch"))
    assert config.image_shape == (int(pixels),) * 2
    normalised = task not in (["imageclassification"], ["vqav2"])
    assert config.normalize_output is normalised
    expected = backbone_shapes(size, int(pixels), normalised)
    if task:
        assert type(model) is CLASSES[task[0]]
        expected = {f"beit3.{key}": shape for key, shape in expected.items()}
        expected |= head_shapes(task[0], config.embed_dim, config.vocab_size)
    else:
        assert type(model) is BEiT3
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == expected


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name: str) -> None:
    assert sum(p.numel() for p in on_meta(name).parameters()) == COUNTS[name]


@pytest.mark.parametrize(("size", "count"), [("base", 86_662_120), ("large", 304_575_464)])
def test_published_counts_of_the_image_branch(size: str, count: int) -> None:
    model = on_meta(f"beit3_{size}_patch16_224_imageclassification", modalities=("vision",))
    used = [p for name, p in model.named_parameters() if "mask_token" not in name]
    # The published count has neither the mask token nor the two unused rows of the position table.
    width = SIZES[size].embed_dim
    assert abs(sum(p.numel() for p in used) - count) <= 2 * width


def test_the_giant_has_the_published_parts() -> None:
    """The paper's table of parts: experts 692M, 692M and 52M, shared attention 317M."""

    def millions(pattern: str) -> float:
        named = on_meta("beit3_giant_patch14_224").named_parameters()
        return round(sum(p.numel() for name, p in named if re.search(pattern, name)) / 1e6)

    assert millions(r"ffn\.A\.fc") == 692
    assert millions(r"ffn\.B\.fc") == 692
    assert millions(r"ffn\.C\.fc") == 52
    assert millions(r"self_attn\.[kvq]_proj|self_attn\.out_proj") == 317
    # with the word embeddings, which the table leaves out
    assert millions("") == 1848


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16])
def test_dtypes(dtype: Any) -> None:
    model = create_model("beit3_tiny_patch16_32_vqav2", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {wanted}


def test_options_reach_the_model() -> None:
    model = create_model(
        "beit3_tiny_patch16_32_imageclassification",
        impl="reference",
        num_classes=7,
        img_size=(48, 16),
        drop_path_rate=0.3,
        checkpoint_activations=True,
        modalities=("vision",),
    )
    assert model(torch.randn(2, 3, 48, 16)).shape == (2, 7)
    assert model.beit3.impl == "reference"
    assert model.config.drop_path_rate == 0.3
    assert model.grid_size == (3, 1)
    assert model.get_num_layers() == 2
    assert not hasattr(model.beit3, "text_embed")


def test_initial_values() -> None:
    model = create_model("beit3_tiny_patch16_32_vqav2")
    state = model.state_dict()
    for name, values in state.items():
        if "norm" in name or "inner_attn_ln" in name or name.startswith("head.1."):
            assert torch.equal(values, torch.full_like(values, float(name.endswith("weight"))))
        elif name.endswith("bias") and "vision_embed" not in name:
            assert not values.any(), name
    projection = state["beit3.encoder.layers.0.ffn.A.fc1.weight"]
    assert projection.abs().max() <= 0.02
    assert projection.std() > 0.008
    assert state["beit3.text_embed.weight"].std() == pytest.approx(64**-0.5, rel=0.1)
    small = create_model("beit3_tiny_patch16_32_imageclassification").head.weight
    assert 0 < small.abs().max() <= 2e-5
    scale = create_model("beit3_tiny_patch16_32_retrieval").logit_scale
    assert scale.exp().item() == pytest.approx(1 / 0.07)


def test_names_without_weight_decay() -> None:
    model = create_model("beit3_tiny_patch16_32_retrieval")
    exempt = model.no_weight_decay()
    assert exempt == {
        "pos_embed",
        "cls_token",
        "beit3.encoder.embed_positions.A.weight",
        "beit3.vision_embed.cls_token",
        "logit_scale",
    }
    names = {name for name, _ in model.named_parameters()}
    assert exempt - names == {"pos_embed", "cls_token"}


TINY = "beit3_tiny_patch16_32"
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("beit3_base", {}, "unknown model 'beit3_base'.*beit3_base_patch16_224"),
    ("", {}, "unknown model ''"),
    ("BEIT3_TINY_PATCH16_32", {}, "unknown model"),
    (TINY, {"dtype": "int4"}, "dtype must be one of.*'int8'.*got 'int4'"),
    (TINY, {"dtype": torch.int64}, "dtype must be one of.*int64"),
    (TINY, {"dtype": None}, "dtype must be one of.*None"),
    (TINY, {"impl": "fastest"}, "impl must be 'auto' or one of.*'fastest'"),
    (TINY, {"impl": None}, "impl must be.*None"),
    (TINY, {"num_classes": 3}, "no classes"),
    ("beit3_tiny_patch16_32_retrieval", {"num_classes": 3}, "no classes"),
    ("beit3_tiny_patch16_32_vqav2", {"num_classes": 0}, "num_classes must be a positive.*0"),
    ("beit3_tiny_patch16_32_vqav2", {"num_classes": -1}, "num_classes must be a positive.*-1"),
    ("beit3_tiny_patch16_32_vqav2", {"num_classes": "3"}, "num_classes must be a positive.*'3'"),
    (TINY, {"depth": 3}, r"unknown configuration fields \['depth'\]"),
    (TINY, {"img_size": 33}, "multiples of patch_size 16, got 33"),
    (TINY, {"attention": "sparse"}, "attention must be one of"),
    (TINY, {"modalities": ("audio",)}, "modalities must be a tuple of some of"),
    (TINY, {"drop_path_rate": 2.0}, "drop_path_rate"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_requests_say_what_is_possible(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize("impl", ["cuda", "flash_attn", "xformers"])
def test_an_implementation_that_is_not_there_says_so_when_used(impl: str) -> None:
    model = create_model(TINY, impl=impl)
    with pytest.raises(KernelUnavailable, match=f"impl='{impl}'.*impl='auto'"):
        model(visual_tokens=torch.randn(1, 3, 32, 32))


def test_only_our_models_have_a_configuration() -> None:
    assert model_config(create_model(TINY)) == SIZES["tiny"]
    with pytest.raises(ConfigError, match="expected a beit3_fast model, got Linear"):
        model_config(torch.nn.Linear(2, 2))
