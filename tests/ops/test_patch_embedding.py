"""patch_embedding: every implementation against the formula in fp64, by the one parity rule."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, IMPLS, TARGETS, assert_near, need, values
from torch import Tensor

from beit3_fast.errors import ShapeError
from beit3_fast.ops.patch_embedding import patch_embedding, patch_embedding_and_words
from beit3_fast.parity import op_parity

SIZES = {  # batch, channels, rows and columns of patches, patch, width
    "base's patch": (2, 3, 3, 5, 16, 96),
    "giant's patch": (1, 3, 4, 2, 14, 88),
    "odd": (3, 2, 1, 7, 3, 35),
    "one patch": (5, 1, 1, 1, 5, 1),
    "several blocks of rows": (2, 3, 14, 15, 4, 40),
}
OPTIONS = {
    "all": {},
    "no positions": {"positions": False},
    "no bias": {"bias": False},
    "unmasked": {"masked": "none"},
    "all masked": {"masked": "all"},
    "bare": {"positions": False, "bias": False, "masked": "none"},
}


class Operands(NamedTuple):
    images: Tensor
    weight: Tensor
    bias: Tensor | None
    cls_token: Tensor
    mask_token: Tensor
    positions: Tensor | None
    masked: Tensor | None

    def to(self, dtype: torch.dtype) -> Operands:
        return Operands(*(t if t is None or t.dtype is torch.bool else t.to(dtype) for t in self))


def operands(
    size: str,
    dtype: torch.dtype,
    kind: str = "normal",
    *,
    bias: bool = True,
    positions: bool = True,
    masked: str = "some",
) -> Operands:
    batch, channels, rows, columns, patch, width = SIZES[size]
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return values(kind, shape[0], shape[1], generator)

    images = make(batch, channels * rows * columns * patch * patch)
    weight = make(width, channels * patch * patch) * 0.05
    mask = torch.rand(batch, rows * columns, generator=generator) < {"some": 0.4, "all": 2}.get(
        masked, 0
    )
    return Operands(
        images.view(batch, channels, rows * patch, columns * patch),
        weight.view(width, channels, patch, patch),
        make(1, width)[0] if bias else None,
        make(1, width)[0],
        make(1, width)[0],
        make(1 + rows * columns, width) if positions else None,
        None if masked == "none" else mask,
    ).to(dtype)


def plain(own: Operands) -> Tensor:
    """The same by PyTorch's convolution, in the operands' dtype."""
    x = F.conv2d(own.images, own.weight, own.bias, stride=own.weight.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    if own.masked is not None:
        x = torch.where(own.masked[..., None], own.mask_token, x)
    x = torch.cat([own.cls_token.expand(len(x), 1, -1), x], dim=1)
    return x if own.positions is None else x + own.positions


def check(own: Operands, impl: str) -> None:
    need(impl)
    ours = patch_embedding(*own, impl=impl)
    truth = plain(own.to(torch.float64))
    assert ours.dtype == own.images.dtype
    assert_near(op_parity(ours, plain(own), truth), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_formula_is_a_convolution(impl: str) -> None:
    own = operands("odd", torch.float64)
    if impl == "cpu":
        own = own.to(torch.float32)
        need(impl)
    ours = patch_embedding(*own, impl=impl)
    torch.testing.assert_close(ours, plain(own))
    assert torch.equal(ours[own.masked.nonzero()[0, 0]].isfinite(), torch.ones_like(ours[0]).bool())


@pytest.mark.parametrize(("impl", "dtype"), TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, impl: str, dtype: str) -> None:
    check(operands(size, DTYPES[dtype]), impl)


@pytest.mark.parametrize(("impl", "dtype"), TARGETS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, impl: str, dtype: str) -> None:
    check(operands("base's patch", DTYPES[dtype], **OPTIONS[option]), impl)


@pytest.mark.parametrize(("impl", "dtype"), TARGETS)
@pytest.mark.parametrize("kind", ["mean", "outliers", "constant", "small"])
def test_values(kind: str, impl: str, dtype: str) -> None:
    if dtype == "fp16" and kind == "outliers":
        pytest.skip("the products overflow fp16")
    check(operands("giant's patch", DTYPES[dtype], kind), impl)


@pytest.mark.parametrize(("impl", "dtype"), TARGETS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("option", ["all", "no bias", "unmasked"])
def test_rows_and_words(option: str, size: str, impl: str, dtype: str) -> None:
    """Both are what two calls give, with positions and without them."""
    need(impl)
    own = operands(size, DTYPES[dtype], **OPTIONS[option])
    assert own.positions is not None
    rows, words = patch_embedding_and_words(*own, impl=impl)
    assert torch.equal(rows, patch_embedding(*own, impl=impl))
    assert torch.equal(words, patch_embedding(*own._replace(positions=None), impl=impl))


def test_gradients_of_words() -> None:
    own = operands("odd", torch.float64)
    leaves = [t.requires_grad_() for t in own if t is not None and t.is_floating_point()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return patch_embedding_and_words(*tensors, own.masked)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_masked_patch_is_not_read(impl: str) -> None:
    need(impl)
    own = operands("base's patch", torch.float32)
    assert own.masked is not None
    wanted = patch_embedding(*own, impl=impl)
    grid = own.masked.view(2, 3, 5).repeat_interleave(16, 1).repeat_interleave(16, 2)
    spoilt = own._replace(images=own.images.masked_fill(grid[:, None], torch.nan))
    assert torch.equal(patch_embedding(*spoilt, impl=impl), wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["channels last", "sliced", "positions of a larger table", "0/1"])
def test_memory_of_the_operands_does_not_matter(case: str, impl: str) -> None:
    need(impl)
    own = operands("base's patch", torch.float32)
    assert own.positions is not None
    assert own.masked is not None
    wanted = patch_embedding(*own, impl=impl)
    other = {
        "channels last": lambda: own._replace(
            images=own.images.to(memory_format=torch.channels_last)
        ),
        "sliced": lambda: own._replace(images=F.pad(own.images, (3, 4, 1, 2))[..., 1:-2, 3:-4]),
        "positions of a larger table": lambda: own._replace(
            positions=F.pad(own.positions, (0, 1, 2, 0))[2:, :-1]
        ),
        "0/1": lambda: own._replace(masked=own.masked.float()),
    }[case]()
    assert torch.equal(patch_embedding(*other, impl=impl), wanted)


def test_no_image() -> None:
    own = operands("base's patch", torch.float32, masked="none")
    for impl in IMPLS:
        need(impl)
        y = patch_embedding(*own._replace(images=own.images[:0]), impl=impl)
        assert y.shape == (0, 16, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_do_not_meet_and_threads_do_not_matter(dtype: torch.dtype) -> None:
    need("cpu")
    own = operands("several blocks of rows", dtype)
    assert own.masked is not None
    whole = patch_embedding(*own, impl="cpu")
    for i in range(2):
        alone = own._replace(images=own.images[i : i + 1], masked=own.masked[i : i + 1])
        assert torch.equal(patch_embedding(*alone, impl="cpu")[0], whole[i])
    for count in (1, 3, 8):
        torch.set_num_threads(count)
        assert torch.equal(patch_embedding(*own, impl="cpu"), whole)


@pytest.mark.parametrize("impl", ["reference", "composite"])
def test_gradients(impl: str) -> None:
    own = operands("odd", torch.float64)
    leaves = [t.requires_grad_() for t in own if t is not None and t.is_floating_point()]

    def run(*tensors: Tensor) -> Tensor:
        return patch_embedding(*tensors, own.masked, impl=impl)

    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_of_the_kernel_are_those_of_the_formula() -> None:
    need("cpu")
    grads = []
    for impl in ("cpu", "reference"):
        own = operands("base's patch", torch.float32)
        leaves = [t.requires_grad_() for t in own if t is not None and t.is_floating_point()]
        y = patch_embedding(*own, impl=impl)
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": torch.zeros(2, 3, 48, 81)}, "positive multiples of 16"),
        ({"images": torch.zeros(2, 4, 48, 80)}, r"images must be \[B, 3, H, W\]"),
        ({"images": torch.zeros(2, 3, 48, 80).byte()}, "normalised"),
        ({"images": torch.zeros(2, 3, 48, 80).double()}, "model's dtype"),
        ({"bias": torch.zeros(95)}, r"bias must have shape \[96\]"),
        ({"cls_token": torch.zeros(1, 1, 96)}, r"cls_token must have shape \[96\]"),
        ({"positions": torch.zeros(15, 96)}, r"positions must have shape \[16, 96\]"),
        ({"masked": torch.zeros(2, 16)}, r"\[B, patches\] = \[2, 15\]"),
    ],
)
def test_operands_that_do_not_fit(change: dict[str, Any], said: str) -> None:
    own = operands("base's patch", torch.float32)._replace(**change)
    with pytest.raises(ShapeError, match=said):
        patch_embedding(*own)
