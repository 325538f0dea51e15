"""Captions of the model: token for token those of the released beam search, the image computed once."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
import torch
from _compat import (
    DTYPES,
    SHAPES,
    impls,
    need_torchscale,
    official_caption_step,
    official_task,
    reorder_cache,
)
from model_cases import FORMS, randomize
from torch import Tensor

from beit3_fast.model import BEiT3ForCaptioning, caption_cache, captioning, decoding
from beit3_fast.model.decoding import CaptionDecoder
from beit3_fast.ops import library
from beit3_fast.parity import assert_parity, model_parity
from bench.official_captioning import official_captions

need_torchscale()

MASK = 101
# Impossible, rare and likely ends: captions of the full length, of mixed lengths, and short ones.
ENDS = {"never": -20.0, "mixed": 3.0, "soon": 5.0}


@cache
def official(shape: str, end: str = "mixed", words_only: bool = False, dtype: str = "fp32") -> Any:
    model = official_task("captioning", SHAPES[shape])
    with torch.no_grad():
        model.mlm_head.weight *= 6
        model.mlm_head.bias[2] += ENDS[end]
        if words_only:
            model.mlm_head.bias[[0, 1, *range(MASK, 120)]] = -1e4
    return model.to(DTYPES[dtype])


def ours(theirs: Any, impl: str = "auto") -> BEiT3ForCaptioning:
    sizes = theirs.beit3.args.encoder_embed_dim, theirs.beit3.args.encoder_ffn_embed_dim
    config = next(c for c in SHAPES.values() if (c.embed_dim, c.ffn_dim) == sizes)
    model = BEiT3ForCaptioning(config, impl).to(theirs.mlm_head.weight.dtype)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def photos(count: int, dtype: str = "fp32", pixels: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, pixels, pixels, generator=generator).to(DTYPES[dtype])


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("penalty", [0.6, 0.0, 2.0])
def test_token_for_token(penalty: float, beams: int, end: str) -> None:
    theirs = official("base", end)
    kept = min(beams, 3)
    expected = official_captions(theirs, photos(5), MASK, beams, 9, penalty, kept)
    found = ours(theirs).caption(photos(5), beams, 9, penalty, kept, mask_id=MASK, compat=True)
    for mine, released in zip(found, expected, strict=True):
        assert [c.tokens for c in mine] == [c.tokens for c in released]
        assert [c.score for c in mine] == pytest.approx([c.score for c in released], abs=2e-5)
    if end == "mixed" and penalty == 0.6 and beams > 1:
        assert len({len(c.tokens) for own in found for c in own}) > 2


@pytest.mark.parametrize("shape", ["large", "d64", "d88"])
@pytest.mark.parametrize("impl", ["reference", "composite"])
def test_token_for_token_in_other_shapes(impl: str, shape: str) -> None:
    theirs = official(shape)
    expected = official_captions(theirs, photos(3), MASK, max_length=8)
    found = ours(theirs, impl).caption(photos(3), max_length=8, mask_id=MASK, compat=True)
    assert [own[0].tokens for own in found] == [own[0].tokens for own in expected]


@pytest.mark.parametrize("end", ENDS)
def test_what_is_mended_adds_words_and_changes_nothing_else(end: str) -> None:
    """A model that never chooses what is no word: only captions that were cut differ, by the word they had lost."""
    theirs = official("base", end, words_only=True)
    expected = official_captions(theirs, photos(6), MASK, max_length=8, kept=3)
    found = ours(theirs).caption(photos(6), 3, 8, 0.6, 3, mask_id=MASK)
    cut = 0
    for mine, released in zip(found, expected, strict=True):
        assert [c.score for c in mine] == pytest.approx([c.score for c in released], abs=2e-5)
        for own, other in zip(mine, released, strict=True):
            assert own.tokens[: len(other.tokens)] == other.tokens
            assert len(own.tokens) == len(other.tokens) + (not own.ended)
            cut += not own.ended
    assert cut or end == "soon"


@pytest.mark.parametrize("shape", ["base", "d88"])
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32", "bf16", "fp16"))
@torch.no_grad()
def test_logits_of_every_step(impl: str, dtype: str, shape: str) -> None:
    """Six steps with beams that cross, against the released calls: one row and one cache for each beam."""
    theirs = official(shape, dtype=dtype)
    mine = steps_of_ours(ours(theirs, impl), photos(3, dtype))
    truth, plain = (
        steps_of_theirs(official(shape, dtype=d), photos(3, d)) for d in ("fp32", dtype)
    )
    assert len(mine) == 6
    for step, outputs in enumerate(zip(mine, truth, plain, strict=True)):
        assert_parity(model_parity(*outputs), f"step {step}")


WORDS = torch.randint(3, 100, (6, 3, 2), generator=torch.Generator().manual_seed(3))
PARENTS = torch.tensor([[[0, 0]] * 3, *[[[1, 0], [1, 1], [0, 0]], [[0, 1], [1, 0], [1, 1]]] * 3])


def steps_of_ours(model: BEiT3ForCaptioning, images: Tensor) -> list[Tensor]:
    decoder = CaptionDecoder(model, images, width=2, max_words=6, bos=0, mask=MASK)
    out = [decoder.logits(decoder.start()[:, None]).expand(-1, 2, -1)]
    return out + [decoder.logits(decoder.step(WORDS[i], PARENTS[i])) for i in range(5)]


def steps_of_theirs(model: Any, images: Tensor) -> list[Tensor]:
    state: dict[int, dict[str, Tensor]] = {}
    words = torch.zeros(6, dtype=torch.int64)
    out = []
    for step in range(6):
        text = torch.stack([words, torch.full_like(words, MASK)], dim=1)
        shown = images.repeat_interleave(2, dim=0) if step == 0 else None
        logits = official_caption_step(model, shown, text, state, step + 2)
        out.append(logits[:, 1].unflatten(0, (3, 2)))
        if step < 5:
            beams = PARENTS[step] + torch.arange(3)[:, None] * 2
            reorder_cache(state, beams.flatten())
            words = WORDS[step].flatten()
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@torch.no_grad()
def test_the_cache_gives_what_a_whole_forward_gives(impl: str, form: str) -> None:
    """Every form of the model, pair experts included, in fp64: the mask row after four words."""
    config = FORMS[form]
    model = randomize(BEiT3ForCaptioning(config, impl)).double()
    images = torch.randn(2, 3, *config.image_shape, dtype=torch.float64)
    decoder = CaptionDecoder(model, images, width=1, max_words=5, bos=0, mask=91)
    rows = [decoder.start()[:, None]]
    words = torch.tensor([[5, 6, 7, 8], [50, 60, 70, 80]])
    for step in range(4):
        rows.append(decoder.step(words[:, step : step + 1], torch.zeros(2, 1).long()))
    for step, own in enumerate(map(decoder.logits, rows)):
        text = torch.cat([torch.zeros(2, 1).long(), words[:, :step], torch.full((2, 1), 91)], 1)
        chosen = torch.zeros_like(text)
        chosen[:, -1] = 1
        whole, _ = model(images, text, None, chosen)
        assert torch.allclose(own[:, 0], whole, atol=1e-9)


def test_images_of_any_size_and_number() -> None:
    """A list that mixes sizes gives what each image gives alone, however many are decoded at once."""
    model = ours(official("base"))
    images = [*photos(3), *photos(2, pixels=32), photos(1, pixels=80)[0], photos(4)[3]]
    options = {"max_length": 8, "mask_id": MASK}
    alone = [model.caption(image, **options)[0] for image in images]
    for batch_size in (1, 2, 16):
        together = model.caption(images, batch_size=batch_size, **options)
        for own, other in zip(together, alone, strict=True):
            assert own[0].tokens == other[0].tokens
            assert own[0].score == pytest.approx(other[0].score, abs=1e-5)


def test_images_that_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(official("base"))
    expected = model.caption(photos(5), max_length=8, mask_id=MASK)
    monkeypatch.setattr(decoding, "_ROWS_AT_ONCE", 20)
    found = model.caption(photos(5), max_length=8, mask_id=MASK)
    assert [own[0].tokens for own in found] == [own[0].tokens for own in expected]


@pytest.mark.parametrize("beams", [1, 3])
def test_where_leaving_means_moving_the_cache(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does: one attention call for all images, and finished images leave together."""
    model = ours(official("base", "soon"))
    options = {"num_beams": beams, "max_length": 10, "mask_id": MASK}
    expected = model.caption(photos(9), **options)
    moved: list[int] = []

    class Moving(CaptionDecoder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.keep_is_free = False

        def keep(self, inputs: Tensor) -> None:
            moved.append(len(inputs))
            super().keep(inputs)
            assert {cache.num_samples for cache in self.caches} == {len(inputs)}

    monkeypatch.setattr("beit3_fast.generate.decoder._STEPS_BETWEEN_QUESTIONS", 1)
    monkeypatch.setattr(captioning, "CaptionDecoder", Moving)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = model.caption(photos(9), **options)
    assert [own[0].tokens for own in found] == [own[0].tokens for own in expected]
    assert moved


@pytest.mark.parametrize("impl", ["cpu", "composite"])
def test_what_is_computed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is encoded once; a step has two rows a beam, of which one meets the vocabulary; keys stay put."""
    if impl == "cpu" and not library.available():
        pytest.skip(f"the library {library.why_unavailable()}")
    model = ours(official("base", "never"), impl)
    layers, vocabulary = model.config.num_layers, model.config.vocab_size
    images: list[int] = []
    rows: list[int] = []
    heads: list[int] = []
    caches: set[int] = set()
    packed: list[int] = []
    head, embed = decoding.head_top_k, decoding.embed_padded
    attention, pack = caption_cache.measured_cached_attention, caption_cache.pack_keys
    whole = caption_cache.decoder_layer

    def spy_head(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        assert weight.shape[0] == vocabulary
        heads.append(len(x))
        return head(x, weight, *rest, **options)

    def spy_attention(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        rows.append(q.shape[0] * q.shape[1])
        image = options.get("prefix")
        caches.add((k if image is None else image.packed).untyped_storage().data_ptr())
        return attention(q, k, *rest, **options)

    def spy_layer(x: Tensor, *rest: Any, **options: Any) -> Any:
        rows.append(options["seen"].shape[0] * options["seen"].shape[1])
        caches.add(options["prefix"].packed.untyped_storage().data_ptr())
        return whole(x, *rest, **options)

    def spy_pack(k: Tensor, *rest: Any, **options: Any) -> Any:
        packed.append(len(k))
        return pack(k, *rest, **options)

    def spy_embed(model: Any, image: Tensor, *rest: Any) -> Any:
        images.append(len(image))
        return embed(model, image, *rest)

    monkeypatch.setattr(decoding, "head_top_k", spy_head)
    monkeypatch.setattr(caption_cache, "measured_cached_attention", spy_attention)
    monkeypatch.setattr(caption_cache, "decoder_layer", spy_layer)
    monkeypatch.setattr(caption_cache, "pack_keys", spy_pack)
    monkeypatch.setattr(decoding, "embed_padded", spy_embed)
    model.caption(photos(4), num_beams=3, max_length=7, mask_id=MASK)
    assert sum(images) == 4
    assert heads == [4, 12, 12, 12, 12]
    assert len(caches) == layers
    assert sum(packed) == (4 * layers if impl == "cpu" else 0)
    assert rows == [8, 4] + [24, 12] * 4


def test_streaming_is_greedy() -> None:
    model = ours(official("base"))
    for image in photos(4):
        ((caption,),) = model.caption(image, 1, 9, 0.0, mask_id=MASK)
        steps = list(model.stream_caption(image, 9, mask_id=MASK))
        assert tuple(step.token for step in steps) == caption.tokens


def test_streaming_leaves_the_caller_s_mode_alone() -> None:
    model = ours(official("base", "never"))
    steps = model.stream_caption(photos(1), 9, mask_id=MASK)
    next(steps)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.empty(1).is_inference()
    steps.close()


def test_drawing_is_repeatable() -> None:
    model = ours(official("base"))
    options = {"num_return_sequences": 4, "sample": True, "mask_id": MASK, "max_length": 8}
    first = model.caption(photos(3), 1, seed=5, batch_size=2, **options)
    assert first == model.caption(photos(3), 1, seed=5, batch_size=2, **options)
    assert first != model.caption(photos(3), 1, seed=6, batch_size=2, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_for_inference_only(dtype: str) -> None:
    from beit3_fast.model import create_model
    from beit3_fast.model.registry import for_inference

    name = "beit3_tiny_patch16_32_captioning"
    model = randomize(create_model(name, embed_dim=128)).to(getattr(torch, dtype))
    images = photos(3, pixels=32)
    expected = model.caption(images, max_length=8, mask_id=91)
    found = for_inference(model).caption(images, max_length=8, mask_id=91)
    if dtype == "float32":
        assert [own[0].tokens for own in found] == [own[0].tokens for own in expected]
    scores = [own[0].score for own in expected]
    assert [own[0].score for own in found] == pytest.approx(scores, abs=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"compat": True}, {"num_beams": 1}, {"num_beams": 1, "sample": True, "seed": 3}]
)
def test_double_precision(options: dict[str, Any]) -> None:
    model = ours(official("base"))
    expected = model.caption(photos(5), max_length=9, mask_id=MASK, **options)
    found = model.double().caption(photos(5), max_length=9, mask_id=MASK, **options)
    for (mine,), (single,) in zip(found, expected, strict=True):
        assert mine.tokens == single.tokens
        assert mine.score == pytest.approx(single.score, abs=2e-5)


def test_threads_do_not_meet() -> None:
    model = ours(official("base"))
    expected = [model.caption(image, max_length=8, mask_id=MASK) for image in photos(4)]
    found: list[Any] = [None] * 4

    def work(index: int) -> None:
        found[index] = model.caption(photos(4)[index], max_length=8, mask_id=MASK)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_grad_mode_and_training_mode_do_not_matter() -> None:
    model = ours(official("base"))
    expected = model.caption(photos(2), max_length=8, mask_id=MASK)
    model.train()
    assert model.caption(photos(2), max_length=8, mask_id=MASK) == expected
    assert all(parameter.grad is None for parameter in model.parameters())
