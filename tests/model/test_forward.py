"""One forward: which implementation runs, what stays apart, what comes back."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from model_cases import FORMS, TINY, backbone, images, need, padding, task_model, texts

import beit3_fast.model.encoder as encoder_module
from beit3_fast.errors import ConfigError, KernelUnavailable, ShapeError
from beit3_fast.model.embedding import MOST_GRIDS, vision_positions
from beit3_fast.ops import dispatch, library

Nv = TINY.num_vision_tokens


class Ran:
    """Which implementation each op call took, read where the choice is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.impls: set[str] = set()
        self.ops: set[str] = set()
        real = dispatch.choose

        def choose(at: dispatch.Situation, requested: str = "auto") -> dispatch.Choice:
            choice = real(at, requested)
            self.impls.add(choice.impl)
            self.ops.add(at.op)
            return choice

        monkeypatch.setattr(dispatch, "choose", choose)


@pytest.mark.parametrize("impl", ["reference", "composite", "cpu"])
@pytest.mark.parametrize("how", ["argument", "attribute", "environment"])
@torch.no_grad()
def test_the_implementation_asked_for_is_the_one_that_runs(
    impl: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(impl)
    model = backbone(TINY, impl if how == "argument" else "auto")
    if how == "attribute":
        model.impl = impl
    elif how == "environment":
        monkeypatch.setenv("BEIT3_FAST_IMPL", impl)
    ran = Ran(monkeypatch)
    model(texts(2, 3), images(2))
    model.forward_packed([images(1)[0], None], [None, texts(1, 4)[0]])
    assert ran.impls == {impl}
    assert ran.ops == {"expert_linear", "shared_attention"}


@torch.no_grad()
def test_the_environment_replaces_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEIT3_FAST_IMPL", "reference")
    ran = Ran(monkeypatch)
    backbone(TINY, "composite")(texts(2, 3))
    assert ran.impls == {"composite"}
    monkeypatch.setenv("BEIT3_FAST_IMPL", "")
    ran.impls.clear()
    backbone(TINY)(texts(2, 3))
    assert "reference" not in ran.impls
    monkeypatch.setenv("BEIT3_FAST_IMPL", "quick")
    with pytest.raises(ConfigError, match="'quick'"):
        backbone(TINY)(texts(2, 3))


@pytest.fixture
def at_level(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``at_level(name)``: choices as on a processor whose highest level that is."""

    def pretend(level: str) -> None:
        monkeypatch.setattr(library, "cpu_isa", lambda: level)
        monkeypatch.setattr(library, "cpu_features", lambda: {"amx_bf16": level == "amx_bf16"})
        dispatch.reset()

    yield pretend
    monkeypatch.undo()
    dispatch.reset()


@torch.no_grad()
def test_auto_follows_the_situation(at_level: Callable[[str], None]) -> None:
    """Products in fp32 training, autocast and half precision have no compiled kernel behind "auto" on a CPU without AMX."""
    at_level("avx512")

    def choice(op: str = "shared_attention", **changes: Any) -> dispatch.Choice:
        at = dispatch.Situation(op, "cpu", torch.float32, False, False, False, False)
        return dispatch.choose(at._replace(**changes))

    for changes, word in (
        ({"op": "expert_linear", "needs_grad": True}, "backward"),
        ({"dtype": torch.float16}, "float16"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": "cuda"}, "CPU tensors"),
        ({"autocast": True}, "autocast"),
        ({"compiling": True}, "compile"),
    ):
        made = choice(**changes)
        assert made.impl == "composite"
        reasons = dict(made.rejected)
        assert word in reasons["cpu"], (changes, reasons)
        assert set(reasons) == set(dispatch.IMPLEMENTATIONS) - {"composite"}
    training = {"op": "expert_linear", "needs_grad": True}
    available = "cpu" if library.available() else "composite"
    assert choice(**training, dtype=torch.bfloat16).impl == available
    at_level("amx_bf16")
    assert choice(**training).impl == available


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"device": "cuda"}, "CPU tensors"),
    ],
)
def test_an_impossible_request_is_an_error(changes: dict[str, Any], word: str) -> None:
    at = dispatch.Situation("expert_linear", "cpu", torch.float32, False, False, False, False)
    with pytest.raises(KernelUnavailable, match=f"impl='cpu' was asked for.*{word}"):
        dispatch.choose(at._replace(**changes), "cpu")


@pytest.mark.parametrize("impl", ["reference", "composite", "cpu"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@torch.no_grad()
def test_a_sample_that_is_not_finite_stays_alone(impl: str, poison: float) -> None:
    need(impl)
    model, picture, words = backbone(TINY, impl), images(3), texts(3, 5)
    pad = padding([5, 2, 3], 5)
    clean = model(words, picture, pad)["encoder_out"]
    spoiled = picture.clone()
    spoiled[1, 0, 3, 3] = poison
    out = model(words, spoiled, pad)["encoder_out"]
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert out[1, :Nv].isnan().any()
    assert not out[1, Nv + 2 :].any()
    # in a mixed batch too, where rows of other samples lie on both sides
    mixed = [picture[0], spoiled[1], None, picture[2]]
    sentences = [None, words[0], words[1], words[2, :2]]
    whole = model.forward_packed(mixed, sentences)
    fine = model.forward_packed([picture[0], picture[1], None, picture[2]], sentences)
    others = whole.layout.sample_of_row != 1
    assert torch.equal(whole.rows[others], fine.rows[others])
    assert whole.rows.isnan().any()


@torch.no_grad()
def test_hidden_states_of_the_padded_form() -> None:
    model, picture, words, pad = backbone(), images(2), texts(2, 4), padding([4, 1], 4)
    out = model(words, picture, pad, return_all_hiddens=True)
    states = out["encoder_states"]
    assert len(states) == TINY.num_layers + 1
    assert all(state.shape == (2, Nv + 4, 64) for state in states)
    assert out["l_aux"] == [None] * TINY.num_layers
    positions = model.encoder.embed_positions.A.weight[2 : 2 + Nv]
    torch.testing.assert_close(
        states[0][:, :Nv], out["encoder_embedding"][:, :Nv] + positions.expand(2, -1, -1)
    )
    for state in states:
        assert not state[1, Nv + 1 :].any()
    norm = model.encoder.layer_norm.A
    torch.testing.assert_close(norm(states[-1][:, :Nv]), out["encoder_out"][:, :Nv])
    assert model(words, picture, pad)["encoder_states"] == []


@torch.no_grad()
def test_encoded_rows_in_the_caller_s_order() -> None:
    model, picture, words = backbone(), images(3), texts(3, 4)
    # The third sample sorts in front: an order that is not its own inverse.
    pad = padding([4, 2, 0], 4)
    encoded = model.encode(picture, words, pad, read_vision="first", read_text="first")
    assert encoded.layout.order == (2, 0, 1)
    whole = model(words, picture, pad)["encoder_out"]
    torch.testing.assert_close(encoded.vision(), whole[:, 0])
    with pytest.raises(ShapeError, match="layout"):
        encoded.text()
    with pytest.raises(ShapeError, match="layout"):
        model.encode(picture, words, pad).vision()
    everything = model.encode(picture, words, padding([4, 1, 2], 4))
    assert everything.vision().shape == (3 * Nv, 64)
    assert everything.text().shape == (7, 64)


@pytest.mark.parametrize("rows_at_once", [1, 9, 20, 10_000])
@pytest.mark.parametrize("reads", [("all", "all"), ("first", "none"), ("first", "first")])
@pytest.mark.parametrize("form", ["released", "paper"])
@torch.no_grad()
def test_a_batch_encoded_in_parts(
    rows_at_once: int, reads: tuple[str, str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(encoder_module, "_ROWS_AT_ONCE"):
        pytest.skip("the encoder takes every batch at once")
    model, picture, words = backbone(FORMS[form]), images(4), texts(4, 6)
    samples = [picture[0], None, picture[1], picture[2], None, picture[3]]
    sentences = [words[0, :2], words[1], None, words[2], words[3, :1], None]
    options: dict[str, Any] = {"read_vision": reads[0], "read_text": reads[1], "mask": "seq2seq"}
    expected = model.forward_packed(samples, sentences, **options)
    monkeypatch.setattr(encoder_module, "_ROWS_AT_ONCE", rows_at_once)
    encoded = model.forward_packed(samples, sentences, **options)
    assert encoded.layout.vision_lengths == expected.layout.vision_lengths
    torch.testing.assert_close(encoded.rows, expected.rows)


def test_positions_of_the_trained_grid_are_a_view() -> None:
    table = torch.randn(2 + 1 + 4, 8)
    rows = vision_positions(table, (2, 2), (2, 2))
    assert rows.data_ptr() == table[2:].data_ptr()
    with torch.no_grad():
        first = vision_positions(table, (2, 2), (3, 5))
        assert first.shape == (16, 8)
        assert vision_positions(table, (2, 2), (3, 5)).data_ptr() == first.data_ptr()
        table[0, 0] += 1.0
        assert vision_positions(table, (2, 2), (3, 5)).data_ptr() != first.data_ptr()


@torch.no_grad()
def test_a_server_of_any_size_keeps_the_positions_of_a_few() -> None:
    table = torch.randn(2 + 1 + 4, 8)
    kept = [weakref.ref(vision_positions(table, (2, 2), (3, n))._base) for n in range(4, 44)]
    assert [ref() is not None for ref in kept] == [False] * (40 - MOST_GRIDS) + [True] * MOST_GRIDS


BATCHES: list[dict[str, Any]] = [
    {"visual_tokens": images(2)},
    {"textual_tokens": texts(3, 6)},
    {"textual_tokens": texts(2, 4), "visual_tokens": images(2)},
    {
        "textual_tokens": texts(2, 7),
        "visual_tokens": images(2),
        "text_padding_position": padding([3, 7], 7),
    },
    {"visual_tokens": torch.randn(1, 3, 48, 16)},
]


@pytest.mark.parametrize("impl", ["composite", "auto"])
def test_eight_threads_on_one_model(impl: str) -> None:
    """Images, texts and pairs at once on one model, from the first call on: what one thread computes."""
    expected = []
    with torch.no_grad():
        alone = backbone(TINY, impl)
        for batch in BATCHES:
            expected.append(alone(**batch)["encoder_out"])
    model = backbone(TINY, impl)
    barrier, problems = threading.Barrier(8), []

    def work(seed: int) -> None:
        try:
            barrier.wait(timeout=30)
            generator = torch.Generator().manual_seed(seed)
            with torch.inference_mode(seed % 2 == 0), torch.no_grad():
                for _ in range(25):
                    which = int(torch.randint(len(BATCHES), (), generator=generator))
                    out = model(**BATCHES[which])["encoder_out"]
                    torch.testing.assert_close(out, expected[which])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not problems, problems[0]


def test_threads_that_train_and_threads_that_do_not() -> None:
    model, batch = backbone(), BATCHES[3]
    with torch.no_grad():
        expected = model(**batch)["encoder_out"]
    problems = []

    def work(train: bool) -> None:
        try:
            for _ in range(8):
                with torch.set_grad_enabled(train):
                    out = model(**batch)["encoder_out"]
                assert out.requires_grad is train
                torch.testing.assert_close(out.detach(), expected)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not problems, problems[0]


@torch.no_grad()
def test_a_model_holds_no_state_of_a_call() -> None:
    model = task_model("vqav2")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model(images(2), texts(2, 3), padding([3, 1], 3))
    model.beit3(texts(2, 3))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@torch.no_grad()
def test_double_precision() -> None:
    out = backbone().double()(texts(2, 3), images(2).double())["encoder_out"]
    assert out.dtype == torch.float64
    expected = backbone()(texts(2, 3), images(2))["encoder_out"]
    torch.testing.assert_close(out.float(), expected, rtol=1e-4, atol=1e-5)


def test_a_patch_is_masked_or_it_is_not() -> None:
    model, patches = backbone(TINY), Nv - 1
    for wrong in (torch.full((2, patches), 0.3), torch.full((2, patches), 2)):
        with pytest.raises(ShapeError, match="vision_masked_position must be bool or hold 0 and 1"):
            model(None, images(2), vision_masked_position=wrong)
    masked = torch.arange(patches).expand(2, patches) % 2
    with torch.no_grad():
        whole, given = (
            model(None, images(2), vision_masked_position=own)["encoder_out"]
            for own in (masked.bool(), masked.float())
        )
    assert torch.equal(whole, given)


def test_experts_of_one_product_share_their_eps() -> None:
    model = backbone(TINY)
    model.encoder.layers[0].self_attn_layer_norm.A.eps = 0.5
    with pytest.raises(ConfigError, match=r"must have one eps, got \[0\.5, "):
        model(texts(2, 3), images(2))
