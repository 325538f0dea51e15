"""The package's face: the names it promises, where they live, and that they are documented."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import beit3_fast
from beit3_fast.data import ImagePreset
from beit3_fast.model import BEiT3, create_model

NAMES = {
    "BEiT3Config",
    "EmbeddingIndex",
    "Processor",
    "TokenLayout",
    "Tokenizer",
    "accelerate",
    "create_model",
    "embed_dataset",
    "evaluate_retrieval",
    "explain",
    "list_models",
    "load_checkpoint",
    "refresh",
    "restore",
    "save_checkpoint",
    "zero_shot_classifier",
}
PUBLIC = sorted(NAMES)


def test_the_promised_names() -> None:
    assert set(beit3_fast.__all__) >= NAMES
    assert list(beit3_fast.__all__) == sorted(beit3_fast.__all__)
    assert set(dir(beit3_fast)) == {*beit3_fast.__all__, "__version__"}
    assert isinstance(beit3_fast.__version__, str)


@pytest.mark.parametrize("name", beit3_fast.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(beit3_fast, name)
    assert value is getattr(beit3_fast, name)
    assert value.__module__.startswith("beit3_fast.")
    doc = inspect.getdoc(value)
    assert doc
    assert len(doc) > 20
    # an official error is part of the signature
    if inspect.isfunction(value) and inspect.signature(value).parameters:
        assert "Raises" in doc, name


@pytest.mark.parametrize("name", beit3_fast.__all__)
def test_every_parameter_has_a_type(name: str) -> None:
    value = getattr(beit3_fast, name)
    function = value.__init__ if inspect.isclass(value) else value
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "self":
            assert parameter.annotation is not inspect.Parameter.empty, (name, parameter.name)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(AttributeError, match="create_model"):
        beit3_fast.create_modle  # noqa: B018
    with pytest.raises(ImportError):
        from beit3_fast import nothing  # noqa: F401


def test_the_official_signatures() -> None:
    assert list(inspect.signature(BEiT3.forward).parameters)[1:8] == [
        "textual_tokens",
        "visual_tokens",
        "text_padding_position",
        "attn_mask",
        "vision_masked_position",
        "incremental_state",
        "positions",
    ]
    forwards = {
        "imageclassification": ["image"],
        "nlvr2": ["image_a", "image_b", "text_description", "padding_mask"],
        "vqav2": ["image", "question", "padding_mask"],
        "captioning": [
            "image",
            "text_ids",
            "padding_mask",
            "language_masked_pos",
            "text_len",
            "incremental_state",
        ],
        "retrieval": ["image", "text_description", "padding_mask", "only_infer"],
    }
    for task, expected in forwards.items():
        model = create_model(f"beit3_tiny_patch16_32_{task}")
        assert list(inspect.signature(model.forward).parameters) == [*expected, "further"]
        assert type(model).__name__.startswith("BEiT3For")
        assert model.beit3.__class__ is BEiT3
    create = list(inspect.signature(create_model).parameters)
    assert create[:5] == ["name", "checkpoint", "device", "dtype", "impl"]


def test_keywords_that_the_released_loops_pass_are_taken() -> None:
    """As by every released forward; one that no loop passes may be a slip, and is said."""
    image, words = torch.randn(2, 3, 32, 32), torch.randint(4, 90, (2, 5))
    nothing, chosen = torch.zeros(2, 5).long(), torch.tensor([[0, 1, 0, 0, 0]] * 2)
    texts = {"padding_mask": nothing}
    calls: dict[str, dict[str, Any]] = {
        "imageclassification": {"image": image},
        "nlvr2": {"image_a": image, "image_b": image, "text_description": words, **texts},
        "vqav2": {"image": image, "question": words, **texts},
        "captioning": {"image": image, "text_ids": words, "language_masked_pos": chosen, **texts},
        "retrieval": {"image": image, "text_description": words, **texts},
    }
    for task, call in calls.items():
        model = create_model(f"beit3_tiny_patch16_32_{task}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**call, image_id=torch.tensor([1, 2]))
        with pytest.warns(UserWarning, match=r"reads no paddings; it has image.*further"):
            model(**call, paddings=nothing)


def test_a_checkpoint_carries_the_whole_model(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = create_model("beit3_tiny_patch16_32_vqav2", num_classes=5)
    assert model.preset == "square"
    model.preset = "imagenet"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image, words = torch.randn(2, 3, 32, 32), torch.randint(0, 100, (2, 4))
    with torch.no_grad():
        expected = model(image, words, None)
    for suffix in (".safetensors", ".pth"):
        path = beit3_fast.save_checkpoint(model, tmp_path / f"model{suffix}")
        again = create_model("beit3_tiny_patch16_32_vqav2", path, num_classes=5)
        assert all(
            torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items()
        )
        assert again.preset == "imagenet"
        assert beit3_fast.Processor.for_model(again).preset == ImagePreset.get("imagenet")
        other = create_model("beit3_tiny_patch16_32_vqav2", num_classes=5)
        beit3_fast.load_checkpoint(other, path)
        with torch.no_grad():
            assert torch.equal(again(image, words, None), expected)
            assert torch.equal(other(image, words, None), expected)


def test_refresh_is_the_documented_name() -> None:
    model = create_model("beit3_tiny_patch16_32")
    assert beit3_fast.refresh(model) is None
