"""torch.compile and torch.export: one graph without a break for all batch sizes, and the numbers of eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from model_cases import backbone, images, padding, task_model, texts
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import beit3_fast
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import MASKS, library, shared_attention
from beit3_fast.ops.packed_weight import PackedWeight
from beit3_fast.padded_layout import PaddedLayout

BATCHES = (2, 3, 5, 8)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def arguments(task: str, batch: int, tokens: int = 6, dtype: Any = torch.float32) -> Any:
    picture = images(batch, seed=batch).to(dtype)
    words = texts(batch, tokens, seed=batch)
    blank = padding([tokens] + [tokens - 1 - i % 2 for i in range(batch - 1)], tokens)
    return {
        "image": (picture,),
        "imageclassification": (picture,),
        "text": (None, words, blank, True),
        "retrieval": (picture, words, blank),
        "pair": (picture, words, blank),
        "nlvr2": (picture, picture.flip(0), words, blank),
        "captioning": (picture, words, blank, None),
        "masked words": (picture, words, blank, (words > 40) & ~blank),
        "backbone": (words, picture, blank),
    }[task]


def assert_one_graph(
    model: Any,
    task: str,
    *,
    backend: str = "eager",
    mark: bool = True,
    graphs: int = 1,
    error: float = 1e-5,
) -> Any:
    """The compiled model has ``graphs`` graphs after all batch sizes, and eager's results up to a relative error."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    dtype = model.get_parameter("beit3.vision_embed.cls_token").dtype
    for batch in BATCHES:
        given = arguments(task, batch, dtype=dtype)
        for tensor in given:
            if mark and isinstance(tensor, Tensor):
                torch._dynamo.mark_dynamic(tensor, 0)
        with torch.no_grad():
            pairs = zip(tree_leaves(compiled(*given)), tree_leaves(model(*given)), strict=True)
        for ours, expected in pairs:
            if expected is not None:
                difference = (ours - expected).float().norm() / expected.float().norm()
                assert difference <= error, (task, batch)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    return compiled


def small(task: str, **options: Any) -> Any:
    return task_model(task, num_layers=1, **options)


@pytest.mark.parametrize(
    ("kind", "task"), [("image", "imageclassification"), ("text", "retrieval"), ("pair", "vqav2")]
)
def test_one_graph_for_all_batch_sizes(kind: str, task: str) -> None:
    assert_one_graph(small(task), kind)


@pytest.mark.full
@pytest.mark.parametrize("task", ["nlvr2", "captioning", "masked words", "retrieval"])
def test_one_graph_of_the_other_tasks(task: str) -> None:
    assert_one_graph(task_model("captioning" if task == "masked words" else task), task)


@pytest.mark.parametrize("output", ["pooled", pytest.param("cls", marks=pytest.mark.full)])
def test_embeddings_of_images_in_one_graph(output: str) -> None:
    """In train mode, too: drop path does not act."""
    model = small("retrieval", drop_path_rate=0.5).train()
    compiled = torch.compile(model.encode_image, fullgraph=True, backend="eager")
    for batch in BATCHES:
        pictures = images(batch, seed=batch)
        torch._dynamo.mark_dynamic(pictures, 0)
        expected = model.encode_image(list(pictures), output)
        torch.testing.assert_close(compiled(pictures, output), expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.full
def test_one_more_graph_where_nothing_is_marked() -> None:
    """The second batch size makes the first dimension dynamic; the others compile nothing."""
    assert_one_graph(small("vqav2"), "pair", mark=False, graphs=2)


def packed(dtype: str) -> Any:
    if not library.available():
        pytest.skip(f"the library {library.why_unavailable()}")
    if library.cpu_isa() == "portable" and dtype != "int8":
        pytest.skip("weights stay plain where other calls are faster")
    model = beit3_fast.create_model(
        "beit3_tiny_patch16_32_vqav2", dtype=dtype, inference_only=True, num_layers=1
    )
    model.load_state_dict(small("vqav2").state_dict())
    assert any(isinstance(parameter, PackedWeight) for parameter in model.parameters())
    return model


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 1e-5), ("int8", 0.02)], ids=["float32", "int8"]
)
def test_packed_weights_in_one_graph(
    dtype: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8: eager attends with another kernel in bf16, and its rounding may change what is rounded to int8."""
    model = packed(dtype)
    monkeypatch.setattr(PackedWeight, "unpack", lambda self: pytest.fail("unpacked"))
    backend = "aot_eager" if dtype == "int8" else "eager"
    compiled = assert_one_graph(model, "pair", backend=backend, error=error)
    given = arguments("pair", 2, dtype=model.pooler.norm.weight.dtype)
    weight = model.beit3.encoder.layers[0].ffn.A.fc1.weight
    with torch.no_grad():
        before = compiled(*given)
        weight.copy_(torch.zeros(weight.shape))
        assert not torch.equal(compiled(*given), before)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.full
def test_training_in_one_graph() -> None:
    model = small("vqav2", drop_path_rate=0.0).train()
    model.beit3.encoder.drop_path_rates = (0.5,)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        run(*arguments("pair", 3)).square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    expected, ours = results
    for name, gradient in expected.items():
        own = ours[name]
        assert (own is None) is (gradient is None), name
        if gradient is not None and not name.endswith("k_proj.bias"):
            assert (own - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["plain", "float32", "int8"])
def test_inductor(kind: str) -> None:
    model = small("vqav2") if kind == "plain" else packed(kind)
    error = 0.02 if kind == "int8" else 1e-5
    assert_one_graph(model, "pair", backend="inductor", error=error)


@pytest.mark.full
@torch.no_grad()
def test_export_of_pairs_with_any_batch_and_any_length() -> None:
    model = small("vqav2")
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=62)
    shapes = ({0: batch}, *[{0: batch, 1: tokens}] * 2)
    program = torch.export.export(model, arguments("pair", 3), dynamic_shapes=shapes).module()
    for size, length in ((1, 4), (2, 6), (7, 3)):
        given = arguments("pair", size, length)
        torch.testing.assert_close(program(*given), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_the_backbone_with_a_mask_and_all_outputs() -> None:
    model = backbone()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    words, picture, blank = arguments("backbone", 3)
    tokens = picture.shape[0] and model.config.num_vision_tokens + words.shape[1]
    for blocked in (None, torch.ones(tokens, tokens).triu(1), torch.rand(tokens, tokens) > 0.8):
        with torch.no_grad():
            results = [
                run(words, picture, blank, attn_mask=blocked, return_all_hiddens=True)
                for run in (compiled, model)
            ]
        for ours, expected in zip(*map(tree_leaves, results), strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
            else:
                assert ours == expected


@pytest.mark.parametrize("impl", ["composite", "reference"])
@pytest.mark.parametrize("mask", [*MASKS, "tensor"])
@pytest.mark.parametrize("num_vision", [0, 4])
@pytest.mark.parametrize("read", [("all", "all"), ("first", "first"), ("none", "all")])
def test_attention_on_padded_rows(
    impl: str, mask: Any, num_vision: int, read: tuple[Any, Any]
) -> None:
    """Rows that are no padding are those of the same samples without padding."""
    lengths, tokens, heads, width = [5, 1, 3], 5, 2, 16
    valid = ~padding(lengths, tokens)
    padded = PaddedLayout(3, num_vision, tokens, torch.device("cpu"), valid)
    exact = TokenLayout.from_lengths([num_vision] * 3, lengths)
    real = torch.cat([torch.ones(3 * num_vision, dtype=torch.bool), valid.flatten()])
    q, k, v = (torch.randn(len(real), width) for _ in range(3))
    size = num_vision + tokens
    if mask == "tensor":
        mask = (torch.rand(3, size, size) > 0.4).index_fill(2, torch.tensor(0), True)
    rows, own = padded.select(*read)
    o = shared_attention(q[rows], k, v, padded, num_heads=heads, mask=mask, queries=own, impl=impl)
    chosen, inside = exact.select(*read)
    expected = shared_attention(
        q[real][chosen],
        k[real],
        v[real],
        exact,
        num_heads=heads,
        mask=mask,
        queries=inside,
        impl="reference",
    )
    torch.testing.assert_close(o[real[rows]], expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(o).all()
