"""model.capture without a GPU: its buffers, lengths and checks; the graphs themselves are for ``make gpu``."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import backbone, images, padding, randomize, task_model, texts
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from beit3_fast import refresh
from beit3_fast.derived import derived
from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.model import capture, create_model, embedding

LENGTHS = (3, 6)
GPU = torch.cuda.is_available()


def model_of(kind: str) -> Any:
    return backbone() if kind == "backbone" else task_model(kind)


def call(kind: str, tokens: int, seed: int = 0, padded: bool = True) -> tuple[Any, ...]:
    """Arguments of a forward; the second text is shorter than the first."""
    pictures, words = images(2, seed=seed + 1), texts(2, tokens, seed=seed + 2)
    blank = padding([tokens, max(1, tokens - 1)], tokens) if padded else None
    return {
        "backbone": (words, pictures, blank),
        "imageclassification": (pictures,),
        "vqav2": (pictures, words, blank),
        "nlvr2": (pictures, pictures.flip(0), words, blank),
        "captioning": (pictures, words, blank, None),
        "retrieval": (pictures, words, blank),
    }[kind]


KINDS = ("backbone", "imageclassification", "vqav2", "nlvr2", "captioning", "retrieval")


def assert_same(ours: Any, expected: Any) -> None:
    for mine, theirs in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        else:
            assert mine == theirs


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_result_of_the_model_at_every_length(kind: str) -> None:
    model = model_of(kind)
    lengths = None if kind == "imageclassification" else LENGTHS
    captured = model.capture(*call(kind, 4), text_lengths=lengths, graphs=False)
    assert captured.text_lengths == (lengths or ())
    # From the longest down: what a longer text left in the buffers must not show.
    for tokens in (6, 3, 5, 1, 2):
        for padded in (True, kind == "nlvr2"):
            arguments = call(kind, tokens, seed=tokens, padded=padded)
            assert_same(captured(*arguments), model(*arguments))


@torch.no_grad()
def test_one_branch_of_a_retrieval_model() -> None:
    model = task_model("retrieval")
    words = texts(2, 4)
    captured = model.capture(None, words, None, only_infer=True, text_lengths=[8], graphs=False)
    assert_same(captured(None, words, only_infer=True), model(None, words, only_infer=True))
    with pytest.raises(ConfigError, match="only_infer was captured as True"):
        captured(None, words, only_infer=False)
    with pytest.raises(ConfigError, match="padding_mask was captured as None"):
        model.capture(images(2), only_infer=True, graphs=False)(images(2), None, words, True)
    with pytest.raises(ConfigError, match="image was captured as None"):
        captured(images(2), words, only_infer=True)


def test_every_length_computes_on_memory_that_stays() -> None:
    model = task_model("vqav2")
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def look(_: Any, __: Any, given: dict[str, Tensor]) -> None:
        seen.append(
            (
                tuple(tensor.data_ptr() for tensor in given.values()),
                tuple(given["question"].shape),
            )
        )

    captured = model.capture(*call("vqav2", 4), text_lengths=(6, 3, 6), graphs=False)
    model.register_forward_pre_hook(look, with_kwargs=True)
    for tokens in (1, 2, 3, 4, 5, 6):
        captured(*call("vqav2", tokens, seed=tokens))
    assert [shape for _, shape in seen] == [(2, 3)] * 3 + [(2, 6)] * 3
    assert len({pointers for pointers, _ in seen}) == 2


@torch.no_grad()
def test_outputs_are_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph writes its outputs where the last replay had them; ``_graph`` is played by a stand-in that does so."""
    model = task_model("vqav2")
    graphs: list[Any] = []

    def graph(run: Any, *_: Any) -> Any:
        outputs = run()

        def replay() -> Any:
            tree_map_only(Tensor, lambda t: t.copy_(run()), outputs)
            return outputs

        graphs.append(outputs)
        return replay

    monkeypatch.setattr(capture, "_graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    example = call("vqav2", 4)
    captured = capture.Captured(model, example, {}, LENGTHS, True, torch.device("cpu"))
    assert len(graphs) == len(LENGTHS)
    first = captured(*call("vqav2", 4, seed=1))
    kept = first.clone()
    captured(*call("vqav2", 5, seed=2))
    assert torch.equal(first, kept)
    assert_same(first, model(*call("vqav2", 4, seed=1)))


REFUSED = {
    "another batch": (lambda i, q, p: (i[:1], q[:1], p[:1]), "image was captured as torch.float32"),
    "another size": (lambda i, q, p: (i[:, :, :16], q, p), r"of shape \[2, 3, 32, 32\], got"),
    "another dtype": (lambda i, q, p: (i.double(), q, p), "got torch.float64"),
    "another text dtype": (lambda i, q, p: (i, q.int(), p), "question was captured as torch.int64"),
    "a longer text": (lambda i, q, p: (i, texts(2, 7), None), r"text_lengths=\(3, 6, 7\)"),
    "padding of another shape": (lambda i, q, p: (i, q, p[:, :2]), "padding_mask was captured as"),
    "no text": (lambda i, q, p: (i, None, p), "question was captured as .*got NoneType"),
    "a text of one sample": (lambda i, q, p: (i, q[0], p), "question was captured as"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_inputs_are_refused(what: str) -> None:
    change, message = REFUSED[what]
    captured = task_model("vqav2").capture(*call("vqav2", 4), text_lengths=LENGTHS, graphs=False)
    with pytest.raises(ShapeError, match=message):
        captured(*change(*call("vqav2", 4)))


def test_what_cannot_be_captured() -> None:
    model, example = task_model("vqav2"), call("vqav2", 4)
    if not GPU:
        with pytest.raises(ConfigError, match=r"on a GPU, this one is on cpu; graphs=False"):
            model.capture(*example)
    for lengths in ((), (0,), (4, 2000), "4"):
        with pytest.raises(ConfigError, match="text_lengths must be a list of lengths from 1 to"):
            model.capture(*example, text_lengths=lengths, graphs=False)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        model.capture(*example, graphs=False)
    with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"):
        model.train().capture(*example, graphs=False)
    with pytest.raises(ConfigError, match="text_lengths was given, but no text"):
        task_model("imageclassification").capture(images(2), text_lengths=(4,), graphs=False)
    captioning = task_model("captioning")
    with pytest.raises(ConfigError, match="shape of language_masked_pos cannot be fixed"):
        captioning.capture(*call("captioning", 4)[:3], texts(2, 4) > 50, graphs=False)


def _write_through_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    refresh(model)


def _replace_one(model: Any) -> None:
    model.head[0].weight = torch.nn.Parameter(model.head[0].weight.detach().clone())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda model: randomize(model, seed=5),
    "through data, then refresh": _write_through_data,
    "another dtype": lambda model: model.half(),
    "another dtype and back": lambda model: model.double().float(),
    "one replaced": _replace_one,
}


@pytest.mark.parametrize("how", CHANGES)
def test_weights_that_change_are_noticed(how: str) -> None:
    model, example = task_model("vqav2"), call("vqav2", 4)
    captured = model.capture(*example, graphs=False)
    captured(*example)
    CHANGES[how](model)
    with pytest.raises(ConfigError, match="weights changed since it was captured"):
        captured(*example)


def test_another_state_of_the_model_is_refused_at_the_call() -> None:
    model, example = task_model("vqav2"), call("vqav2", 4)
    captured = model.capture(*example, graphs=False)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        captured(*example)
    model.train()
    with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"):
        captured(*example)


@torch.no_grad()
def test_what_a_graph_reads_lives_as_long_as_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpolated positions of other sizes, and what is derived anew from weights, take the place of what it read."""
    model = task_model("imageclassification", impl="composite")

    def graph(run: Any, *_: Any) -> Any:
        run()
        return run

    monkeypatch.setattr(capture, "_graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    sides = [16 * n for n in range(3, 4 + embedding.MOST_GRIDS)]
    size = (1, 3, sides[0], sides[0])
    captured = capture.Captured(model, (torch.randn(size),), {}, None, True, torch.device("cpu"))
    tables = derived("positions", (model.beit3.encoder.embed_positions.A.weight,), dict)
    read = [weakref.ref(table) for table in tables.values()]
    assert len(read) == 1
    for side in sides[1:]:
        model(torch.randn(1, 3, side, 32))
    refresh(model)
    assert read[0]() is not None
    del captured, tables
    gc.collect()
    assert read[0]() is None


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["auto", "composite", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_graphs_on_a_gpu(kind: str, impl: str) -> None:
    name = "beit3_tiny_patch16_32" + ("" if kind == "backbone" else f"_{kind}")
    model = randomize(create_model(name, impl=impl)).cuda()

    def there(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(tree_map_only(Tensor, lambda t: t.cuda(), list(arguments)))

    lengths = None if kind == "imageclassification" else LENGTHS
    captured = model.capture(*there(call(kind, 4)), text_lengths=lengths)
    for tokens in (6, 2, 5):
        arguments = there(call(kind, tokens, seed=tokens))
        assert_same(captured(*arguments), model(*arguments))
