"""What must hold for any batch, whatever the numbers: the model as a function of its samples."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import FORMS, TINY, backbone, images, padding, task_model, texts
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.model import BEiT3
from beit3_fast.ops import MASKS, Norm, expert_linear, library, shared_attention

IMPLS = ["reference", "composite", *(["cpu"] if library.available() else [])]
impls = st.sampled_from(IMPLS)
forms = st.sampled_from(["released", "paper", "decoupled with pair experts"])
masks = st.sampled_from(MASKS)
seeds = st.integers(0, 2**16)
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=4)
# A sample: text tokens or none, and whether there is an image; never neither.
samples = st.lists(
    st.tuples(st.integers(0, 5), st.booleans()).filter(lambda s: s[0] > 0 or s[1]),
    min_size=1,
    max_size=5,
)
Nv = TINY.num_vision_tokens


@cache
def model_of(form: str, impl: str) -> BEiT3:
    return backbone(FORMS[form], impl)


@cache
def captioner(fused: int) -> Any:
    return task_model("captioning", vl_expert_layers=fused)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def draw(batch: list[tuple[int, bool]], form: str, seed: int) -> tuple[list[Any], list[Any]]:
    config = FORMS[form]
    pictures, words = images(len(batch), config, seed), texts(len(batch), 6, config, seed + 1)
    return (
        [pictures[i] if image else None for i, (_, image) in enumerate(batch)],
        [words[i, :tokens] if tokens else None for i, (tokens, _) in enumerate(batch)],
    )


def by_sample(model: BEiT3, batch: tuple[list[Any], list[Any]], **options: Any) -> list[Tensor]:
    """Rows of each of the caller's samples, vision then text."""
    encoded = model.forward_packed(*batch, **options)
    layout = encoded.layout
    rows: dict[int, Tensor] = {}
    for packed, sample in enumerate(layout.order):
        rows[sample] = torch.cat([encoded.rows[part] for part in layout.segments(packed)])
    return [rows[sample] for sample in range(layout.batch_size)]


@given(samples, forms, impls, masks, seeds, st.randoms(use_true_random=False))
@torch.no_grad()
def test_permuting_the_batch_permutes_the_result(
    batch: Any, form: str, impl: str, mask: str, seed: int, random: Any
) -> None:
    model, (pictures, words) = model_of(form, impl), draw(batch, form, seed)
    order = list(range(len(batch)))
    random.shuffle(order)
    expected = by_sample(model, (pictures, words), mask=mask)
    moved = by_sample(model, ([pictures[i] for i in order], [words[i] for i in order]), mask=mask)
    for place, sample in enumerate(order):
        close(moved[place], expected[sample])


@given(samples, forms, impls, masks, seeds)
@torch.no_grad()
def test_a_mixed_batch_is_its_samples_one_by_one(
    batch: Any, form: str, impl: str, mask: str, seed: int
) -> None:
    model, (pictures, words) = model_of(form, impl), draw(batch, form, seed)
    together = by_sample(model, (pictures, words), mask=mask)
    for sample, rows in enumerate(together):
        alone = by_sample(model, ([pictures[sample]], [words[sample]]), mask=mask)
        close(rows, alone[0])


@given(lengths, st.booleans(), impls, seeds)
@torch.no_grad()
def test_values_at_padding_do_not_matter(
    text_lengths: list[int], with_image: bool, impl: str, seed: int
) -> None:
    model, batch = model_of("released", impl), len(text_lengths)
    if not with_image:
        text_lengths = [max(1, n) for n in text_lengths]
    words, pad = texts(batch, 6, seed=seed), padding(text_lengths, 6)
    picture = images(batch, seed=seed) if with_image else None
    others = torch.where(pad, (words + 7) % 100, words)
    expected = model(words, picture, pad)["encoder_out"]
    assert torch.equal(model(others, picture, pad)["encoder_out"], expected)


@given(lengths, st.integers(0, 7), st.booleans(), impls, masks, seeds)
@torch.no_grad()
def test_the_amount_of_right_padding_does_not_matter(
    text_lengths: list[int], more: int, with_image: bool, impl: str, mask: str, seed: int
) -> None:
    model, batch, longest = model_of("released", impl), len(text_lengths), 6
    if not with_image:
        text_lengths = [max(1, n) for n in text_lengths]
    words = texts(batch, longest + more, seed=seed)
    picture = images(batch, seed=seed) if with_image else None
    options: dict[str, Any] = {"mask": mask}
    short = model.encode(picture, words[:, :longest], padding(text_lengths, longest), **options)
    long = model.encode(picture, words, padding(text_lengths, longest + more), **options)
    assert torch.equal(short.rows, long.rows)


@given(st.integers(1, 3), forms, impls, masks, seeds, st.integers(0, 4))
@torch.no_grad()
def test_a_pair_without_text_is_an_image(
    batch: int, form: str, impl: str, mask: str, seed: int, tokens: int
) -> None:
    model, config = model_of(form, impl), FORMS[form]
    picture, words = images(batch, config, seed), texts(batch, tokens, config, seed)
    expected = model.encode(picture, mask=mask).rows
    empty = torch.ones(batch, tokens, dtype=torch.bool)
    assert torch.equal(model.encode(picture, words, empty, mask=mask).rows, expected)
    nothing = [words[0, :0]] * batch
    assert torch.equal(model.forward_packed(list(picture), nothing, mask=mask).rows, expected)
    padded = model(words, picture, empty)["encoder_out"]
    assert padded.shape == (batch, config.num_vision_tokens + tokens, config.embed_dim)
    assert not padded[:, config.num_vision_tokens :].any()


@given(samples, impls, masks, seeds)
@torch.no_grad()
def test_the_padded_form_is_the_packed_form(batch: Any, impl: str, mask: str, seed: int) -> None:
    model = model_of("released", impl)
    batch = [(tokens, True) for tokens, _ in batch]
    pictures, words = draw(batch, "released", seed)
    longest = max(tokens for tokens, _ in batch)
    padded_words = texts(len(batch), longest, seed=seed + 9)
    for sample, own in enumerate(words):
        if own is not None:
            padded_words[sample, : len(own)] = own
    pad = padding([tokens for tokens, _ in batch], longest)
    packed = by_sample(model, (pictures, words), mask=mask)
    layout = TokenLayout.from_lengths([Nv], [longest])
    ones = torch.ones(layout.num_rows, layout.num_rows)
    blocked = None
    if mask != "bidirectional":
        blocked = ones.triu(1)
        if mask == "seq2seq":
            blocked[:Nv, :Nv] = 0
    out = model(padded_words, torch.stack(pictures), pad, attn_mask=blocked)["encoder_out"]
    for sample, rows in enumerate(packed):
        close(out[sample, : len(rows)], rows)
        assert not out[sample, len(rows) :].any()


@given(
    samples,
    forms,
    impls,
    masks,
    seeds,
    st.sampled_from(("all", "first", "none")),
    st.sampled_from(("all", "first", "none")),
)
@torch.no_grad()
def test_rows_that_are_read_are_rows_of_the_whole(
    batch: Any, form: str, impl: str, mask: str, seed: int, vision: Any, text: Any
) -> None:
    model, inputs = model_of(form, impl), draw(batch, form, seed)
    whole = model.forward_packed(*inputs, mask=mask)
    part = model.forward_packed(*inputs, mask=mask, read_vision=vision, read_text=text)
    rows, chosen = whole.layout.select(vision, text)
    assert part.layout.vision_lengths == chosen.vision_lengths
    assert part.layout.text_lengths == chosen.text_lengths
    close(part.rows, whole.rows[rows])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), impls, seeds)
@torch.no_grad()
def test_any_choice_of_text_rows(text_lengths: list[int], impl: str, seed: int) -> None:
    model, batch = model_of("released", impl), len(text_lengths)
    words, pad = texts(batch, 5, seed=seed), padding(text_lengths, 5)
    chosen = (texts(batch, 5, seed=seed + 1) % 2 == 0) & ~pad
    picture = images(batch, seed=seed)
    whole = model(words, picture, pad)["encoder_out"][:, Nv:]
    part = model.encode(picture, words, pad, read_vision="none", read_text=chosen)
    close(part.rows, whole[chosen])


@given(st.integers(1, 3), st.integers(1, 6), impls, seeds, st.booleans())
@torch.no_grad()
def test_one_modality_uses_one_expert(
    batch: int, tokens: int, impl: str, seed: int, image: bool
) -> None:
    """A text depends on B and on nothing else, an image on A and on nothing else."""
    model, other = model_of("released", impl), backbone(TINY, impl, seed=5)
    foreign = (".B.", "text_embed") if image else (".A.", "vision_embed")
    state = model.state_dict()
    mixed = {
        name: values if any(part in name for part in foreign) else state[name]
        for name, values in other.state_dict().items()
    }
    other.load_state_dict(mixed)
    inputs: dict[str, Any] = {"textual_tokens": texts(batch, tokens, seed=seed)}
    if image:
        inputs = {"visual_tokens": images(batch, seed=seed)}
    assert torch.equal(other(**inputs)["encoder_out"], model(**inputs)["encoder_out"])


@given(samples, forms, impls, seeds)
@torch.no_grad()
def test_a_state_dictionary_carries_the_whole_model(
    batch: Any, form: str, impl: str, seed: int
) -> None:
    model, inputs = model_of(form, impl), draw(batch, form, seed)
    copy = BEiT3(FORMS[form], impl).eval()
    assert list(copy.state_dict()) == list(model.state_dict())
    copy.load_state_dict(model.state_dict())
    expected = model.forward_packed(*inputs).rows
    assert torch.equal(copy.forward_packed(*inputs).rows, expected)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 5), forms, impls, seeds)
@torch.no_grad()
def test_later_words_do_not_reach_earlier_ones(
    batch: int, tokens: int, place: int, form: str, impl: str, seed: int
) -> None:
    model, config, place = model_of(form, impl), FORMS[form], place % tokens
    picture, words = images(batch, config, seed), texts(batch, tokens, config, seed)
    changed = words.clone()
    changed[:, place] = (changed[:, place] + 1) % config.vocab_size
    first = config.num_vision_tokens + place
    for mask in ("seq2seq", "causal"):
        before, after = (
            torch.stack(by_sample(model, (list(picture), list(w)), mask=mask))
            for w in (words, changed)
        )
        assert torch.equal(before[:, :first], after[:, :first])
        assert (before[:, first:] - after[:, first:]).abs().amax((1, 2)).min() > 1e-6


@pytest.mark.parametrize("fused", [0, 1, 2])
@given(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=4), seeds)
@torch.no_grad()
def test_decoding_in_pieces_of_any_size(
    fused: int, batch: int, pieces: list[int], seed: int
) -> None:
    """Also where the last layers have an expert for pairs: words after an image belong to it."""
    model, total = captioner(fused), sum(pieces)
    picture, words = images(batch, seed=seed), texts(batch, total, seed=seed)
    whole, _ = model(picture, words, None, None)
    state: dict[int, dict[str, Tensor]] = {}
    done = 0
    for index, size in enumerate(pieces):
        part = words[:, done : done + size]
        done += size
        if index == 0:
            logits, state = model(picture, part, None, None, done, state)
        elif size == 2:
            logits, state = model(None, part, None, None, done, state)
        else:
            # the official call knows steps of two tokens only; the backbone knows any
            tokens = Nv + done
            blocked = torch.ones(tokens, tokens).triu(1)[-size:]
            places = torch.arange(done - size, done)[None] + 2
            out = model.beit3(part, attn_mask=blocked, incremental_state=state, positions=places)[
                "encoder_out"
            ]
            logits = model.mlm_head(out)
        close(logits, whole[:, done - size : done])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4), impls, masks, seeds)
def test_attention_is_linear_in_the_values(
    token_counts: Any, impl: str, mask: str, seed: int
) -> None:
    layout = TokenLayout.from_lengths([v for v, _ in token_counts], [t for _, t in token_counts])
    generator = torch.Generator().manual_seed(seed)
    q, k, v, w = (torch.randn(layout.num_rows, 8, generator=generator) for _ in range(4))

    def call(values: Tensor) -> Tensor:
        return shared_attention(q, k, values, layout, num_heads=2, mask=mask, impl=impl)

    close(call(2.0 * v - 3.0 * w), 2.0 * call(v) - 3.0 * call(w))
    close(call(torch.ones_like(v)), torch.ones_like(v))


@given(st.integers(1, 5), st.integers(1, 6), impls, seeds)
def test_attention_does_not_see_the_order_of_keys(
    vision: int, text: int, impl: str, seed: int
) -> None:
    layout = TokenLayout.from_lengths([vision], [text])
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(layout.num_rows, 8, generator=generator) for _ in range(3))
    order = torch.randperm(layout.num_rows, generator=generator)
    expected = shared_attention(q, k, v, layout, num_heads=2, impl=impl)
    close(shared_attention(q, k[order], v[order], layout, num_heads=2, impl=impl), expected)
    moved = shared_attention(q[order], k, v, layout, num_heads=2, impl=impl)
    close(moved, expected[order])
    # a shift of all keys shifts all scores of a query alike
    close(shared_attention(q, k + 1.5, v, layout, num_heads=2, impl=impl), expected)


bounds_of = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@given(bounds_of, impls, seeds, st.booleans())
def test_rows_of_a_product_do_not_meet(counts: list[int], impl: str, seed: int, norm: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    experts, total = len(counts), sum(counts)
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    x, residual = make(total, 12), make(total, 9)
    weights, biases = [make(9, 12) for _ in counts], [make(9) for _ in counts]
    norms = Norm([make(12) for _ in counts], [make(12) for _ in counts]) if norm else None
    options: dict[str, Any] = {"norm": norms, "activation": "gelu", "impl": impl}
    whole = expert_linear(x, weights, biases, bounds=bounds, residual=residual, **options)
    assert whole.shape == (total, 9)
    for expert in range(experts):
        own = slice(bounds[expert], bounds[expert + 1])
        only = None if norms is None else Norm([norms.weights[expert]], [norms.biases[expert]])
        options["norm"] = only
        alone = expert_linear(
            x[own],
            [weights[expert]],
            [biases[expert]],
            bounds=(0, counts[expert]),
            residual=residual[own],
            **options,
        )
        close(alone, whole[own])


@given(bounds_of, impls, seeds)
def test_stacked_pieces_are_one_weight(counts: list[int], impl: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    x = torch.randn(sum(counts), 8, generator=generator)
    pieces = [tuple(torch.randn(n, 8, generator=generator) for n in (3, 1, 6)) for _ in counts]
    stacked = expert_linear(x, pieces, bounds=bounds, impl=impl)
    whole = expert_linear(x, [torch.cat(p) for p in pieces], bounds=bounds, impl=impl)
    assert torch.equal(stacked, whole)
    for columns, index in ((slice(0, 3), 0), (slice(3, 4), 1), (slice(4, 10), 2)):
        alone = expert_linear(x, [p[index] for p in pieces], bounds=bounds, impl=impl)
        close(stacked[:, columns], alone)


@given(st.integers(1, 4), impls, seeds, st.sampled_from((0.5, 8.0, -2.0)))
def test_a_norm_takes_out_scale_and_shift(rows: int, impl: str, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 64, generator=generator)
    weight = torch.randn(5, 64, generator=generator)
    norm = Norm([torch.ones(64)], [torch.zeros(64)], 1e-12)
    expected = expert_linear(x, [weight], bounds=(0, rows), norm=norm, impl=impl)
    moved = expert_linear(scale * x + 3.0, [weight], bounds=(0, rows), norm=norm, impl=impl)
    sign = 1.0 if scale > 0 else -1.0
    torch.testing.assert_close(moved, sign * expected, rtol=1e-3, atol=1e-4)
