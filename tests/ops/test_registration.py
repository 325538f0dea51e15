"""What torch.library knows of each registered op: schema, shape function, gradient, tracing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import expert_linear, library

if not library.available():
    pytest.skip(f"the library {library.why_unavailable()}", allow_module_level=True)

OPS = torch.ops.beit3_fast
REGISTERED = {
    "cached_attention",
    "cpu_expert_linear",
    "decoder_layer",
    "encoder_layers",
    "expert_layer_norm",
    "expert_linear",
    "layer_norm_gradients",
    "likeliest",
    "masked_linear_cross_entropy",
    "masked_linear_cross_entropy_backward",
    "pack_keys",
    "pack_transposed",
    "pack_weight",
    "patch_embedding",
    "quantize_weight",
    "shared_attention",
    "shared_attention_gradients",
    "transposed",
    "unpack_rows",
    "unpack_weight",
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    for op in ("expert_linear", "head_top_k", "patch_embedding", "shared_attention"):
        import_module(f"beit3_fast.ops.{op}")._op()
    import_module("beit3_fast.ops.rows")._ops()


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def linear_arguments(
    *,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    bounds: tuple[int, ...] = (0, 5, 12),
    packed: bool = False,
    int8: bool = False,
    bias: bool = True,
    norm: bool = True,
    residual: bool = True,
    rows: bool = False,
    activation: str = "gelu",
    sliced: bool = False,
) -> tuple[Any, ...]:
    def make(*shape: int) -> Tensor:
        return draw(*shape, dtype=dtype, grad=grad)

    experts, count = len(bounds) - 1, bounds[-1]
    x = make(count, 24 + 8 * sliced)
    weights = [make(16, 24) for _ in range(experts)]
    return (
        x[:, 3:27] if sliced else x,
        weights,
        [OPS.quantize_weight(w) if int8 else OPS.pack_weight(w) for w in weights] if packed else [],
        [make(16) for _ in range(experts)] if bias else [],
        [make(24) for _ in range(experts)] if norm else [],
        [make(24) for _ in range(experts)] if norm else [],
        make(count, 16) if residual else None,
        torch.randperm(count) if rows else None,
        list(bounds),
        1e-5,
        activation,
    )


LINEAR: dict[str, dict[str, Any]] = {
    "everything": {},
    "gradients": {"grad": True},
    "gradients of the least": {
        "grad": True,
        "bias": False,
        "norm": False,
        "residual": False,
        "activation": "none",
    },
    "gradients, bf16": {"grad": True, "dtype": torch.bfloat16, "activation": "none"},
    "gathered": {"grad": True, "rows": True},
    "bf16, packed": {"dtype": torch.bfloat16, "packed": True},
    "packed": {"packed": True, "rows": True},
    "int8": {"packed": True, "int8": True, "dtype": torch.bfloat16},
    "an expert without rows": {"grad": True, "bounds": (0, 0, 12)},
    "one row": {"bounds": (0, 1), "grad": True},
    "sliced": {"sliced": True},
}


@pytest.mark.parametrize("name", LINEAR)
def test_expert_linear(name: str) -> None:
    torch.library.opcheck(OPS.expert_linear.default, linear_arguments(**LINEAR[name]))


@pytest.mark.parametrize("name", ["gradients", "bf16, packed", "int8"])
def test_expert_linear_as_torch_compile_calls_it(name: str) -> None:
    arguments = linear_arguments(**LINEAR[name])
    torch.library.opcheck(OPS.cpu_expert_linear.default, arguments)
    expected = OPS.expert_linear(*arguments)
    assert torch.equal(OPS.cpu_expert_linear(*arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (16, 24), (33, 61), (64, 3)])
def test_pack_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = draw(*shape, dtype=dtype)
    torch.library.opcheck(OPS.pack_weight.default, (weight,))
    packed = OPS.pack_weight(weight)
    torch.library.opcheck(OPS.unpack_weight.default, (packed, *shape))
    assert torch.equal(OPS.unpack_weight(packed, *shape), weight)
    torch.library.opcheck(OPS.pack_transposed.default, (weight,))
    assert torch.equal(OPS.pack_transposed(weight.T.contiguous()), packed)
    torch.library.opcheck(OPS.quantize_weight.default, (weight,))
    torch.library.opcheck(OPS.unpack_weight.default, (OPS.quantize_weight(weight), *shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restricted", [False, True])
def test_likeliest(restricted: bool, dtype: torch.dtype) -> None:
    allowed = torch.arange(70) % 2 > 0 if restricted else None
    torch.library.opcheck(OPS.likeliest.default, (draw(3, 70, dtype=dtype), allowed, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [False, True])
def test_patch_embedding(least: bool, dtype: torch.dtype) -> None:
    packed = OPS.pack_weight(draw(24, 3 * 4 * 4, dtype=dtype))
    tokens = [draw(24, dtype=dtype) for _ in range(3)]
    optional = [None, None] if least else [draw(7, 24, dtype=dtype), torch.rand(2, 6) < 0.5]
    tokens[0] = None if least else tokens[0]
    arguments = (draw(2, 3, 8, 12, dtype=dtype), packed, *tokens, *optional, 4)
    torch.library.opcheck(OPS.patch_embedding.default, arguments)
    torch.library.opcheck(OPS.patch_embedding.default, (*arguments, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_behind_the_layers(dtype: torch.dtype) -> None:
    norm = [[draw(12, dtype=dtype) for _ in range(2)] for _ in range(2)]
    arguments = (draw(7, 12, dtype=dtype), *norm, [1e-5, 1e-3], [0, 3, 7])
    torch.library.opcheck(OPS.expert_layer_norm.default, arguments)
    places = torch.tensor([1, 0, 5])
    torch.library.opcheck(OPS.unpack_rows.default, (draw(3, 12, dtype=dtype), places, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_gradients(dtype: torch.dtype) -> None:
    rows = [draw(7, 12, dtype=dtype) for _ in range(2)]
    torch.library.opcheck(OPS.layer_norm_gradients.default, (*rows, draw(12, dtype=dtype), 1e-5))
    torch.library.opcheck(OPS.transposed.default, (rows[0],))


def attention_arguments(
    *,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    mask: str = "bidirectional",
    selection: tuple[str, str] | None = None,
    lengths: tuple[list[int], list[int]] = ([5, 0, 4], [2, 3, 0]),
    fused: bool = False,
    seen: bool = False,
) -> tuple[Any, ...]:
    layout = TokenLayout.from_lengths(*lengths)
    count = layout.num_rows
    if fused:
        q, k, v = draw(count, 48, dtype=dtype, grad=grad).chunk(3, dim=1)
    else:
        q, k, v = (draw(count, 16, dtype=dtype, grad=grad) for _ in range(3))
    cu = [layout.cu_vision, layout.cu_text]
    chosen: list[Tensor | None] = [None, None, None]
    if selection is not None:
        rows, queries = layout.select(*selection)  # type: ignore[arg-type]
        q = q.detach()[rows].requires_grad_(grad)
        chosen = [queries.cu_vision, queries.cu_text, queries.positions]
    own = torch.rand(layout.mask_size, layout.mask_size) < 0.7 if seen else None
    return (q, k, v, *cu, *chosen, 2, 8**-0.5, mask, own)


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradients": {"grad": True},
    "seq2seq": {"grad": True, "mask": "seq2seq"},
    "causal, bf16": {"grad": True, "mask": "causal", "dtype": torch.bfloat16},
    "first rows": {"grad": True, "selection": ("first", "first")},
    "text rows, causal": {"selection": ("none", "all"), "mask": "causal"},
    "no rows": {"lengths": ([0], [0])},
    "fused": {"fused": True},
    "a mask tensor": {"grad": True, "seen": True, "selection": ("first", "all")},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_shared_attention(name: str) -> None:
    torch.library.opcheck(OPS.shared_attention.default, attention_arguments(**ATTENTION[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_attention(dtype: torch.dtype) -> None:
    q, (k, v) = draw(2, 3, 16, dtype=dtype), draw(2, 4, 9, 16, dtype=dtype)[:, :, :7]
    import_module("beit3_fast.ops.cached_attention")._ops()
    arguments = (q, k, v, torch.rand(2, 3, 7) < 0.5, torch.tensor([3, 0]), 2, 0.3)
    torch.library.opcheck(OPS.cached_attention.default, arguments)
    torch.library.opcheck(OPS.pack_keys.default, (k, v, 2))
    packed = OPS.pack_keys(k, v, 2)
    torch.library.opcheck(OPS.cached_attention.default, (*arguments, packed, 7))


def layer_arguments(dtype: torch.dtype, width: int = 32, hidden: int = 64) -> list[Any]:
    """The parameters of a layer with one expert, as encoder_layers and decoder_layer take them."""
    shapes = [(width, width)] * 4 + [(hidden, width), (width, hidden)]
    packed = [OPS.pack_weight(draw(*shape, dtype=dtype)) for shape in shapes]
    biases = [draw(shape[0], dtype=dtype) for shape in shapes]
    widths = (width, width, width, hidden)
    norms = [[draw(size, dtype=dtype) for size in widths] for _ in range(2)]
    return [packed, biases, *norms, [1e-5] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selected", [False, True])
def test_encoder_layers(dtype: torch.dtype, selected: bool) -> None:
    import_module("beit3_fast.ops.whole_layer")._ops()
    layout = TokenLayout.from_lengths([5, 0], [2, 3])
    own: list[Tensor | None] = [None] * 4
    asked = layout.num_rows
    if selected:
        rows, queries = layout.select("first", "first")
        own = [rows, queries.cu_vision, queries.cu_text, queries.positions]
        asked = len(rows)
    bounds = [[0, layout.num_rows], [0, asked], [0, asked]]
    x, cu = draw(layout.num_rows, 32, dtype=dtype), (layout.cu_vision, layout.cu_text)
    norm = [[draw(32, dtype=dtype)], [draw(32, dtype=dtype)], [1e-5], [0, asked]]
    if selected:
        norm = [[], [], [], []]
    arguments = (x, *layer_arguments(dtype), *bounds, 2, *norm, "causal", *cu, *own)
    torch.library.opcheck(OPS.encoder_layers.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_layer(dtype: torch.dtype) -> None:
    import_module("beit3_fast.ops.whole_layer")._ops()
    k, v = draw(2, 3, 9, 32, dtype=dtype)
    seen, samples = torch.rand(2, 1, 9) < 0.5, torch.tensor([2, 0])
    arguments = (draw(4, 32, dtype=dtype), *layer_arguments(dtype), 2, k, v, 5, seen, samples)
    torch.library.opcheck(OPS.decoder_layer.default, arguments)
    prefix = OPS.pack_keys(*draw(2, 3, 6, 32, dtype=dtype), 2)
    torch.library.opcheck(OPS.decoder_layer.default, (*arguments, prefix, 6))


@pytest.mark.parametrize("name", ATTENTION)
def test_shared_attention_gradients(name: str) -> None:
    arguments = [
        t.detach() if isinstance(t, Tensor) else t for t in attention_arguments(**ATTENTION[name])
    ]
    grad = torch.randn(arguments[0].shape).to(arguments[0].dtype)
    torch.library.opcheck(OPS.shared_attention_gradients.default, (grad, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "bias"), [(5, True), (3, False), (0, True)])
def test_masked_linear_cross_entropy(dtype: torch.dtype, count: int, bias: bool) -> None:
    x, weight = draw(9, 24, dtype=dtype)[:, 3:19], draw(16, 11, dtype=dtype).T
    own = [x, weight, draw(11, dtype=dtype) if bias else None]
    index = [torch.randperm(9)[:count], torch.randint(11, (count,))]
    leaves = [t if t is None else t.detach().requires_grad_() for t in own]
    torch.library.opcheck(OPS.masked_linear_cross_entropy.default, (*leaves, *index, 0.1))
    _, peaks = OPS.masked_linear_cross_entropy(*own, *index, 0.1)
    arguments = (draw(count), *own, *index, peaks, 0.1)
    torch.library.opcheck(OPS.masked_linear_cross_entropy_backward.default, arguments)


def test_every_registered_op_is_checked_here() -> None:
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("beit3_fast::")
    }
    # test_triton_registration.py and test_cuda_binding.py have the others.
    ours = {name for name in names if not name.startswith(("triton_", "cuda_", "launch_"))}
    assert ours - {"cpu_isa", "product_loop"} == REGISTERED


@pytest.mark.parametrize("name", ["everything", "bf16, packed", "gathered", "packed"])
def test_the_shape_function_agrees_with_the_kernel(name: str) -> None:
    """Also in the strides, with operands in dense but permuted memory."""
    arguments = linear_arguments(**{**LINEAR[name], "grad": False})
    real = OPS.expert_linear(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        moved = [
            [mode.from_tensor(t) for t in a]
            if isinstance(a, list) and a and isinstance(a[0], Tensor)
            else mode.from_tensor(a)
            if isinstance(a, Tensor)
            else a
            for a in arguments
        ]
        fake = OPS.expert_linear(*moved)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("op", ["pack_weight", "pack_transposed", "quantize_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_a_packed_weight_is_known_before_it_is_packed(
    op: str, dtype: torch.dtype
) -> None:
    pack = getattr(OPS, op)
    for shape in [(1, 1), (32, 64), (33, 65), (70, 31), (5, 200)]:
        real = pack(torch.zeros(shape, dtype=dtype))
        with torch._subclasses.FakeTensorMode():
            fake = pack(torch.zeros(shape, dtype=dtype))
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.filterwarnings("error")
def test_a_call_with_fake_tensors_packs_fake_weights() -> None:
    """And keeps none of them for the real weight that they stand for."""
    x, weights = torch.randn(5, 32), [torch.randn(16, 32), torch.randn(16, 32)]

    def run() -> Tensor:
        return expert_linear(x, [tuple(weights)], bounds=(0, 5), impl="cpu")

    with torch.no_grad():
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert run().shape == (5, 32)
            fake = [mode.from_tensor(weight) for weight in weights]
            y = expert_linear(mode.from_tensor(x), fake, bounds=(0, 2, 5), impl="cpu")
            assert y.shape == (5, 16)
        torch.testing.assert_close(run(), x @ torch.cat(weights).T)
