"""Products in 8 bits behind impl="cuda", and what is done around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from float8_cases import DEVICE, model_on_device, on_device  # noqa: F401
from torch import Tensor

from beit3_fast.errors import KernelUnavailable, ShapeError
from beit3_fast.float8 import E4M3, Quantized, dequantize, quantize
from beit3_fast.model import create_model
from beit3_fast.model.registry import to_float8
from beit3_fast.ops import (
    Measured,
    Norm,
    cuda_kernels,
    expert_linear,
    kernel_cases_attention,
    kernel_cases_float8,
    measured_expert_linear,
)
from beit3_fast.ops.packed_weight import quantize_float8
from beit3_fast.parity import worst_of

pytestmark = pytest.mark.usefixtures("on_device")
BOUNDS = (0, 3, 7)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16().to(DEVICE)


def weights(out: int, features: int, count: int = 2) -> list[Any]:
    return [quantize_float8(draw(out, features, scale=features**-0.5)) for _ in range(count)]


def near(found: Tensor, expected: Tensor) -> None:
    """Sums in another order move a number of 8 bits to its neighbour here and there."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < 4e-3, error


@pytest.mark.parametrize("trivial", [True, False], ids=["absorbed", "with its weight"])
@torch.no_grad()
def test_layer_norm_with_and_without_a_weight(trivial: bool) -> None:
    torch.manual_seed(0)
    gamma = [torch.ones(48) if trivial else 1 + 0.3 * torch.randn(48) for _ in range(2)]
    norm = Norm([g.bfloat16().to(DEVICE) for g in gamma], [draw(48) for _ in range(2)])
    x, own, biases = draw(7, 48), weights(32, 48), [draw(32) for _ in range(2)]
    options: dict[str, Any] = {"bounds": BOUNDS, "norm": norm, "activation": "gelu"}
    options["residual"] = draw(7, 32)
    expected = expert_linear(x, own, biases, impl="reference", **options)
    near(expert_linear(x, own, biases, impl="cuda", **options), expected)


@torch.no_grad()
def test_stacked_weights_named_rows_and_more_experts_than_a_launch_takes() -> None:
    torch.manual_seed(0)
    x, own = draw(12, 32), [tuple(weights(16, 32, 3)) for _ in range(4)]
    rows = torch.tensor([9, 2, 4, 11, 0, 7], device=DEVICE)
    for options in (
        {"bounds": (0, 3, 5, 6, 12)},
        {"bounds": (0, 1, 3, 4, 6), "rows": rows, "residual": draw(12, 48)},
    ):
        given: dict[str, Any] = options
        expected = expert_linear(x, own, impl="reference", **given)
        near(expert_linear(x, own, impl="cuda", **given), expected)


@torch.no_grad()
def test_the_next_op_reads_what_was_left() -> None:
    """The same bits as when it rounds the rows itself, and no other rows than those that were left."""
    torch.manual_seed(0)
    x, first, second = draw(7, 32), weights(144, 32), weights(32, 144)
    norm = Norm([draw(144) * 0 + 1] * 2, [draw(144)] * 2)
    given: dict[str, Any] = {"bounds": BOUNDS, "impl": "cuda"}
    h = measured_expert_linear(x, first, activation="gelu", **given)
    assert h.rounded is not None
    assert h.parts is not None
    assert torch.equal(dequantize(h.rounded), dequantize(quantize(h.rows)))
    fused = expert_linear(h, second, norm=norm, **given)
    near(fused, expert_linear(h.rows, second, norm=norm, **given))
    alone = measured_expert_linear(x, first, activation="gelu", stores=False, **given)
    assert alone.rows.shape == h.rows.shape
    assert not alone.stored
    assert alone.rows.untyped_storage().nbytes() == 2 * 144
    assert torch.equal(expert_linear(alone, second, norm=norm, **given), fused)
    other = Measured(h.rows * 0, h.parts, h.width, h.rounded)
    assert torch.equal(expert_linear(other, second, norm=norm, **given), fused)
    picked = h.select(torch.tensor([5, 1], device=DEVICE))
    some = expert_linear(
        picked, second[1:], norm=Norm(norm.weights[1:], norm.biases[1:]), bounds=(0, 2), impl="cuda"
    )
    assert torch.equal(some[0], fused[5])


@torch.no_grad()
def test_rows_that_were_left_are_rounded_again_where_layer_norm_has_a_weight() -> None:
    torch.manual_seed(0)
    h = measured_expert_linear(draw(7, 32), weights(48, 32), bounds=BOUNDS, impl="cuda")
    norm = Norm([1 + draw(48, scale=0.5) for _ in range(2)], [draw(48)] * 2)
    own = weights(32, 48)
    expected = expert_linear(h.rows, own, norm=norm, bounds=BOUNDS, impl="reference")
    near(expert_linear(h, own, norm=norm, bounds=BOUNDS, impl="cuda"), expected)


def large_values(name: str, layers: int) -> Any:
    """A model in float8 whose values are 64 times as large as its queries and keys: their scales are not the values'."""
    sizes: dict[str, Any] = {"embed_dim": 128, "num_heads": 2, "ffn_dim": 256, "num_layers": layers}
    model = create_model(name, impl="cuda", **sizes)
    for layer in getattr(model, "beit3", model).encoder.layers:
        for own in layer.self_attn.v_proj.modules():
            if isinstance(own, torch.nn.Linear):
                own.weight.mul_(64)
    return to_float8(model).to(DEVICE)


def take_composite(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = "composite"


@torch.no_grad()
@pytest.mark.parametrize("rounds", [True, False], ids=["attention too", "attention in bf16"])
def test_a_model_passes_rows_on_in_8_bits(
    rounds: bool,
    model_on_device: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not rounds:
        monkeypatch.setattr(cuda_kernels, "attention_rounds", lambda device: False)
    rounds = cuda_kernels.attention_rounds(DEVICE)
    torch.manual_seed(0)
    model = large_values("beit3_tiny_patch16_32", 2)
    images = [torch.randn(3, 32, 32).bfloat16().to(DEVICE), None]
    text = [torch.arange(5, device=DEVICE) + 7, torch.arange(3, device=DEVICE) + 2]
    launched: list[str] = []
    own: Callable[..., None] = cuda_kernels.launch

    def launch(kernel: str, *arguments: Any) -> None:
        launched.append(kernel)
        own(kernel, *arguments)

    monkeypatch.setattr(cuda_kernels, "launch", launch)
    found = model.forward_packed(images, text).rows
    assert launched.count("float8_linear") == 2 * 4
    assert launched.count("shared_attention") == 2
    # What comes from the embedding is rounded in a pass of its own, and from an attention that cannot do it.
    assert launched.count("quantize_rows") == (1 if rounds else 1 + 2)
    take_composite(model)
    expected = model.forward_packed(images, text).rows
    assert (found - expected).norm() / expected.norm() < 0.02


@torch.no_grad()
def test_the_last_layer_reads_few_queries_and_all_values(
    model_on_device: Any,  # noqa: F811
) -> None:
    torch.manual_seed(0)
    model = large_values("beit3_tiny_patch16_32_retrieval", 1)
    images = torch.randn(3, 3, 32, 32).bfloat16().to(DEVICE)
    found = model.encode_image(images, "cls")
    take_composite(model)
    expected = model.encode_image(images, "cls")
    assert (found - expected).norm() / expected.norm() < 0.02


@torch.no_grad()
def test_rows_that_are_in_8_bits_alone_are_read_by_nothing_else() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"bounds": BOUNDS, "impl": "cuda"}
    alone = measured_expert_linear(draw(7, 32), weights(48, 32), stores=False, **options)
    own, picked = weights(32, 48), alone.select(torch.tensor([6, 1], device=DEVICE))
    assert not picked.stored
    assert picked.rows.shape == (2, 48)
    with pytest.raises(KernelUnavailable, match="8 bits alone, which impl='cuda' reads; got"):
        expert_linear(alone, own, bounds=BOUNDS, impl="composite")
    with pytest.raises(ShapeError, match="which only products with weights in 8 bits"):
        expert_linear(alone, [draw(32, 48)] * 2, **options)
    norm = Norm([1 + draw(48, scale=0.5) for _ in range(2)], [draw(48)] * 2)
    with pytest.raises(KernelUnavailable, match=r"LayerNorm's weight.*was changed since"):
        expert_linear(alone, own, norm=norm, **options)


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU's order of blocks matters")
@pytest.mark.full
@torch.no_grad()
def test_the_same_bits_every_time() -> None:
    x, own = draw(12_000, 768), weights(3072, 768)
    norm = Norm([draw(768) * 0 + 1] * 2, [draw(768)] * 2)
    options: dict[str, Any] = {"norm": norm, "activation": "gelu", "impl": "cuda"}

    def run() -> list[Tensor]:
        left = measured_expert_linear(x, own, bounds=(0, 11_111, 12_000), **options)
        assert left.parts is not None
        assert left.rounded is not None
        numbers, scales = left.rounded
        return [left.rows, left.parts, numbers.view(torch.uint8), scales]

    first = run()
    assert not first[0].isnan().any()
    for _ in range(249):
        assert all(torch.equal(mine, expected) for mine, expected in zip(run(), first, strict=True))


@torch.no_grad()
def test_one_graph_and_the_same_numbers_under_torch_compile() -> None:
    x, own = draw(7, 32), weights(48, 32)

    def product(x: Tensor) -> Tensor:
        return expert_linear(x, own, bounds=BOUNDS, impl="cuda")

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), product(x))


@torch.no_grad()
def test_sizes_and_dtypes_that_the_kernels_do_not_take_are_said() -> None:
    with pytest.raises(KernelUnavailable, match="multiples of 16, got 24 in and 16 out"):
        expert_linear(draw(2, 24), weights(16, 24, 1), bounds=(0, 2), impl="cuda")
    own = [quantize_float8(draw(16, 32), torch.float32)]
    with pytest.raises(KernelUnavailable, match="takes bfloat16 beside float8, got float32"):
        expert_linear(draw(2, 32).float(), own, bounds=(0, 2), impl="cuda")


@pytest.mark.full
def test_attentions_check_on_a_users_machine_passes(
    model_on_device: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE == "cpu":
        own = kernel_cases_attention
        monkeypatch.setattr(own, "_ON_CUDA", own._CASES)
    found = kernel_cases_attention.cuda_shared_attention(torch.bfloat16, DEVICE)
    assert cuda_kernels.attention_rounds(DEVICE) == any("in 8 bits" in name for name in found)
    parity = worst_of(found)
    assert parity.passed, parity.reason


@pytest.mark.full
def test_the_check_on_a_users_machine_passes() -> None:
    parity = worst_of(kernel_cases_float8.cuda_float8_linear(torch.bfloat16, DEVICE))
    assert parity.passed, parity.reason


def product(**changes: Any) -> dict[str, Any]:
    """Arguments of launch_float8_linear that fit together."""
    x, own = quantize(draw(4, 32)), quantize(draw(32, 32), 32)
    place = Quantized(torch.zeros(4, 16, device=DEVICE).to(E4M3), torch.zeros(4, 1, device=DEVICE))
    arguments: dict[str, Any] = {
        "x": x.numbers,
        "x_scales": x.scales,
        "weights": own.numbers.view(2, 16, 32),
        "weight_scales": own.scales.view(2, 16),
        "sums": torch.zeros(2, 16, device=DEVICE),
        "biases": torch.zeros(2, 16, device=DEVICE),
        "parts": torch.ones(4, 1, 2, device=DEVICE),
        "part_width": 32,
        "eps": 1e-5,
        "residual": draw(4, 16),
        "bounds": [0, 2, 4],
        "gelu": True,
        "y": draw(4, 16),
        "y_parts": torch.zeros(4, 1, 2, device=DEVICE),
        "rounded": place.numbers,
        "rounded_scales": place.scales,
        "stream": 0,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": draw(4, 32)}, "x must be contiguous, of 128 numbers of its type"),
        ({"x_scales": torch.ones(4, 2)}, "x_scales must be contiguous, of 4"),
        ({"weights": draw(2, 16, 32)}, "weights must be contiguous"),
        ({"weights": torch.zeros(2, 16, 16).to(E4M3)}, r"weights must be \[2, 16, 32\]"),
        ({"weight_scales": torch.ones(16)}, "weight_scales"),
        ({"sums": None}, "come together"),
        ({"biases": torch.zeros(2, 15)}, "biases"),
        ({"parts": torch.ones(4, 2, 2)}, "parts must be contiguous, of 8"),
        ({"part_width": 0}, "part_width"),
        ({"residual": draw(4, 32)}, "residual must have shape"),
        ({"y": draw(4, 16).float()}, "y must be bfloat16"),
        ({"y_parts": torch.ones(4, 2, 2)}, "y_parts"),
        ({"rounded": torch.zeros(4, 8).to(E4M3)}, "rounded must be contiguous, of 64"),
        ({"rounded_scales": None}, "with their scales"),
        ({"y": None, "rounded": None, "rounded_scales": None}, "a place for its result"),
        ({"bounds": [0, 2, 5]}, "x has 4 rows"),
        ({"bounds": [0, 3, 2]}, "ascending"),
    ],
)
def test_the_binding_refuses(changes: dict[str, Any], words: str, on_device: Any) -> None:  # noqa: F811
    on_device.launch_float8_linear(**product())
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changes.items()}
    with pytest.raises(RuntimeError, match=words):
        on_device.launch_float8_linear(**product(**moved))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(4, 32)}, "x must be bfloat16"),
        ({"x": draw(4, 24)}, "features in multiples of 16"),
        ({"rounded": torch.zeros(4, 31).to(E4M3)}, "rounded must be contiguous, of 128"),
        ({"scales": torch.zeros(3)}, "scales must be contiguous, of 4"),
        ({"parts": torch.zeros(4)}, "parts must be contiguous, of 8"),
    ],
)
def test_the_binding_of_rows_refuses(changes: dict[str, Any], words: str, on_device: Any) -> None:  # noqa: F811
    x = changes.get("x", draw(4, 32)).to(DEVICE)
    arguments = {
        "x": x,
        "rounded": torch.zeros(x.shape, device=DEVICE).to(E4M3),
        "scales": torch.zeros(4, device=DEVICE),
        "parts": None,
    }
    moved = {k: v.to(DEVICE) for k, v in changes.items()}
    with pytest.raises(RuntimeError, match=words):
        on_device.launch_quantize_rows(**(arguments | moved), stream=0)
