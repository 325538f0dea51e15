"""The CUDA kernels of captioning steps behind impl="cuda"; without a GPU their binding in front of plain loops."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cuda_cases import DEVICE, on_device  # noqa: F401
from model_cases import randomize
from op_cases import DTYPES, assert_near, plain_best
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_fast.composite.cached_attention import cached_attention as composite_attention
from beit3_fast.errors import KernelUnavailable
from beit3_fast.model import create_model
from beit3_fast.model.decoding import CaptionDecoder
from beit3_fast.ops import (
    NewKeys,
    cached_attention,
    cuda_kernels,
    head_top_k,
    kernel_cases,
    measured_cached_attention,
)
from beit3_fast.parity import op_parity, worst_of
from beit3_fast.reference.cached_attention import cached_attention as attention_formula
from beit3_fast.reference.head_top_k import head_top_k as head_formula

pytestmark = pytest.mark.usefixtures("on_device")


def draw(*shape: int, dtype: str = "bf16") -> Tensor:
    return torch.randn(*shape).to(DTYPES[dtype])


@pytest.mark.parametrize("samples", [None, [3, 1]])
@pytest.mark.parametrize(("dtype", "width"), [("bf16", 64), ("fp16", 88)])
@torch.no_grad()
def test_cached_attention(dtype: str, width: int, samples: list[int] | None) -> None:
    """q a slice of fused rows, k and v the first of a longer cache."""
    own = [0, 1, 2, 3] if samples is None else samples
    fused = draw(len(own), 5, 3 * 2 * width, dtype=dtype)
    q = fused[:, 2:, 2 * width : 4 * width]
    k, v = draw(2, 4, 20, 2 * width, dtype=dtype)[:, :, :17]
    seen = torch.rand(len(own), 3, 17 - 6) > 0.4
    seen[0, 1] = False
    whole = torch.nn.functional.pad(seen, (6, 0), value=True)
    tail = (whole, own, 2, width**-0.5)
    truth = attention_formula(q.double(), k.double(), v.double(), *tail)
    plain = composite_attention(q, k, v, *tail)
    options: dict[str, Any] = {"num_heads": 2, "samples": samples}
    here = [t.to(DEVICE) for t in (q, k, v)]
    o = cached_attention(*here, seen.to(DEVICE), front=6, impl="cuda", **options)
    assert_near(op_parity(o.cpu(), plain, truth), (dtype, width))
    done = measured_cached_attention(*here, whole.to(DEVICE), impl="cuda", **options)
    assert torch.equal(done.rows.cpu(), o.cpu().flatten(0, 1))
    assert done.width == width
    expected = kernel_cases.moments(done.rows.cpu(), width)
    torch.testing.assert_close(done.parts.cpu(), expected, rtol=1e-4, atol=1e-5)
    for impl in ("composite", "reference"):
        o = cached_attention(q, k, v, seen, front=6, impl=impl, **options)
        assert_near(op_parity(o, plain, truth), impl)


@pytest.mark.parametrize("samples", [None, [3, 1]])
@pytest.mark.parametrize("as_tensor", [False, True])
@torch.no_grad()
def test_new_keys(as_tensor: bool, samples: list[int] | None) -> None:
    own = [0, 1, 2, 3] if samples is None else samples
    new_k, new_v = draw(len(own), 3, 2 * 128).chunk(2, dim=2)
    q, cache = draw(len(own), 2, 128), draw(2, 4, 20, 128)
    seen = torch.rand(len(own), 2, 12) > 0.3
    options: dict[str, Any] = {"num_heads": 2, "samples": samples, "front": 5}
    found = []
    for impl, device in (("reference", "cpu"), ("cuda", DEVICE)):
        k, v = cache.clone().to(device)
        place = torch.tensor([11], device=device) if as_tensor else 11
        new = NewKeys(new_k.to(device), new_v.to(device), place)
        here = (q.to(device), k[:, :17], v[:, :17], seen.to(device))
        found.append((cached_attention(*here, new=new, impl=impl, **options), k, v))
    torch.testing.assert_close(found[1][0].cpu(), found[0][0], rtol=2e-2, atol=2e-2)
    for now, expected in zip(found[1][1:], found[0][1:], strict=True):
        assert torch.equal(now.cpu(), expected)


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_head_top_k(dtype: str, restricted: bool) -> None:
    x, weight, bias = (draw(*size, dtype=dtype) for size in ((5, 40), (301, 32), (301,)))
    x = x[:, 8:]
    allowed = torch.arange(301) % 4 > 0 if restricted else None
    truth, order = head_formula(x.double(), weight.double(), bias.double(), allowed, 7)
    plain, _ = plain_best(x, weight, bias, 7, allowed)
    there = [None if t is None else t.to(DEVICE) for t in (x, weight, bias, allowed)]
    log_p, ids = head_top_k(*there[:3], 7, allowed=there[3], impl="cuda")  # type: ignore[arg-type]
    assert_near(op_parity(log_p.cpu(), plain, truth), dtype)
    assert torch.equal(ids.cpu(), order)


@torch.no_grad()
def test_captions_with_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image, words and head on the kernels; as likely as those of the same model in fp32."""
    sizes: dict[str, Any] = {"embed_dim": 64, "num_heads": 1, "ffn_dim": 64, "num_layers": 2}
    name = "beit3_tiny_patch16_32_captioning"
    model: Any = randomize(create_model(name, impl="cuda", **sizes)).bfloat16()
    images = torch.randn(2, 3, 32, 32).bfloat16()
    options: dict[str, Any] = {"num_beams": 2, "max_length": 6, "mask_id": 91}
    wide: Any = create_model(name, impl="reference", **sizes)
    wide.load_state_dict(model.state_dict())
    found = model.to(DEVICE).caption(images.to(DEVICE), **options)
    expected = wide.float().eval().caption(images.float(), **options)
    assert [c[0].score for c in found] == pytest.approx([c[0].score for c in expected], abs=0.1)


class Launches(TorchDispatchMode):
    """Names of the calls that launch something on a GPU: no views, no memory without content, no checks of a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        alias = [own.alias_info for own in func._schema.returns]
        is_view = any(own is not None and not own.is_write for own in alias)
        if not is_view and name not in _NO_LAUNCH:
            self.names.append(name)
        return out


_NO_LAUNCH = {"empty", "min", "max", "item", "_local_scalar_dense", "_unsafe_view"}


@torch.no_grad()
def test_launches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that docs/kernels.md speaks of: five a layer, and a fixed number around them."""
    kernels: Counter[str] = Counter()
    launch = cuda_kernels.launch

    def spy(kernel: str, *arguments: Any) -> None:
        kernels[kernel] += 1
        launch(kernel, *arguments)

    sizes: dict[str, Any] = {"embed_dim": 64, "num_heads": 1, "ffn_dim": 64, "num_layers": 3}
    name = "beit3_tiny_patch16_32_captioning"
    model: Any = randomize(create_model(name, impl="cuda", **sizes)).bfloat16().to(DEVICE)
    images = torch.randn(2, 3, 32, 32).bfloat16().to(DEVICE)
    decoder = CaptionDecoder(model, images, 3, 6, 0, 91)
    decoder.graphs, decoder.keep_is_free = False, False
    decoder.start()
    words = torch.full((2, 3), 5, device=DEVICE)
    decoder.step(words, torch.zeros_like(words))
    steps, used = (torch.tensor([n], device=DEVICE) for n in (decoder.steps, decoder.used))
    run, parents = decoder.fixed_step(steps, used), torch.zeros_like(words)
    monkeypatch.setattr(cuda_kernels, "launch", spy)
    with Launches() as launches:
        run(words, parents)
    assert kernels == {"expert_linear": 4 * 3, "decode_attention": 3, "row_statistics": 1}
    found = Counter(launches.names)
    assert found.pop("cuda_cached_attention") == 3
    assert found.pop("cuda_expert_linear") == 4 * 3
    assert not found.keys() & {"index_copy_", "index_put_"}, "attention writes the keys"
    assert found.total() == 20, found


@pytest.mark.parametrize("kernel", ["cuda_cached_attention", "cuda_head_top_k"])
@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_checks_on_a_users_machine_pass(kernel: str) -> None:
    parity = worst_of(kernel_cases.CUDA_CASES[kernel](torch.bfloat16, DEVICE))
    assert parity.passed, parity.reason


@torch.no_grad()
def test_under_autocast_operands_are_lowered() -> None:
    """And the weights' copy is kept."""
    x, weight, bias = (draw(*size).float().to(DEVICE) for size in ((3, 16), (40, 16), (40,)))
    q, k, v = (draw(2, 5, 64).float().to(DEVICE) for _ in range(3))
    seen = torch.rand(2, 5, 5, device=DEVICE) > 0.3
    expected = head_top_k(*(t.bfloat16() for t in (x, weight, bias)), 4, impl="cuda")
    lower = [t.bfloat16() for t in (q, k, v)]
    new = NewKeys(k[:, :2] + 1, v[:, :2] + 1, 1)
    lower_new = NewKeys(new.k.bfloat16(), new.v.bfloat16(), 1)
    o = cached_attention(*lower, seen, num_heads=1, new=lower_new, impl="cuda")
    with torch.autocast(DEVICE, torch.bfloat16):
        for _ in range(2):
            found = head_top_k(x, weight, bias, 4, impl="cuda")
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        done = cached_attention(q, k, v, seen, num_heads=1, new=new, impl="cuda")
    assert done.dtype == torch.bfloat16
    assert torch.equal(done, o)
    assert torch.equal(k[:, 1:3], new.k), "the cache is in the dtype that it has"


def attention(**changes: Any) -> dict[str, Any]:
    """Arguments of launch_decode_attention that fit together."""
    arguments: dict[str, Any] = {
        "q": draw(2, 3, 128),
        "k": draw(2, 5, 128),
        "v": draw(2, 5, 128),
        "seen": torch.ones(2, 3, 4, dtype=torch.bool),
        "samples": None,
        "new_k": draw(2, 2, 128),
        "new_v": draw(2, 2, 128),
        "place": None,
        "first": 3,
        "front": 1,
        "num_heads": 2,
        "scale": 0.1,
        "o": draw(2, 3, 128),
        "parts": torch.empty(2, 3, 2, 2),
        "stream": 0,
    }
    return {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in (arguments | changes).items()
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.ones(2, 3, 128)}, "bfloat16 or float16"),
        ({"q": draw(3, 128)}, "q must have 3 dimensions"),
        ({"k": draw(2, 5, 128, dtype="fp16")}, "k must have the dtype"),
        ({"v": draw(2, 4, 128)}, "the same rows"),
        ({"k": draw(2, 5, 64)}, "width of q"),
        ({"o": draw(2, 3, 256)[:, :, :128]}, "o must be contiguous"),
        ({"num_heads": 3}, "3 heads do not divide"),
        ({"scale": float("inf")}, "finite"),
        ({"front": 6}, "front must be from 0 to 5, got 6"),
        ({"seen": torch.ones(2, 3, 5, dtype=torch.bool)}, r"seen must be bool \[2, 3, 4\]"),
        ({"seen": torch.ones(2, 3, 4)}, "seen must be bool"),
        ({"samples": torch.zeros(3, dtype=torch.int32)}, "samples must be .* of 2"),
        ({"samples": torch.zeros(2)}, "samples"),
        ({"k": draw(3, 5, 128), "v": draw(3, 5, 128)}, "without samples.*2 sequences, got 3"),
        ({"parts": torch.empty(2, 3, 2)}, "parts must be contiguous, of 24"),
        ({"new_v": None}, "come together"),
        ({"new_v": draw(2, 1, 128)}, "the sequences and the width of q"),
        ({"new_k": draw(1, 2, 128)}, "the sequences and the width of q"),
        ({"new_k": draw(2, 2, 128, dtype="fp16")}, "new_k must have the dtype"),
        ({"place": torch.tensor([1, 2])}, "place must be .* of 1"),
    ],
)
def test_the_binding_of_attention_refuses(
    changes: dict[str, Any],
    words: str,
    on_device: Any,  # noqa: F811
) -> None:
    on_device.launch_decode_attention(**attention())
    with pytest.raises(RuntimeError, match=words):
        on_device.launch_decode_attention(**attention(**changes))


def head(**changes: Any) -> dict[str, Any]:
    """Arguments of launch_head_top_k that fit together."""
    arguments: dict[str, Any] = {
        "x": draw(3, 16),
        "weight": draw(300, 16),
        "bias": draw(300),
        "allowed": torch.ones(300, dtype=torch.bool),
        "peaks": torch.empty(3, 2, 2),
        "best": torch.empty(3, 2, 4, dtype=torch.int64),
        "log_p": torch.empty(3, 4),
        "ids": torch.empty(3, 4, dtype=torch.int64),
        "stream": 0,
    }
    return {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in (arguments | changes).items()
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.ones(3, 16)}, "bfloat16 or float16"),
        ({"weight": draw(300, 24)}, "the features of x"),
        ({"weight": draw(300, 32)[:, :16]}, "weight must be contiguous"),
        ({"bias": draw(300, dtype="fp16")}, "bias"),
        ({"bias": draw(299)}, "bias must be contiguous, of 300"),
        ({"allowed": torch.ones(300)}, "allowed"),
        ({"peaks": torch.empty(3, 1, 2)}, "peaks must be contiguous, of 12"),
        ({"best": torch.empty(3, 2, 4)}, "best"),
        ({"log_p": torch.empty(12)}, "log_p must be"),
        ({"ids": torch.empty(3, 5, dtype=torch.int64)}, "ids must be contiguous, of 12"),
        ({"x": draw(3, 12), "weight": draw(300, 12)}, "multiples of 8"),
    ],
)
def test_the_binding_of_the_head_refuses(
    changes: dict[str, Any],
    words: str,
    on_device: Any,  # noqa: F811
) -> None:
    on_device.launch_head_top_k(**head())
    with pytest.raises(RuntimeError, match=words):
        on_device.launch_head_top_k(**head(**changes))


def test_sizes_that_the_kernels_do_not_take_are_said() -> None:
    x, weight = draw(2, 16).to(DEVICE), draw(40, 16).to(DEVICE)
    with pytest.raises(KernelUnavailable, match="at most 32 classes a row, got 33"):
        head_top_k(x, weight, None, 33, impl="cuda")
    with pytest.raises(KernelUnavailable, match="multiples of 8, got 12"):
        head_top_k(x[:, :12], weight[:, :12], None, 3, impl="cuda")
    q, seen = draw(1, 2, 96).to(DEVICE), torch.ones(1, 2, 2, dtype=torch.bool, device=DEVICE)
    with pytest.raises(KernelUnavailable, match="width 64 or 88, got 32"):
        cached_attention(q, q, q, seen, num_heads=3, impl="cuda")
