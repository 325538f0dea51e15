"""Every public function met with input that it cannot use: one family of errors that say what came."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sound_calls import attention, layout, linear, name_of
from torch import nn

import beit3_fast
from beit3_fast.config import SIZES
from beit3_fast.errors import (
    Beit3FastError,
    CheckpointError,
    ConfigError,
    InputError,
    KernelUnavailable,
    ShapeError,
)
from beit3_fast.layout import TokenLayout
from beit3_fast.model import create_model

TINY = "beit3_tiny_patch16_32"
NOT_MODELS: tuple[Any, ...] = (None, 3, "model", {}, [], object(), torch.zeros(2), nn.Linear)
Bad = tuple[str, Callable[[], Any], str]


image, text = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, dtype=torch.int64)
cache = {"prev_key": torch.zeros(1, 1, 1, 1), "prev_value": torch.zeros(1, 1, 1, 1)}
FORWARD: list[tuple[dict[str, Any], str]] = [
    ({}, "an image, a text or both are needed, got neither"),
    ({"visual_tokens": image[0]}, r"\[B, 3, H, W\].*got \[3, 32, 32\].*Processor"),
    ({"visual_tokens": image[:, :1]}, r"got \[2, 1, 32, 32\]"),
    ({"visual_tokens": image[..., :31]}, "positive multiples of 16"),
    ({"visual_tokens": image[..., :0]}, "positive multiples of 16"),
    ({"visual_tokens": [image]}, "image must be a tensor, got list"),
    ({"visual_tokens": image.byte()}, "floating point and normalised, got torch.uint8"),
    ({"visual_tokens": image.double()}, "the model's dtype, torch.float32, got torch.float64"),
    ({"textual_tokens": text.float()}, "token ids, int64.*got torch.float32"),
    ({"textual_tokens": text[0]}, r"int64 \[B, Nt\].*shape \[3\]"),
    ({"textual_tokens": text.bool()}, "token ids, int64.*got torch.bool"),
    ({"textual_tokens": [[1, 2]]}, "text must be a tensor, got list"),
    ({"textual_tokens": text + 100}, r"\[0, 100\), got ids from 100 to 100"),
    ({"textual_tokens": text - 1}, "got ids from -1 to -1"),
    (
        {"textual_tokens": text[:1, :1].expand(1, 1023)},
        "got 2 to 1024: a text may have at most 1022 tokens",
    ),
    ({"textual_tokens": text, "visual_tokens": image[:1]}, "same batch size"),
    ({"textual_tokens": text, "text_padding_position": text[:, :2]}, "the text's shape"),
    ({"textual_tokens": text, "text_padding_position": [0]}, "text_padding must be a tensor"),
    ({"visual_tokens": image, "text_padding_position": text}, "the text's shape, got .* None"),
    ({"textual_tokens": text, "attn_mask": torch.zeros(4, 4)}, r"0 vision \+ 3 text"),
    ({"textual_tokens": text, "attn_mask": [1]}, "attn_mask must be a tensor, got list"),
    ({"visual_tokens": image, "vision_masked_position": text}, r"\[2, 4\], got \[2, 3\]"),
    ({"textual_tokens": text, "vision_masked_position": text}, "without an image"),
    (
        {"textual_tokens": text, "visual_tokens": image, "positions": text},
        "positions can only be given for a text",
    ),
    ({"textual_tokens": text, "positions": torch.arange(5)[None]}, r"of shape \[1, 5\]"),
    ({"textual_tokens": text, "positions": torch.arange(3.0)[None]}, "torch.float32"),
    ({"textual_tokens": text, "positions": text - 1}, r"in \[0, 1024\), got -1 to -1"),
    ({"textual_tokens": text, "positions": text + 1024}, "at most 1022 tokens"),
    ({"textual_tokens": text, "incremental_state": []}, "must be a dictionary.*got list of 0"),
    ({"textual_tokens": text, "incremental_state": ({},)}, "must be a dictionary.*got tuple"),
    ({"textual_tokens": text, "incremental_state": {0: cache}}, "prev_key must be"),
]
PACKED: list[tuple[dict[str, Any], str]] = [
    ({}, "one entry per sample"),
    ({"images": "ab"}, "images must be a list.*got str"),
    ({"text": 3}, "text must be a list.*got int"),
    ({"images": [image[0]], "text": []}, "one entry per sample.*got 1 and 0"),
    ({"images": [None], "text": [None]}, "sample 0 has neither an image nor a text"),
    ({"text": [text[0].float()]}, r"text\[0\] must be int64 \[Nt\], got torch.float32"),
    ({"text": [[1, 2]]}, r"text\[0\] must be a tensor, got list"),
    ({"images": [[1, 2]]}, r"images\[0\] must be a tensor, got list"),
    ({"images": [image[0, 0]]}, r"\[B, 3, H, W\]"),
    ({"images": [image[0].byte()]}, "floating point and normalised"),
    ({"images": [image[0]], "mask": "x"}, "mask must be one of.*got 'x'"),
    ({"images": [image[0]], "read_vision": "last"}, "'all', 'first' or 'none', got 'last'"),
    ({"text": [text[0]], "read_text": 3}, "'all', 'first' or 'none', got 3"),
    ({"text": [text[0] + 100]}, r"\[0, 100\), got ids from 100"),
]
ENCODE: list[tuple[dict[str, Any], str]] = [
    ({}, "an image, a text or both are needed"),
    ({"image": image, "read_vision": "some"}, "'all', 'first' or 'none', got 'some'"),
    ({"text": text, "read_text": torch.ones(2, 4)}, r"the text's shape \[2, 3\], got \[2, 4\]"),
    ({"text": text, "read_text": torch.ones(6)}, r"the text's shape \[2, 3\], got \[6\]"),
    (
        {"text": text, "text_padding": text == 0, "read_text": torch.ones(2, 3)},
        "chooses padding in sample 0",
    ),
    ({"image": image, "mask": "prefix"}, "mask must be one of.*got 'prefix'"),
    ({"image": image, "mask": torch.zeros(5, 5)}, "a mask tensor must be bool"),
    ({"image": image, "mask": torch.zeros(4, 4, dtype=torch.bool)}, r"shape \[4, 4\]"),
    ({"image": image[..., :8]}, "positive multiples of 16"),
]


@pytest.mark.parametrize(("inputs", "message"), FORWARD, ids=name_of)
@pytest.mark.parametrize("train", [False, True])
def test_forward(inputs: dict[str, Any], message: str, train: bool) -> None:
    with torch.set_grad_enabled(train), pytest.raises(Beit3FastError, match=message):
        create_model(TINY)(**inputs)


@pytest.mark.parametrize(("inputs", "message"), PACKED, ids=name_of)
def test_forward_packed(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        create_model(TINY).forward_packed(**inputs)


@pytest.mark.parametrize(("inputs", "message"), ENCODE, ids=name_of)
def test_encode(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        create_model(TINY).encode(**inputs)


@pytest.mark.parametrize("modality", ["vision", "text"])
def test_a_branch_that_is_not_there(modality: str) -> None:
    model = create_model(TINY, modalities=(modality,))
    missing = "text" if modality == "vision" else "vision"
    for call in (
        lambda: model(text, image),
        lambda: model(text if missing == "text" else None, None if missing == "text" else image),
        lambda: model.forward_packed([image[0]], [text[0]]),
    ):
        with pytest.raises(ConfigError, match=f"no {missing} branch.*modalities"):
            call()


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (lambda v: beit3_fast.explain(v, quiet=True), "explain takes a model"),
        (beit3_fast.refresh, "refresh takes a torch.nn.Module"),
        (beit3_fast.accelerate, "must be a torch.nn.Module"),
        (beit3_fast.restore, "must be a torch.nn.Module"),
        (beit3_fast.Processor.for_model, "expected a beit3_fast model"),
    ],
)
@pytest.mark.parametrize("value", NOT_MODELS, ids=lambda v: type(v).__name__)
def test_what_is_not_a_model(function: Callable[[Any], Any], takes: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{takes}.*got {type(value).__name__}"):
        function(value)


def test_a_model_of_somebody_else() -> None:
    with pytest.raises(ConfigError, match="found nothing to accelerate in this Linear"):
        beit3_fast.accelerate(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="explain takes a model with parameters, got Identity"):
        beit3_fast.explain(nn.Identity())
    with pytest.raises(ConfigError, match=r"impl must be 'auto' or one of.*'best'"):
        beit3_fast.accelerate(nn.Linear(2, 2), impl="best")
    beit3_fast.refresh(nn.Identity())


@pytest.mark.parametrize("value", [None, 3, {}, [], object(), 1.5, torch.zeros(2), b"x"])
def test_names_that_are_no_names(value: Any) -> None:
    with pytest.raises(ConfigError, match="unknown model"):
        create_model(value)


@pytest.mark.parametrize("value", ["gpu", "cuda:77", "tpu:0", 3.5, {}, [], torch.zeros(2), "cpu:x"])
def test_devices_that_are_not_there(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"device .*(must be a torch.device|is not there)"):
        create_model(TINY, device=value)


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        (None, [1], "lists of token counts, got NoneType and list"),
        ([1], None, "got list and NoneType"),
        ("ab", [1, 2], "got str and list"),
        (3, 3, "got int and int"),
        ([1, 2], [1], "one entry per sample, got 2 and 1"),
        ([1.5], [1], "must be integers"),
        ([torch.tensor(2)], [1], "must be integers"),
        ([[1]], [1], "must be integers"),
        ([-1], [1], "must not be negative"),
    ],
)
def test_token_layout(vision: Any, text: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        TokenLayout.from_lengths(vision, text)


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ("last", "none", "got 'last'"),
        (None, "none", "got None"),
        (3, "none", "got 3"),
        ("none", "some", "got 'some'"),
        ("none", None, "got None"),
        (
            "none",
            torch.zeros(4, dtype=torch.bool),
            r"\[Rt\] = \[3\], got torch.bool of shape \[4\]",
        ),
        ("none", torch.zeros(3), "got torch.float32"),
        ("none", torch.zeros(3, 1, dtype=torch.bool), r"of shape \[3, 1\]"),
        (
            torch.zeros(4, dtype=torch.bool),
            "none",
            r"\[Rv\] = \[3\], got torch.bool of shape \[4\]",
        ),
    ],
)
def test_selections(vision: Any, text: Any, message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        layout.select(vision, text)


@pytest.mark.parametrize("sample", [-1, 2, 77])
def test_samples_that_are_not_there(sample: int) -> None:
    with pytest.raises(ShapeError, match=f"got {sample}"):
        layout.segments(sample)


def test_the_family_of_errors() -> None:
    for kind in (CheckpointError, ShapeError, ConfigError, InputError):
        assert issubclass(kind, Beit3FastError)
        assert issubclass(kind, ValueError)
    assert issubclass(KernelUnavailable, Beit3FastError)
    assert issubclass(KernelUnavailable, RuntimeError)


def test_no_public_boundary_is_an_assertion() -> None:
    """An assertion is gone under ``python -O`` and says nothing to a user."""
    package = Path(beit3_fast.__file__).parent
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        # "is not None" tells the type checker what a check above has ensured
        if re.match(r"\s*assert\b", line)
        and not re.fullmatch(r"\s*assert [\w.]+ is not None", line)
    ]
    assert not found, found


ODD: tuple[Any, ...] = (
    None,
    0,
    -1,
    2.5,
    "",
    "vision",
    [],
    {},
    (),
    torch.zeros(0),
    torch.zeros(2, 3),
    torch.zeros(2, 3, 32, 32),
    torch.zeros(2, 3, dtype=torch.int64),
    torch.full((2, 3), 99),
    torch.ones(6, 8),
    torch.ones(8, 8, dtype=torch.bool),
    torch.zeros(2, 3, device="meta"),
    layout,
    nn.Identity(),
)


@pytest.mark.parametrize("seed", range(150))
def test_random_nonsense_never_ends_in_an_internal_error(seed: int) -> None:
    """Any mixture of odd arguments works or raises our error, or Python's own TypeError for the call itself."""
    draw = random.Random(seed)
    model = create_model(TINY)

    def some(names: str) -> dict[str, Any]:
        return {name: draw.choice(ODD) for name in names.split() if draw.random() < 0.4}

    operations: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (linear, some("x weights biases bounds norm activation residual rows impl")),
        (attention, some("q k v layout num_heads scale mask queries impl")),
        (
            model,
            some(
                "textual_tokens visual_tokens text_padding_position attn_mask vision_masked_position "
                "positions"
            ),
        ),
        (model.forward_packed, some("images text mask read_vision read_text")),
        (model.encode, some("image text text_padding mask read_vision read_text")),
        (SIZES["tiny"].replace, some("embed_dim num_heads img_size attention modalities")),
        (TokenLayout.from_lengths, some("vision_lengths text_lengths") | {"device": "cpu"}),
    ]
    for function, options in operations:
        said = None
        try:
            function(**options)
        except Beit3FastError as error:
            said = str(error)
        except TypeError as error:
            said = str(error)
            missing = "missing" in said
            if not missing:
                raise
        assert said is None or len(said) > 15
