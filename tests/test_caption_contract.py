"""Captioning and its op met with input that they cannot use: one family of errors that say what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_fast.data import Processor
from beit3_fast.errors import (
    Beit3FastError,
    ConfigError,
    InputError,
    KernelUnavailable,
    ShapeError,
)
from beit3_fast.model import create_model
from beit3_fast.ops import NewKeys, PackedKeys, cached_attention, library, pack_keys

NAME = "beit3_tiny_patch16_32_captioning"
image = torch.zeros(1, 3, 32, 32)
q, cache = torch.randn(2, 3, 8), torch.randn(4, 5, 8)
seen = torch.ones(2, 3, 5, dtype=torch.bool)


def attention(**changes: Any) -> Tensor:
    operands: dict[str, Any] = {"q": q, "k": cache, "v": cache, "seen": seen, "num_heads": 2}
    return cached_attention(**(operands | {"samples": [0, 3]} | changes))


ATTENTION: list[tuple[dict[str, Any], str]] = [
    ({"q": [1]}, "q must be a tensor, got list"),
    ({"seen": None}, "seen must be a tensor, got NoneType"),
    ({"q": q[0]}, r"q must be a floating-point tensor \[S, n, H \* D\].*shape \[3, 8\]"),
    ({"q": q.long()}, "floating-point.*got torch.int64"),
    ({"num_heads": 3}, "num_heads = 3"),
    ({"num_heads": 0}, "num_heads = 0"),
    ({"num_heads": 2.0}, "num_heads must be an integer, got 2.0"),
    ({"scale": float("nan")}, "scale must be a number.*got nan"),
    ({"k": cache[0]}, r"k must have shape \[B, N, C\] with C = 8.*got \[5, 8\]"),
    ({"v": cache[:, :4]}, r"v must have shape .* got \[4, 4, 8\]"),
    ({"v": cache[:, :, :4]}, r"v must have shape .* got \[4, 5, 4\]"),
    ({"k": cache.bfloat16()}, "k must have q's dtype and device.*got torch.bfloat16"),
    ({"v": cache.to("meta")}, "v must have q's dtype and device.*meta"),
    ({"samples": None}, "a cache sample, 0 to 3, for each of the 2 sequences, got None"),
    ({"samples": [0]}, r"got \[0\]"),
    ({"samples": [0, 4]}, r"got \[0, 4\]"),
    ({"samples": [0, -1]}, r"got \[0, -1\]"),
    ({"samples": [0, 1.0]}, r"got \[0, 1.0\]"),
    ({"samples": torch.tensor([0, 1])}, "got tensor"),
    ({"seen": seen.long()}, r"seen must be bool \[S, n, N\] = \[2, 3, 5\].*got torch.int64"),
    ({"seen": seen[:, :, :4]}, r"of shape \[2, 3, 4\]"),
    ({"impl": "fast"}, "impl must be 'auto' or one of.*'fast'"),
    ({"front": 6}, "front must count some of the 5 keys, got 6"),
    ({"front": 1}, r"seen must be bool \[S, n, N - front\] = \[2, 3, 4\]"),
    ({"new": (q, q, 0)}, "new must be NewKeys, got tuple"),
    ({"new": NewKeys(q, None, 0)}, "new.v must be a tensor, got NoneType"),  # type: ignore[arg-type]
    (
        {"new": NewKeys(q[:1], q[:1], 0)},
        r"new.k must be \[S, m, C\] with S = 2 and C = 8.*\[1, 3, 8\]",
    ),
    ({"new": NewKeys(q, q[:, :2], 0)}, "new.v must be .*k and v alike"),
    ({"new": NewKeys(q.half(), q.half(), 0)}, "the cache's dtype.*got torch.float16"),
    ({"new": NewKeys(q, q, 3)}, "new.place must leave 3 of the 5 places, got 3"),
    ({"new": NewKeys(q, q, torch.tensor(1))}, r"new.place must be int64 \[1\]"),
    ({"prefix": cache}, "prefix must come from pack_keys, got Tensor"),
    ({"prefix": PackedKeys(cache, 5)}, r"prefix must hold 5 keys for each of 4 samples, 2 heads"),
]


@pytest.mark.parametrize("impl", ["auto", "composite", "reference"])
@pytest.mark.parametrize(("changes", "message"), ATTENTION)
def test_cached_attention(impl: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        attention(**({"impl": impl} | changes))


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"k": None}, "k must be a tensor, got NoneType"),
    ({"k": cache[0]}, r"k must be a floating-point tensor \[S, n, H \* D\].*shape \[5, 8\]"),
    ({"v": cache[:3]}, r"v must have shape .* got \[3, 5, 8\]"),
    ({"num_heads": 3}, "num_heads = 3"),
    ({"k": cache[:, :0], "v": cache[:, :0]}, r"at least one key, got .* \[4, 0, 8\]"),
    ({"k": cache.double(), "v": cache.double()}, "float32 or bfloat16 CPU tensor.*float64"),
]


@pytest.mark.parametrize(("changes", "message"), KEYS)
def test_pack_keys(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        pack_keys(**({"k": cache, "v": cache, "num_heads": 2} | changes))


def test_packed_keys_are_for_the_compiled_kernels() -> None:
    if not library.available():
        pytest.skip(f"the library {library.why_unavailable()}")
    prefix = pack_keys(cache, cache, num_heads=2)
    assert attention(prefix=prefix, impl="cpu").shape == q.shape
    for impl in ("composite", "reference"):
        with pytest.raises(KernelUnavailable, match="only impl='cpu' reads packed keys"):
            attention(prefix=prefix, impl=impl)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 0}, "num_beams must be an integer from 1 to 2147483647, got 0"),
    ({"num_beams": 2.0}, "num_beams must be an integer from 1 to 2147483647, got 2.0"),
    ({"num_beams": True}, "num_beams must be an integer.*got True"),
    ({"num_beams": 30}, "num_beams must be at most 29 for a vocabulary of 89 words, got 30"),
    ({"max_length": 2}, "max_length must be an integer from 3 to 2147483647, got 2"),
    ({"max_length": None}, "max_length must be an integer.*got None"),
    ({"max_length": 1023}, "at most 1022, the text positions of this model, got 1023"),
    ({"length_penalty": float("nan")}, "length_penalty must be a finite number, got nan"),
    ({"length_penalty": "1"}, "length_penalty must be a finite number, got '1'"),
    ({"length_penalty": 300}, "length_penalty must be from -10 to 10, got 300"),
    ({"length_penalty": -10.5}, "length_penalty must be from -10 to 10, got -10.5"),
    ({"num_beams": 10**24}, "num_beams must be an integer from 1 to 2147483647, got 10000000"),
    (
        {"sample": True, "num_beams": 1, "num_return_sequences": 10**24},
        "num_return_sequences must be an integer from 1 to 2147483647, got 10000000",
    ),
    ({"num_return_sequences": 0}, "num_return_sequences must be an integer from 1"),
    ({"num_return_sequences": 4}, "at most num_beams = 3 without sample=True, got 4"),
    ({"sample": 1}, "sample must be True or False, got 1"),
    ({"sample": True}, "takes num_beams=1, got num_beams=3"),
    ({"top_k": 5}, "top_k needs sample=True with num_beams=1"),
    ({"temperature": 0.5, "seed": 1}, "temperature, seed needs sample=True"),
    ({"sample": True, "temperature": 10**400}, "temperature must be a finite number"),
    ({"temperature": 0.0}, "temperature must be from 0.0001 to 10000, got 0.0"),
    ({"sample": True, "num_beams": 1, "top_k": 0}, "top_k must be an integer from 1 "),
    ({"sample": True, "num_beams": 1, "top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"sample": True, "num_beams": 1, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    (
        {"sample": True, "num_beams": 1, "seed": -1},
        "seed must be an integer from 0 to 9223372036854775807, got -1",
    ),
    ({"sample": True, "num_beams": 1, "compat": True}, "released beam search, which does not"),
    ({"compat": "yes"}, "compat must be True or False, got 'yes'"),
    ({"mask_id": None}, "not known for a vocabulary of 100, got mask_id=None; pass a processor"),
    ({"mask_id": 100}, r"mask token's id must be in \[4, 100\), got 100"),
    ({"mask_id": "<mask>"}, "got mask_id='<mask>'"),
    ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    ({"processor": "beit3.spm"}, "must be a beit3_fast.Processor, got str.*for_model"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(NAME).caption(image, **({"mask_id": 91} | options))


IMAGES: list[tuple[Any, type[Exception], str]] = [
    ([], InputError, "at least one image, got none"),
    ("photo.jpg", ConfigError, "image 0 is a str; pass processor=Processor.for_model"),
    (None, ConfigError, "image 0 is a NoneType"),
    ([image[0], "x.jpg"], ConfigError, "image 1 is a str"),
    (image.byte(), ConfigError, "image 0 is a tensor of torch.uint8"),
    (image[0, 0], ShapeError, r"image 0 must be \[3, H, W\], got \[32, 32\]"),
    (image[:, :1], ShapeError, r"\[B, 3, H, W\].*got \[1, 1, 32, 32\]"),
    (image[..., :31], ShapeError, "positive multiples of 16"),
]


@pytest.mark.parametrize(("images", "kind", "message"), IMAGES)
def test_images(images: Any, kind: type[Exception], message: str) -> None:
    model = create_model(NAME)
    calls = (model.caption, model.stream_caption)
    for call in calls[: 1 if isinstance(images, list) and len(images) > 1 else 2]:
        with pytest.raises(kind, match=message):
            call(images, mask_id=91)


def test_images_of_a_processor() -> None:
    model, processor = create_model(NAME), Processor(image_size=32)
    with pytest.raises(InputError, match=r"image 1: .*missing.jpg"):
        model.caption([image[0], "missing.jpg"], mask_id=91, processor=processor)
    with pytest.raises(ConfigError, match="not known for a vocabulary of 100"):
        model.caption(image, processor=processor)


def test_streaming_says_at_once_what_is_wrong() -> None:
    model = create_model(NAME)
    with pytest.raises(ConfigError, match="takes one image, got 2; use caption"):
        model.stream_caption(image.expand(2, -1, -1, -1), mask_id=91)
    with pytest.raises(ConfigError, match="max_length must be an integer"):
        model.stream_caption(image, 2, mask_id=91)
    with pytest.raises(ConfigError, match="seed needs sample=True"):
        model.stream_caption(image, seed=1, mask_id=91)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_images_that_are_not_finite(poison: float) -> None:
    model, spoiled = create_model(NAME), torch.zeros(3, 32, 32)
    spoiled[1, 5, 7] = poison
    for options in ({"num_beams": 3}, {"num_beams": 1}, {"num_beams": 1, "sample": True}):
        with pytest.raises(InputError, match="image 2 holds NaN or infinity"):
            model.caption([image[0], image[0], spoiled], mask_id=91, **options)
    with pytest.raises(InputError, match="image 0 holds NaN"):
        model.stream_caption(spoiled, mask_id=91)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "compat": True},
        {"num_beams": 1},
        {"num_beams": 1, "sample": True, "seed": 0},
        {"num_beams": 1, "sample": True, "top_p": 0.5, "num_return_sequences": 2},
    ],
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(poison: float, options: dict[str, Any]) -> None:
    model = create_model(NAME)
    with torch.no_grad():
        model.mlm_head.bias[50] = poison
    with pytest.raises(InputError, match="the scores of image 0 are not finite"):
        model.caption(image, mask_id=91, **options)


@pytest.mark.parametrize("sample", [False, True])
def test_a_stream_that_is_not_finite(sample: bool) -> None:
    model = create_model(NAME)
    with torch.no_grad():
        model.mlm_head.bias[50] = float("nan")
    with pytest.raises(InputError, match="the scores of image 0 are not finite"):
        list(model.stream_caption(image, mask_id=91, sample=sample))
