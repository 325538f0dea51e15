"""Triton attention on padded batches, as torch.compile and capture make them: the numbers of the batch without padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from attention_cases import MASKS, AttentionOperands, plain_attention
from op_cases import DTYPES, assert_near
from torch import Tensor
from torch._dynamo.utils import counters
from triton_cases import DEVICE, TARGETS

from beit3_fast.errors import ShapeError
from beit3_fast.kernels import shared_attention as kernels
from beit3_fast.layout import TokenLayout
from beit3_fast.model import create_model
from beit3_fast.ops import shared_attention
from beit3_fast.padded_layout import PaddedLayout
from beit3_fast.parity import op_parity

# Padding lies at the end of a text, in front of it, or between its words; one text is nothing else.
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
READS = {"all": ("all", "all"), "first": ("first", "first"), "text": ("none", "all")}


class Batch(NamedTuple):
    """The same rows twice: padded, and as they are without padding."""

    padded: PaddedLayout
    own: TokenLayout | None  # a selection of the padded rows
    exact: TokenLayout
    real: Tensor  # bool [R]: which padded rows are no padding
    rows: Tensor  # int64 [Rq]: the padded rows that are queries
    heads: int
    mask: str

    def exact_queries(self) -> tuple[Tensor, Any]:
        """Which of the queries are no padding, and their layout without padding."""
        kept = self.real[self.rows]
        if self.own is None:
            return kept, None
        chosen = torch.zeros(len(self.real), dtype=torch.bool)
        chosen[self.rows] = True
        text = chosen[self.real][self.exact.num_vision_rows :]
        vision: Any = "none"
        if self.own.num_vision_rows:
            vision = "all" if self.own.num_vision_rows == self.padded.num_vision_rows else "first"
        return kept, self.exact.select(vision, text).layout


def batch_of(num_vision: int, valid: Tensor, heads: int, mask: str, read: str) -> Batch:
    device = torch.device(DEVICE)
    size, tokens = valid.shape
    padded = PaddedLayout(size, num_vision, tokens, device, valid.to(device))
    # Not by from_lengths, which would put the sample whose text is all padding first.
    exact = TokenLayout(
        vision_lengths=(num_vision,) * size,
        text_lengths=tuple(valid.sum(1).tolist()),
        order=tuple(range(size)),
        image_only=0,
        text_only=0,
        device=torch.device("cpu"),
    )
    real = torch.cat([torch.ones(size * num_vision, dtype=torch.bool), valid.flatten()])
    vision, text = READS[read]
    own, rows = None, torch.arange(padded.num_rows)
    if read != "all":
        selection = padded.select(vision, text)  # type: ignore[arg-type]
        own, rows = selection.layout, selection.rows.cpu()
    return Batch(padded, own, exact, real, rows, heads, mask)  # type: ignore[arg-type]


def gradients(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, call: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = call(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, seed.to(o))]


def check(batch: Batch, width: int, dtype: str) -> None:
    """Output and gradients by the 2x rule; nothing comes out of the keys of padding, nor goes into them."""
    generator = torch.Generator().manual_seed(3)
    columns = batch.heads * width

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(DTYPES[dtype])

    q, k, v, seed = (draw(n) for n in (len(batch.rows), *[len(batch.real)] * 2, len(batch.rows)))
    kept, queries = batch.exact_queries()
    # What is computed in rows of padding means nothing, so nothing is asked of it.
    seed[~kept] = 0
    # Large, and not once 0: a key that is seen by mistake shows.
    k[~batch.real] *= 30
    v[~batch.real] += 50

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        how: dict[str, Any] = {"num_heads": batch.heads, "mask": batch.mask, "queries": batch.own}
        return shared_attention(q, k, v, batch.padded, **how, impl="triton")

    def without(q: Tensor, k: Tensor, v: Tensor) -> AttentionOperands:
        return AttentionOperands(
            q[kept], k[batch.real], v[batch.real], batch.exact, queries, batch.mask
        )

    def plain(*operands: Tensor) -> Tensor:
        return plain_attention(without(*operands), batch.heads)

    def formula(*operands: Tensor) -> Tensor:
        own = without(*operands)
        how: dict[str, Any] = {"num_heads": batch.heads, "mask": own.mask, "queries": queries}
        return shared_attention(*own[:3], own.layout, **how, impl="reference")

    found = [t.cpu() for t in gradients(*(t.to(DEVICE) for t in (q, k, v, seed)), ours)]
    near = gradients(q, k, v, seed[kept], plain)
    truth = gradients(q.double(), k.double(), v.double(), seed[kept], formula)
    assert all(bool(t.isfinite().all()) for t in found)
    assert not found[2][~batch.real].any()
    assert not found[3][~batch.real].any()
    found[0] = found[0][kept]
    for place, name in enumerate(("o", "dq", "dk", "dv")):
        own = (found[place], near[place], truth[place])
        if truth[place].any():
            assert_near(op_parity(*own, gradient=place > 0), name)


# Where all queries see 32 keys, the second tile of 16 has padding.
CASES = [
    (num_vision, width, mask, read)
    for num_vision, width in ((5, 64), (0, 16), (27, 88))
    for mask in MASKS
    for read in READS
]


@pytest.mark.parametrize(
    ("num_vision", "width", "mask", "read"),
    [
        pytest.param(*case, marks=() if place % 3 == place // 3 % 3 else pytest.mark.full)
        for place, case in enumerate(CASES)
    ],
)
def test_the_numbers_without_padding(
    num_vision: int, width: int, mask: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = CASES.index((num_vision, width, mask, read))
    dtype = TARGETS[place % len(TARGETS)][1]
    choose = kernels._tiles.choose

    def chosen(kind: Any, op: str, own_class: str, *rest: Any) -> Any:
        tile = choose(kind, op, own_class, *rest)
        return tile._replace(whole=64, block_q=16, block_k=16)

    monkeypatch.setattr(kernels._tiles, "choose", chosen)
    check(batch_of(num_vision, VALID, 2, mask, read), width, dtype)


@pytest.mark.parametrize(
    "valid", [VALID.long(), VALID.float(), VALID[:2], VALID[:, :4], VALID.flatten()]
)
def test_what_does_not_say_which_rows_are_padding(valid: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"valid must be bool \[B, Nt\]"):
        PaddedLayout(4, 3, 5, torch.device("cpu"), valid)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(impl: str, task: str = "vqav2") -> Any:
    torch.manual_seed(0)
    return create_model(f"beit3_tiny_patch16_32_{task}", impl=impl, num_layers=1).to(DEVICE).eval()


def pairs(batch: int, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    return (
        torch.randn(batch, 3, 32, 32, generator=generator).to(DEVICE),
        torch.randint(4, 60, (batch, tokens), generator=generator).to(DEVICE),
        (torch.arange(tokens) >= lengths).to(DEVICE),
    )


@torch.no_grad()
def test_a_compiled_model_with_text_in_one_graph(fresh_compiler: None) -> None:
    model = model_of("triton")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        given = pairs(batch)
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@torch.no_grad()
def test_a_captured_model_with_text() -> None:
    model, expected = model_of("triton"), model_of("composite")
    on_gpu = DEVICE == "cuda"
    captured = model.capture(*pairs(2), text_lengths=(3, 6), graphs=on_gpu)
    for tokens in (6, 2):
        given = pairs(2, tokens)
        torch.testing.assert_close(captured(*given), expected(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_training_a_compiled_model_with_text(fresh_compiler: None) -> None:
    model = model_of("triton").train()
    # Drop path draws and drops as it does in the plain model.
    model.beit3.encoder.drop_path_rates = (0.5,)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        model.zero_grad()
        logits = run(*pairs(3))
        logits.square().sum().backward()
        results.append([logits, *[p.grad for p in model.parameters() if p.grad is not None]])
    assert len(results[0]) > 30
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
