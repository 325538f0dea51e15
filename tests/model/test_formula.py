"""The backbone against the formula written sample by sample in fp64: every form, every kind of batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formula import Formula, Sample
from model_cases import FORMS, TINY, backbone, images, need, padding, texts
from torch import Tensor

from beit3_fast.config import BEiT3Config
from beit3_fast.model import BEiT3
from beit3_fast.model.beit3 import Encoded
from beit3_fast.ops import MASKS
from beit3_fast.parity import assert_parity, model_parity

IMPLS = ("reference", "composite", "cpu", "auto")


def samples_of(config: BEiT3Config) -> list[tuple[Tensor | None, Tensor | None]]:
    """Images, texts and pairs in no order, texts of different lengths."""
    pictures, words = images(4, config), texts(4, 9, config)
    return [
        (pictures[0], words[0, :5]),
        (None, words[1, :3]),
        (pictures[1], None),
        (pictures[2], words[2, :1]),
        (None, words[3]),
        (pictures[3], None),
    ]


def assert_rows(encoded: Encoded, expected: list[Sample]) -> None:
    layout = encoded.layout
    for packed, sample in enumerate(layout.order):
        vision, text = layout.segments(packed)
        for rows, truth in (
            (encoded.rows[vision], expected[sample].vision),
            (encoded.rows[text], expected[sample].text),
        ):
            if len(truth):
                assert_parity(model_parity(rows, truth), f"sample {sample}")
            else:
                assert len(rows) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_batches(form: str, impl: str) -> None:
    need(impl)
    config = FORMS[form]
    model, samples = backbone(config, impl), samples_of(config)
    formula = Formula(model.state_dict(), config)
    with torch.no_grad():
        encoded = model.forward_packed(*zip(*samples, strict=True))
    assert encoded.layout.image_only == 2
    assert encoded.layout.text_only == 2
    assert_rows(encoded, [formula(*sample) for sample in samples])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("impl", IMPLS)
def test_masks(mask: str, form: str, impl: str) -> None:
    need(impl)
    config = FORMS[form]
    model, samples = backbone(config, impl), samples_of(config)
    formula = Formula(model.state_dict(), config)
    with torch.no_grad():
        encoded = model.forward_packed(*zip(*samples, strict=True), mask=mask)
    assert_rows(encoded, [formula(*sample, mask=mask) for sample in samples])


@pytest.mark.parametrize("form", FORMS)
def test_hidden_states(form: str) -> None:
    config = FORMS[form]
    model, samples = backbone(config), samples_of(config)
    formula = Formula(model.state_dict(), config)
    with torch.no_grad():
        encoded = model.forward_packed(
            *zip(*samples, strict=True),
            read_vision="first",
            read_text="none",
            return_all_hiddens=True,
        )
        whole = model.forward_packed(*zip(*samples, strict=True))
    assert len(encoded.hidden_states) == config.num_layers + 1
    for depth, state in enumerate(encoded.hidden_states):
        for packed, sample in enumerate(whole.layout.order):
            truth = formula(*samples[sample]).states[depth]
            for part, own in zip(whole.layout.segments(packed), truth, strict=True):
                if len(own):
                    assert_parity(model_parity(state[part], own), f"layer {depth}")


def blocked(mask: str, num_vision: int, num_text: int) -> Tensor | None:
    """A mask structure in torchscale's form, ones where blocked."""
    tokens = num_vision + num_text
    if mask == "bidirectional":
        return None
    if mask == "causal":
        return torch.ones(tokens, tokens).triu(1)
    grid = torch.ones(tokens, tokens).triu(1)
    grid[:num_vision, :num_vision] = 0
    return grid


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["image", "text", "pair"])
@pytest.mark.parametrize("impl", IMPLS)
def test_padded_batches(mask: str, kind: str, impl: str) -> None:
    need(impl)
    model = backbone(TINY, impl)
    lengths, tokens = [4, 7, 0, 1], 7
    if kind == "text":
        lengths[2] = 2
    image = images(4) if kind != "text" else None
    text = texts(4, tokens) if kind != "image" else None
    pad = padding(lengths, tokens) if text is not None else None
    num_vision = 0 if image is None else TINY.num_vision_tokens
    attn_mask = blocked(mask, num_vision, 0 if text is None else tokens)
    with torch.no_grad():
        out = model(text, image, pad, attn_mask=attn_mask)
    formula = Formula(model.state_dict(), TINY)
    rows = out["encoder_out"]
    assert rows.shape == (4, num_vision + (tokens if text is not None else 0), 64)
    for sample in range(4):
        own = None if text is None else text[sample, : lengths[sample]]
        truth = formula(None if image is None else image[sample], own, mask)
        assert_parity(model_parity(rows[sample, :num_vision], truth.vision))
        if own is not None and len(own):
            end = num_vision + len(own)
            assert_parity(model_parity(rows[sample, num_vision:end], truth.text))
        if text is not None:
            assert not rows[sample, num_vision + lengths[sample] :].any()
    if text is None:
        assert out["multiway_split_position"] == -1
    else:
        assert out["multiway_split_position"] == num_vision
        assert torch.equal(out["encoder_padding_mask"][:, num_vision:], pad)
    assert not out["encoder_padding_mask"][:, :num_vision].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_patches(impl: str, dtype: torch.dtype) -> None:
    need(impl)
    model, picture = backbone(TINY, impl), images(2)
    masked = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    formula = Formula(model.state_dict(), TINY)
    with torch.no_grad():
        rows = model(visual_tokens=picture, vision_masked_position=masked.to(dtype))["encoder_out"]
        clean = model(visual_tokens=picture)["encoder_out"]
    for sample in range(2):
        truth = formula(picture[sample], None, masked=masked[sample])
        assert_parity(model_parity(rows[sample], truth.vision))
    assert (rows - clean).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(32, 32), (48, 48), (16, 16), (16, 64), (64, 16), (80, 48)])
@pytest.mark.parametrize("form", ["released", "wide image", "paper, all layers"])
def test_other_image_sizes(shape: tuple[int, int], form: str) -> None:
    config = FORMS[form]
    model = backbone(config)
    height, width = (size // 16 * config.patch_size for size in shape)
    picture, words = torch.randn(2, 3, height, width), texts(2, 4, config)
    formula = Formula(model.state_dict(), config)
    with torch.no_grad():
        out = model(words, picture)["encoder_out"]
        packed = model.forward_packed(list(picture), list(words))
    with torch.enable_grad():
        again = model(words, picture)["encoder_out"]
    truths = [formula(picture[s], words[s]) for s in range(2)]
    for sample, truth in enumerate(truths):
        whole = torch.cat([truth.vision, truth.text])
        assert_parity(model_parity(out[sample], whole))
        assert_parity(model_parity(again[sample].detach(), whole))
    assert_rows(packed, truths)


def test_images_of_several_sizes_in_one_batch() -> None:
    model = backbone()
    shapes = [(32, 32), (48, 16), (48, 16), (32, 32), (16, 16)]
    pictures = [torch.randn(3, *shape) for shape in shapes]
    words = [texts(1, 4)[0], None, texts(1, 2)[0], None, texts(1, 6)[0]]
    formula = Formula(model.state_dict(), TINY)
    with torch.no_grad():
        encoded = model.forward_packed(pictures, words)
    truths = [formula(image, text) for image, text in zip(pictures, words, strict=True)]
    assert_rows(encoded, truths)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(32, 32), (48, 16)])
def test_sixteen_bits(dtype: str, shape: tuple[int, int]) -> None:
    """Within the rounding of a 16-bit dtype, also where positions are interpolated."""
    model = backbone()
    picture, words = torch.randn(2, 3, *shape), texts(2, 5)
    formula = Formula(model.state_dict(), TINY)
    narrow = getattr(torch, dtype)
    model = model.to(narrow)
    with torch.no_grad():
        out = model(words, picture.to(narrow))["encoder_out"]
    assert out.dtype == narrow
    for sample in range(2):
        truth = formula(picture[sample], words[sample])
        whole = torch.cat([truth.vision, truth.text])
        error = (out[sample].double() - whole).pow(2).mean().sqrt() / whole.pow(2).mean().sqrt()
        assert error < (0.05 if narrow is torch.bfloat16 else 0.01)


@pytest.mark.parametrize("modality", ["vision", "text"])
@pytest.mark.parametrize("form", ["released", "paper", "decoupled with pair experts"])
def test_one_branch_alone(modality: str, form: str) -> None:
    config = FORMS[form]
    whole = backbone(config)
    part = BEiT3(config.replace(modalities=(modality,))).eval()
    own = {name: t for name, t in whole.state_dict().items() if name in part.state_dict()}
    part.load_state_dict(own)
    other = "B" if modality == "vision" else "A"
    assert not any(f".{other}." in name or ".C." in name for name in own)
    inputs: dict[str, Any] = {"visual_tokens": images(2, config)}
    if modality == "text":
        inputs = {"textual_tokens": texts(2, 6, config)}
    with torch.no_grad():
        torch.testing.assert_close(part(**inputs)["encoder_out"], whole(**inputs)["encoder_out"])


def test_positions_may_be_given_for_a_text() -> None:
    model, words = backbone(), texts(2, 3)
    with torch.no_grad():
        usual = model(words)["encoder_out"]
        same = model(words, positions=torch.arange(2, 5)[None])["encoder_out"]
        later = model(words, positions=torch.arange(7, 10)[None])["encoder_out"]
        both = model(words, positions=torch.tensor([[2, 3, 4], [7, 8, 9]]))["encoder_out"]
    torch.testing.assert_close(same, usual)
    assert (later - usual).abs().max() > 0.01
    torch.testing.assert_close(both, torch.stack([usual[0], later[1]]))


def test_embeddings_come_back_without_positions() -> None:
    model, picture, words = backbone(), images(2), texts(2, 3)
    with torch.no_grad():
        out = model(words, picture, padding([3, 1], 3))
        embedded = out["encoder_embedding"]
    state = model.state_dict()
    torch.testing.assert_close(embedded[0, 5:], state["text_embed.weight"][words[0]])
    torch.testing.assert_close(embedded[1, 0], state["vision_embed.cls_token"][0, 0])
    assert not embedded[1, 6:].any()
