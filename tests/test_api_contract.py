"""Every public function met with input that it cannot use: one family of errors that say what came."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
from beit3_fast.ops import Norm, expert_linear, shared_attention

TINY = "beit3_tiny_patch16_32"
NOT_MODELS: tuple[Any, ...] = (None, 3, "model", {}, [], object(), torch.zeros(2), nn.Linear)
Bad = tuple[str, Callable[[], Any], str]


def _name(value: Any) -> str:
    """A test's name, the same in every process: the names of the bad arguments, or the message."""
    return "+".join(value) if isinstance(value, dict) else str(value)


x, weight, bias, gamma, residual = (
    torch.randn(6, 8),
    torch.randn(4, 8),
    torch.randn(4),
    torch.ones(8),
    torch.randn(6, 4),
)


def linear(**changes: Any) -> Tensor:
    options: dict[str, Any] = {
        "x": x,
        "weights": [weight],
        "biases": [bias],
        "bounds": (0, 6),
        "norm": Norm([gamma], [gamma]),
        "activation": "gelu",
        "residual": residual,
    }
    options |= changes
    return expert_linear(**options)


BAD_LINEAR: list[tuple[dict[str, Any], str]] = [
    ({"x": [1]}, "x must be a tensor, got list"),
    ({"x": None}, "x must be a tensor, got NoneType"),
    ({"x": x[None]}, r"\[M, I\], got torch.float32 of shape \(1, 6, 8\)"),
    ({"x": x.long()}, "floating-point tensor.*got torch.int64"),
    ({"x": x[:, :7]}, r"weights\[0\] must have shape .* got \[4, 8\]"),
    ({"weights": []}, "at least one expert, got none"),
    ({"weights": None}, "weights must be a list.*got NoneType"),
    ({"weights": weight}, "weights must be a list.*got Tensor"),
    ({"weights": [()]}, r"weights\[0\] must be a tensor or a tuple.*got tuple"),
    ({"weights": ["w"]}, r"weights\[0\] must be a tensor.*got str"),
    ({"weights": [weight.T]}, r"weights\[0\] must have shape .* got \[8, 4\]"),
    ({"weights": [weight[None]]}, r"weights\[0\] must have shape"),
    ({"weights": [weight.bfloat16()]}, "x's dtype and device.*got torch.bfloat16"),
    ({"weights": [weight.to("meta")]}, "x's dtype and device.*meta"),
    ({"biases": [bias, bias]}, r"biases must hold 1 tensors of shape \[4\]"),
    ({"biases": [gamma]}, r"biases must hold .* got \[\[8\]\]"),
    ({"biases": [None]}, r"biases\[0\] must be a tensor.*got NoneType"),
    ({"biases": bias}, "biases must be a list.*got Tensor"),
    ({"biases": [bias.bfloat16()]}, "x's dtype and device.*got torch.bfloat16"),
    ({"bounds": (0,)}, r"2 ascending row numbers from 0 to 6, got \(0,\)"),
    ({"bounds": (6, 0)}, "ascending row numbers"),
    ({"bounds": (1, 6)}, "ascending row numbers"),
    ({"bounds": (0, 5)}, "ascending row numbers"),
    ({"bounds": (0.0, 6.0)}, r"got \(0.0, 6.0\)"),
    ({"bounds": None}, "got None"),
    ({"bounds": torch.tensor([0, 6])}, "got tensor"),
    ({"norm": ([gamma], [gamma])}, "norm must be a Norm.*got tuple"),
    ({"norm": Norm([bias], [gamma])}, r"norm.weights must hold 1 tensors of shape \[8\]"),
    ({"norm": Norm([gamma], [gamma, gamma])}, "norm.biases must hold 1"),
    ({"norm": Norm([None], [gamma])}, r"norm.weights\[0\] must be a tensor"),  # type: ignore[list-item]
    ({"norm": Norm([gamma], [gamma], -1.0)}, "norm.eps must be .* got -1.0"),
    ({"norm": Norm([gamma], [gamma], float("nan"))}, "norm.eps must be .* got nan"),
    ({"activation": "relu"}, "None or 'gelu', got 'relu'"),
    ({"activation": nn.GELU()}, "None or 'gelu', got GELU"),
    ({"residual": x}, r"residual must have shape \[M, O\] = \[6, 4\], got \[6, 8\]"),
    ({"residual": residual.bfloat16()}, "residual must have x's dtype"),
    ({"residual": [1]}, "residual must be a tensor, got list"),
    ({"rows": torch.arange(6.0)}, "rows must be int64.*got torch.float32"),
    ({"rows": torch.arange(6)[None]}, r"rows must be int64 \[R\]"),
    ({"rows": torch.tensor(1)}, r"rows must be int64 \[R\]"),
    ({"rows": [0, 1, 2, 3, 4, 5]}, "rows must be a tensor, got list"),
    ({"rows": torch.tensor([0, 1, 2, 3, 4, 6])}, "rows of x, 0 to 5, got 0 to 6"),
    ({"rows": torch.tensor([0, 1, 2, 3, 4, -1])}, "rows of x, 0 to 5, got -1 to 4"),
    ({"rows": torch.tensor([0, 1, 2, 3, 4, 4])}, "must not name a row twice"),
    ({"rows": torch.arange(3)}, "from 0 to 3, got"),
    ({"impl": "fast"}, "impl must be 'auto' or one of.*'fast'"),
    ({"impl": None}, "impl must be 'auto' or one of.*None"),
]

layout = TokenLayout.from_lengths([2, 1], [1, 2])
q = torch.randn(6, 8)


def attention(**changes: Any) -> Tensor:
    options: dict[str, Any] = {"q": q, "k": q, "v": q, "layout": layout, "num_heads": 2} | changes
    return shared_attention(**options)


BAD_ATTENTION: list[tuple[dict[str, Any], str]] = [
    ({"q": [1]}, "q must be a tensor, got list"),
    ({"q": q[None]}, r"q must have shape \[Rq, H \* D\].*got \[1, 6, 8\]"),
    ({"q": q[0]}, r"q must have shape .*got \[8\]"),
    ({"q": q.long(), "k": q.long(), "v": q.long()}, "floating-point dtype, got torch.int64"),
    ({"q": q[:5]}, "one row per query: 6, got 5"),
    ({"k": q[:5]}, r"k must have shape \[R, C\] = \[6, 8\], got \[5, 8\]"),
    ({"k": None}, "k must be a tensor, got NoneType"),
    ({"v": q[:, :4]}, r"v must have shape .* got \[6, 4\]"),
    ({"k": q.bfloat16()}, "k must have q's dtype and device.*got torch.bfloat16"),
    ({"v": q.to("meta")}, "v must have q's dtype and device.*meta"),
    ({"num_heads": 3}, "num_heads = 3"),
    ({"num_heads": 0}, "num_heads = 0"),
    ({"num_heads": -2}, "num_heads = -2"),
    ({"num_heads": 2.0}, "num_heads must be an integer, got 2.0"),
    ({"num_heads": None}, "num_heads must be an integer, got None"),
    ({"scale": float("nan")}, "scale must be a number.*got nan"),
    ({"scale": float("inf")}, "scale must be a number.*got inf"),
    ({"scale": -1.0}, "scale must be a number.*got -1.0"),
    ({"scale": "1"}, "scale must be a number.*got '1'"),
    ({"layout": None}, "layout must be a TokenLayout, got NoneType"),
    ({"layout": ([2], [1])}, "layout must be a TokenLayout, got tuple"),
    ({"layout": TokenLayout.from_lengths([2], [1])}, "one row per query: 3, got 6"),
    ({"mask": "prefix"}, "'bidirectional', 'seq2seq', 'causal'.*got 'prefix'"),
    ({"mask": None}, "mask must be one of .* got NoneType"),
    ({"mask": [[True]]}, "mask must be one of .* got list"),
    ({"mask": torch.zeros(4, 4)}, r"bool, .*\[4, 4\] or \[2, 4, 4\], got torch.float32"),
    ({"mask": torch.zeros(5, 5, dtype=torch.bool)}, r"got torch.bool of shape \[5, 5\]"),
    ({"mask": torch.zeros(3, 4, 4, dtype=torch.bool)}, r"of shape \[3, 4, 4\]"),
    ({"mask": torch.zeros(4, 4, dtype=torch.bool, device="meta")}, "device cpu, got meta"),
    ({"queries": (1,)}, "queries must be a TokenLayout, got tuple"),
    ({"queries": TokenLayout.from_lengths([2, 1], [1, 2])}, "must come from layout.select"),
    ({"queries": TokenLayout.from_lengths([2, 2], [1, 1])}, "must come from layout.select"),
    ({"q": q[:4], "queries": layout.select("first", "first")}, "TokenLayout, got Selection"),
    ({"impl": "fast"}, "impl must be 'auto' or one of.*'fast'"),
]


@pytest.mark.parametrize("impl", ["auto", "composite", "reference", "cpu"])
@pytest.mark.parametrize(("changes", "message"), BAD_LINEAR, ids=_name)
def test_expert_linear(impl: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        linear(**({"impl": impl} | changes))


@pytest.mark.parametrize("impl", ["auto", "composite", "reference"])
@pytest.mark.parametrize(("changes", "message"), BAD_ATTENTION, ids=_name)
def test_shared_attention(impl: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        attention(**({"impl": impl} | changes))


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
    ({"textual_tokens": text[:1, :1].expand(1, 1023)}, "at most 1022 tokens, got one of 1023"),
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
    ({"textual_tokens": text, "positions": text - 1}, "at least 0, got -1"),
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


@pytest.mark.parametrize(("inputs", "message"), FORWARD, ids=_name)
@pytest.mark.parametrize("train", [False, True])
def test_forward(inputs: dict[str, Any], message: str, train: bool) -> None:
    with torch.set_grad_enabled(train), pytest.raises(Beit3FastError, match=message):
        create_model(TINY)(**inputs)


@pytest.mark.parametrize(("inputs", "message"), PACKED, ids=_name)
def test_forward_packed(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(Beit3FastError, match=message):
        create_model(TINY).forward_packed(**inputs)


@pytest.mark.parametrize(("inputs", "message"), ENCODE, ids=_name)
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


PATHS: tuple[Any, ...] = (None, 3, 1.5, [], object(), torch.zeros(2), b"x.pth")


@pytest.mark.parametrize("value", PATHS, ids=lambda v: type(v).__name__)
def test_paths_that_are_no_paths(value: Any) -> None:
    model = create_model(TINY)
    for call in (
        lambda: beit3_fast.load_checkpoint(model, value),
        lambda: beit3_fast.save_checkpoint(model, value),
    ):
        with pytest.raises((CheckpointError, TypeError), match=r"expected|needs|argument|must"):
            call()


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    model = create_model(TINY)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for path in (
        tmp_path,
        tmp_path / "missing.pth",
        tmp_path / "empty.pth",
        tmp_path / "text.safetensors",
        tmp_path / "folder" / "x.pth",
        "",
    ):
        with pytest.raises(CheckpointError):
            beit3_fast.load_checkpoint(model, path)
        with pytest.raises(CheckpointError):
            create_model(TINY, checkpoint=path)
    for path in (tmp_path, tmp_path / "x", tmp_path / "x.zip", tmp_path / "folder" / "x.pth"):
        with pytest.raises(CheckpointError, match=str(path)):
            beit3_fast.save_checkpoint(model, path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("value", NOT_MODELS, ids=lambda v: type(v).__name__)
def test_saving_what_is_not_a_model(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        beit3_fast.save_checkpoint(value, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


TOKENIZERS: tuple[Any, ...] = ("", "missing.spm", b"", b"no model", 3, 1.5, {}, [])


@pytest.mark.parametrize("value", TOKENIZERS, ids=lambda v: repr(v)[:20])
def test_tokenizer_files(value: Any) -> None:
    for make in (beit3_fast.Tokenizer, beit3_fast.Processor):
        with pytest.raises((InputError, TypeError), match=r"expected|argument|cannot|must|not a"):
            make(value)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "round"},
        {"preset": 3},
        {"image_size": 0},
        {"image_size": -32},
        {"image_size": (32,)},
        {"image_size": "large"},
        {"max_length": 0},
        {"max_length": 2.5},
        {"padding": "left"},
        {"padding": None},
    ],
    ids=str,
)
def test_processor_options(options: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, InputError), match="got"):
        beit3_fast.Processor(**options)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (None, None),
        ([], None),
        (3, None),
        ("missing.jpg", None),
        (b"not an image", None),
        ([torch.zeros(2)], None),
        (torch.zeros(3, 0, 5), None),
        (None, "no tokenizer"),
    ],
)
def test_processor_inputs(images: Any, text: Any) -> None:
    with pytest.raises((InputError, ConfigError)):
        beit3_fast.Processor()(images, text)


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
