"""Models for inference hold one copy of their weights and are otherwise the models that they came from."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rounded_models import TASKS, outputs
from torch import Tensor

import beit3_fast
from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.ops import Norm, expert_linear, library
from beit3_fast.ops.packed_weight import PackedWeight, UnpackedView, pack, quantize

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the compiled library")
NAME = "beit3_tiny_patch16_32_vqav2"
DTYPES = ("float32", "bfloat16")
STRIDED = ("cpu", torch.strided)


def pair(dtype: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    plain = beit3_fast.create_model(NAME, dtype=dtype, impl="cpu", **options)
    packed = beit3_fast.create_model(NAME, dtype=dtype, impl="cpu", inference_only=True, **options)
    packed.load_state_dict(plain.state_dict())
    return plain, packed


@torch.no_grad()
def scores(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(2, 3, 32, 32, generator=generator).to(model.head[-1].weight.dtype)
    text = torch.tensor([[0, 7, 9, 2], [0, 5, 2, 1]])
    result: Tensor = model(image, text, (text == 1).long())
    return result


def fc1(model: Any) -> Any:
    return model.beit3.encoder.layers[0].ffn.B.fc1.weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_the_plain_model(dtype: str) -> None:
    plain, packed = pair(dtype)
    kept = [p for p in packed.parameters() if isinstance(p, PackedWeight)]
    assert len(kept) == 2 * 6 * len(packed.beit3.encoder.layers) + 1
    assert torch.equal(scores(packed), scores(plain))


def memory_alive() -> dict[int, Tensor]:
    """A tensor for every piece of memory that one reads."""
    alive = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    plain = [t for t in alive if not isinstance(t, (PackedWeight, UnpackedView))]
    strided = [t for t in plain if (t.device.type, t.layout) == STRIDED]
    found = {}
    for tensor in strided:
        # What compilers trace with has no memory, and says so.
        with contextlib.suppress(RuntimeError):
            found[tensor.untyped_storage().data_ptr()] = tensor.detach()
    return found


@torch.inference_mode()
def use(model: Any, task: str) -> None:
    images = torch.randn(2, 3, 32, 32).to(next(model.parameters()).dtype)
    texts = [torch.tensor([0, 7, 9, 2]), torch.tensor([0, 5, 2])]
    model.encode_image(images)
    if task != "imageclassification":
        model.encode_text(texts)
        model.encode_pair(list(images), texts)
    if task == "captioning":
        model.caption(images, max_length=6, mask_id=91)
    if task in TASKS:
        outputs(model, task)


@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
@pytest.mark.parametrize("task", [*TASKS, "pretraining", ""])
def test_nothing_keeps_a_second_copy(task: str, dtype: str) -> None:
    gc.collect()
    others = memory_alive()  # of other tests in this process; kept, so that no memory is used again
    name = f"beit3_tiny_patch16_32_{task}".rstrip("_")
    packed = beit3_fast.create_model(name, dtype=dtype, impl="cpu", inference_only=True)
    use(packed, task)
    gc.collect()
    tensors = [*packed.parameters(), *packed.buffers()]
    own = [t.packed if isinstance(t, PackedWeight) else t for t in tensors]
    known = {t.untyped_storage().data_ptr() for t in own} | set(others)
    smallest = min(t.packed.nbytes for t in tensors if isinstance(t, PackedWeight))
    for pointer, tensor in memory_alive().items():
        if pointer not in known:
            kept = f"{tensor.dtype} of shape {list(tensor.shape)} is kept"
            assert tensor.untyped_storage().nbytes() < smallest // 2, kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_files_and_copies(dtype: str, tmp_path: Path) -> None:
    plain, packed = pair(dtype)
    state, expected = packed.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert type(state[name]) is Tensor, name
        assert torch.equal(state[name], tensor), name
    before = scores(packed)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert isinstance(fc1(other), PackedWeight)
        assert torch.equal(scores(other), before)
    beit3_fast.save_checkpoint(packed, tmp_path / "x.safetensors")
    again = beit3_fast.create_model(
        NAME, tmp_path / "x.safetensors", dtype=dtype, impl="cpu", inference_only=True
    )
    assert isinstance(fc1(again), PackedWeight)
    assert torch.equal(scores(again), before)
    beit3_fast.load_checkpoint(packed, tmp_path / "x.safetensors")
    assert torch.equal(scores(packed), before)


def test_nothing_is_packed_again_outside_of_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = pair("float32")
    expected = scores(packed)
    unwanted: list[str] = []
    monkeypatch.setattr(PackedWeight, "unpack", lambda self: unwanted.append("unpack"))
    with torch.enable_grad():
        result = scores.__wrapped__(packed)  # type: ignore[attr-defined]
    assert torch.equal(result, expected)
    assert not result.requires_grad
    assert not unwanted


def test_a_copy_is_independent() -> None:
    _, packed = pair("float32")
    before, other = scores(packed), copy.deepcopy(packed)
    with torch.no_grad():
        fc1(other).copy_(torch.zeros_like(fc1(other)))
    assert torch.equal(scores(packed), before)
    assert not torch.equal(scores(other), before)


def test_new_weights_are_seen_where_panels_are_not_whole() -> None:
    """At a width of 48 query, key and value are packed together, from parts that are packed already."""
    options = {"embed_dim": 48, "num_heads": 4, "ffn_dim": 100}
    plain, packed = pair("float32", **options)
    assert torch.equal(scores(packed), scores(plain))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    packed.load_state_dict(plain.state_dict())
    assert torch.equal(scores(packed), scores(plain))


def test_training_and_changes_in_place_are_refused() -> None:
    _, packed = pair("float32")
    assert not any(p.requires_grad for p in packed.parameters())
    with pytest.raises(ConfigError, match="without inference_only=True"):
        packed.requires_grad_(True)
    with pytest.raises(ConfigError, match="mul_ cannot change this weight"):
        fc1(packed).mul_(2)


def test_another_dtype_makes_plain_parameters() -> None:
    plain, packed = pair("float32")
    packed.to("cpu").to(torch.float32)
    assert isinstance(fc1(packed), PackedWeight)
    packed.bfloat16()
    assert not any(isinstance(p, PackedWeight) for p in packed.parameters())
    assert torch.equal(scores(packed), scores(plain.bfloat16()))


@pytest.mark.parametrize("impl", ["composite", "reference"])
def test_other_implementations_read_it_too(impl: str) -> None:
    plain, packed = pair("float32")
    plain.beit3.impl = packed.beit3.impl = impl
    assert torch.equal(scores(packed), scores(plain))


def test_where_other_calls_are_faster_weights_stay_plain() -> None:
    model = beit3_fast.create_model(NAME, impl="composite", inference_only=True)
    assert not any(isinstance(p, PackedWeight) for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 64, 64), (32, 64, 96), (40, 7), (5,)], ids=str)
def test_parts_of_a_stacked_weight(sizes: tuple[int, ...], dtype: str) -> None:
    """Equal parts of whole panels stay apart; others are packed together."""
    kind = getattr(torch, dtype)
    x, gamma, beta = (torch.randn(*s).to(kind) for s in ((9, 70), (70,), (70,)))
    parts = tuple(torch.randn(n, 70).to(kind) for n in sizes)
    options: dict[str, Any] = {"bounds": (0, 9), "norm": Norm([gamma], [beta])}
    with torch.no_grad():
        whole = expert_linear(x, [torch.cat(parts)], **options, impl="cpu")
        for given in (parts, tuple(pack(part) for part in parts)):
            result = expert_linear(x, [given], **options, impl="cpu")
            assert torch.equal(result, whole)
            assert torch.equal(torch.cat([p.clone() for p in given]), torch.cat(parts))


def test_the_op_refuses_parts_that_are_no_whole_panels() -> None:
    ops = torch.ops.beit3_fast
    weight = torch.randn(80, 16)
    packed = [ops.pack_weight(weight[:40]), ops.pack_weight(weight[40:])]
    with pytest.raises(RuntimeError, match="80 out-features in 2 packed parts"):
        ops.expert_linear(
            torch.randn(3, 16), [weight], packed, [], [], [], None, None, [0, 3], 1e-5, "none"
        )
    with pytest.raises(RuntimeError, match=r"not a weight of shape \[40, 17\]"):
        ops.unpack_weight(packed[0], 40, 17)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_memory_that_processes_share(dtype: str) -> None:
    model = beit3_fast.create_model(NAME, dtype=dtype, impl="cpu", inference_only=True)
    before = scores(model)
    model.share_memory()
    assert all(p.packed.is_shared() for p in model.parameters() if isinstance(p, PackedWeight))
    assert torch.equal(scores(model), before)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_states_within_inference_mode(dtype: str, tmp_path: Path) -> None:
    model = beit3_fast.create_model(NAME, dtype=dtype, impl="cpu", inference_only=True)
    other = beit3_fast.create_model(NAME, dtype=dtype, impl="cpu", inference_only=True)
    with torch.inference_mode():
        other.load_state_dict(model.state_dict())
        beit3_fast.save_checkpoint(model, tmp_path / "x.safetensors")
        beit3_fast.load_checkpoint(other, tmp_path / "x.safetensors")
    assert torch.equal(scores(other), scores(model))


@torch.no_grad()
def test_no_write_is_lost_on_a_copy() -> None:
    weight, other = pack(torch.ones(4, 8)), torch.ones(4, 8)
    for write in (
        lambda: torch._foreach_mul_([other, weight], 3),
        lambda: torch.add(other, other, out=weight),
        lambda: weight.mul_(2),
        lambda: torch._foreach_lerp_([weight], [other], 0.5),
        lambda: weight.__setitem__(0, 100.0),
        lambda: weight.__setitem__(slice(0, 2), 0.0),
        lambda: weight.__setitem__((slice(None), 0), other[:, 0]),
        lambda: weight.__setitem__(..., 0.0),
        lambda: weight.__setitem__(weight > 0, 0.0),
        lambda: weight.view(-1).mul_(0),
        lambda: weight.flatten()[3:].zero_(),
        lambda: weight.t().mul_(0),
        lambda: weight[0].fill_(5.0),
        lambda: weight[0].copy_(other[0]),
        lambda: weight.chunk(2)[0].zero_(),
        lambda: weight.unbind()[1].add_(1),
        lambda: weight.narrow(0, 0, 1).zero_(),
        lambda: weight.diagonal().zero_(),
        lambda: weight.data[0].detach().zero_(),
        lambda: torch.mul(other[0], 3, out=weight[0]),
        lambda: torch._foreach_zero_(list(weight.unbind())),
    ):
        with pytest.raises(ConfigError, match="cannot change this weight: it is packed"):
            write()
    with pytest.raises(ConfigError, match="to train it"):
        weight.requires_grad = True
    with pytest.raises(ValueError, match="read-only"):
        weight[0].numpy().fill(0.0)
    assert torch.equal(weight.unpack(), torch.ones(4, 8))
    other.add_(weight)  # read, not written
    assert torch.equal(other, torch.full((4, 8), 2.0))


@pytest.mark.parametrize("inference", [False, True])
def test_views_can_be_read(inference: bool) -> None:
    plain = torch.arange(32.0).view(4, 8)
    with torch.inference_mode(inference):
        weight = pack(plain)
        assert torch.equal(weight[1:, ::2], plain[1:, ::2])
        assert torch.equal(plain @ weight.t()[:, :2], plain @ plain.t()[:, :2])
        assert weight[1].tolist() == weight[1].numpy().tolist() == plain[1].tolist()
        for read in (weight[1].clone(), weight[1].double(), copy.deepcopy(weight[1])):
            assert type(read) is Tensor
            assert torch.equal(read.add_(1).float(), plain[1] + 1)
        assert torch.equal(pickle.loads(pickle.dumps(weight[1])), plain[1])
        assert torch.equal(torch.from_dlpack(weight[1]), plain[1])
        assert torch.equal(weight[1].share_memory_(), plain[1])
    assert torch.equal(weight.unpack(), plain)


def test_new_data_is_packed() -> None:
    plain, packed = pair("float32")
    with torch.no_grad():
        fc1(plain).zero_()
    fc1(packed).data = torch.zeros(fc1(packed).shape)
    assert isinstance(fc1(packed), PackedWeight)
    assert torch.equal(scores(packed), scores(plain))
    for other in (torch.zeros(3, 5), pack(torch.zeros(3, 5))):
        with pytest.raises(ShapeError, match=r"must have its shape .*, got \[3, 5\]"):
            fc1(packed).data = other


@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_assigned_weights_are_packed(dtype: str) -> None:
    model = beit3_fast.create_model(NAME, dtype=dtype, impl="cpu", inference_only=True)
    other = beit3_fast.create_model(NAME, dtype=dtype, impl="cpu", inference_only=True)
    other.load_state_dict(model.state_dict(), assign=True)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert type(ours) is type(theirs)
        assert not ours.requires_grad
    assert torch.equal(scores(other), scores(model))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"head.3.weight": torch.ones(2, 3)}, strict=False, assign=True)


@pytest.mark.parametrize("impl", ["cpu", "composite", "reference"])
def test_no_out_features(impl: str) -> None:
    with pytest.raises(ShapeError, match="at least one out-feature"):
        expert_linear(torch.randn(3, 8), [torch.randn(0, 8)], bounds=(0, 3), impl=impl)


@pytest.mark.parametrize("make", [pack, quantize])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 5),
        torch.zeros(5, 0),
        torch.zeros(5),
        torch.zeros(3, 3, dtype=torch.int32),
        [[1.0]],
        None,
    ],
)
def test_what_is_no_weight(make: Any, weight: Any) -> None:
    with pytest.raises(ShapeError, match=r"^a weight must be "):
        make(weight)
