"""The slim model and the accelerated torchscale model against torchscale itself, same weights and inputs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _compat import (
    DTYPES,
    SHAPES,
    impls,
    need_torchscale,
    reorder_cache,
    torchscale_beit3,
    torchscale_model,
)
from torch import Tensor
from torchscale_cases import BATCH, CASES, Case, both, compare, expected, inputs, slim

from beit3_fast.config import SIZES
from beit3_fast.integrations.torchscale import accelerate
from beit3_fast.model import BEiT3, encoder
from beit3_fast.parity import assert_parity, model_parity

need_torchscale()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_forward(case: Case, impl: str, dtype: str, shape: str) -> None:
    call = inputs(case, shape, DTYPES[dtype])
    theirs = expected(case, shape, dtype)
    for name, model in both(shape, dtype, case.img_size, impl):
        ours = model(**call)
        assert set(ours) == set(theirs)
        compare(name, ours["encoder_out"], case, shape, dtype, "encoder_out")
        compare(name, ours["encoder_embedding"], case, shape, dtype, "encoder_embedding")
        for key in ("multiway_split_position", "encoder_states", "l_aux"):
            assert ours[key] == theirs[key], (name, key)
        assert torch.equal(ours["encoder_padding_mask"], theirs["encoder_padding_mask"])


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_forward_a_few_samples_at_a_time(
    case: Case, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large batches take in evaluation."""
    monkeypatch.setattr(encoder, "_ROWS_AT_ONCE", rows)
    for name, model in both("base", "fp32", case.img_size, "auto"):
        out = model(**inputs(case, "base"))["encoder_out"]
        compare(name, out, case, "base", "fp32", "encoder_out")


@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_loads_strictly_both_ways(shape: str) -> None:
    theirs, ours = torchscale_model(shape), slim(shape, "fp32", 48)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    back = torchscale_beit3(SHAPES[shape])
    back.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32", "bf16", "fp16"))
@pytest.mark.parametrize(
    "case", [Case("image"), Case("text", "left"), Case("pair", "right")], ids=str
)
@torch.no_grad()
def test_all_hidden_states(case: Case, impl: str, dtype: str, shape: str) -> None:
    call = inputs(case, shape, DTYPES[dtype])

    def of_torchscale(name: str) -> list[Tensor]:
        return hidden_states(torchscale_model(shape, name), inputs(case, shape, DTYPES[name]))

    truth, baseline = of_torchscale("fp32"), of_torchscale(dtype)
    ours = {}
    for name, model in both(shape, dtype, 48, impl):
        if name == "slim":
            ours[name] = model(**call, return_all_hiddens=True)["encoder_states"]
        else:
            ours[name] = hidden_states(model, call)
    real = ~expected(case, shape, "fp32")["encoder_padding_mask"]
    for name, states in ours.items():
        assert len(states) == len(truth) == SHAPES[shape].num_layers + 1
        for mine, true, plain in zip(states, truth, baseline, strict=True):
            assert_parity(model_parity(mine[real], true[real], plain[real]), name)
            assert not mine[~real].any()


def hidden_states(model: Any, call: dict[str, Any]) -> list[Tensor]:
    """torchscale returns them from its encoder only: what BEiT3.forward does, and then the encoder."""
    parts, split = [], -1
    if "visual_tokens" in call:
        parts.append(model.vision_embed(call["visual_tokens"]))
    if "textual_tokens" in call:
        split = parts[0].shape[1] if parts else 0
        parts.append(model.text_embed(call["textual_tokens"]))
    padding = call.get("text_padding_position")
    if padding is not None and split:
        padding = torch.cat([torch.zeros(BATCH, split, dtype=torch.bool), padding], dim=1)
    out = model.encoder(
        None,
        encoder_padding_mask=padding,
        token_embeddings=torch.cat(parts, dim=1),
        multiway_split_position=split,
        return_all_hiddens=True,
    )
    return out["encoder_states"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32", "bf16", "fp16"))
@torch.no_grad()
def test_incremental_decoding(impl: str, dtype: str, shape: str) -> None:
    truth = decode(torchscale_model(shape), shape, "fp32")
    baseline = decode(torchscale_model(shape, dtype), shape, dtype)
    for name, model in both(shape, dtype, 48, impl):
        ours = decode(model, shape, dtype)
        assert len(ours) == len(truth) == 13
        for index, (mine, true, plain) in enumerate(zip(ours, truth, baseline, strict=True)):
            assert_parity(model_parity(mine, true, plain), f"{name}, output {index}")


def decode(model: Any, shape: str, dtype: str) -> list[Tensor]:
    """Every step's encoder_out and, at the end, one layer's caches; two beams follow each image."""
    generator = torch.Generator().manual_seed(3)
    batch, steps, num_vision, mask_token = 4, 5, 10, 7
    image = torch.randn(batch, 3, 48, 48, generator=generator).to(DTYPES[dtype])
    words = torch.randint(0, 120, (batch, steps), generator=generator)
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(SHAPES[shape].num_layers)}
    outputs = []
    for step in range(steps):
        text = torch.stack([words[:, step], torch.full((batch,), mask_token)], dim=1)
        length = step + 2
        blocked = torch.ones(num_vision + length, num_vision + length, dtype=torch.int64)
        blocked[:, :num_vision] = 0
        blocked[num_vision:, num_vision:] = 1 - torch.ones(length, length).tril().long()
        call: dict[str, Any] = {"visual_tokens": image}
        if step:
            blocked = blocked[-2:]
            call = {"positions": torch.arange(length, length + 2)[None]}
        out = model(textual_tokens=text, attn_mask=blocked, incremental_state=state, **call)
        outputs.append(out["encoder_out"])
        reorder_cache(state, torch.tensor([[1, 0, 3, 3], [0, 1, 2, 3], [2, 2, 1, 0]][step % 3]))
    for layer in (0, SHAPES[shape].num_layers - 1):
        outputs += [state[layer]["prev_key"], state[layer]["prev_value"]]
    first = {i: {} for i in range(SHAPES[shape].num_layers)}
    for part in ({"visual_tokens": image}, {"textual_tokens": words}):
        # Without a mask, and one modality after the other.
        outputs.append(model(incremental_state=first, **part)["encoder_out"])
    outputs += [first[0]["prev_key"], first[0]["prev_value"]]
    return outputs


@pytest.mark.parametrize("kind", ["slim", "accelerated"])
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32"))
def test_eight_threads_mix_modes_on_one_model(impl: str, dtype: str, kind: str) -> None:
    cases = [
        Case("image"),
        Case("text", "right"),
        Case("pair", "ragged"),
        Case("pair", "right", "seq2seq"),
        Case("text", "none", "causal"),
    ]
    model = dict(both("base", dtype, 48, impl))[kind]
    with torch.no_grad():
        alone = [model(**inputs(case, "base"))["encoder_out"] for case in cases]
    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait()
        with torch.no_grad():
            for step in range(15):
                index = (first + step) % len(cases)
                out = model(**inputs(cases[index], "base"))["encoder_out"]
                torch.testing.assert_close(out, alone[index], rtol=0, atol=1e-6)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, thread) for thread in range(8)]:
            future.result()


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("pair", "fp32"),
        *(
            pytest.param(mode, dtype, marks=pytest.mark.full)
            for mode, dtype in [
                ("pair", "bf16"),
                ("image", "fp32"),
                ("image", "bf16"),
                ("text", "fp32"),
                ("text", "bf16"),
            ]
        ),
    ],
)
@torch.no_grad()
def test_base_at_full_size(mode: str, dtype: str) -> None:
    """All 12 layers of 768 at 224 pixels, ragged text of up to 24 tokens."""
    config = SIZES["base"].replace(vocab_size=500)
    theirs = full_size(config)
    generator = torch.Generator().manual_seed(0)
    call: dict[str, Any] = {}
    if mode != "text":
        call["visual_tokens"] = torch.randn(2, 3, 224, 224, generator=generator)
    if mode != "image":
        call["textual_tokens"] = torch.randint(0, 500, (2, 24), generator=generator)
        call["text_padding_position"] = torch.arange(24)[None] >= torch.tensor([[24], [9]])
    truth = theirs(**call)
    real = ~truth["encoder_padding_mask"]
    if dtype == "bf16":
        theirs = theirs.bfloat16()
        call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()}
    baseline = theirs(**call)["encoder_out"]
    with torch.device("meta"):
        model = BEiT3(config)
    model.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    for name, ours in (("slim", model.eval()), ("accelerated", accelerate(theirs))):
        out = ours(**call)["encoder_out"]
        parity = model_parity(out[real], truth["encoder_out"][real], baseline[real])
        assert_parity(parity, name)
        assert not out[~real].any()


def full_size(config: Any) -> Any:
    """torchscale's BEiT3 without its slow initialisation: slices of one noise, scaled as ``fill`` does."""
    with torch.device("meta"):
        model = torchscale_beit3(config)
    model.to_empty(device="cpu")
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        part = noise.roll(7919 * index).repeat(-(-parameter.numel() // len(noise)))
        part = part[: parameter.numel()].view(parameter.shape)
        if parameter.ndim == 1:
            parameter.copy_(0.1 * part + float(name.endswith("weight")))
        elif "embed" in name and "proj" not in name:
            parameter.copy_(0.5 * part)
        else:
            gain = 1.4 if "q_proj" in name or "k_proj" in name else 0.6
            parameter.copy_(part * (gain / parameter[0].numel() ** 0.5))
    return model
