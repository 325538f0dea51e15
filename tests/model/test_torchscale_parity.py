"""The slim model and the accelerated torchscale model against torchscale itself, same weights and inputs."""

from __future__ import annotations

import copy
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from _compat import (
    DTYPES,
    SHAPES,
    impls,
    need_torchscale,
    reorder_cache,
    slim_of,
    torchscale_beit3,
    torchscale_model,
)
from torch import Tensor

from beit3_fast.config import SIZES
from beit3_fast.errors import KernelUnavailable
from beit3_fast.integrations.torchscale import accelerate, accelerated_status, restore
from beit3_fast.model import BEiT3, encoder
from beit3_fast.parity import assert_parity, model_parity

need_torchscale()

BATCH, TEXT = 3, 7
PADDINGS = ("none", "right", "left", "ragged", "all-but-one")


class Case(NamedTuple):
    """One batch: its mode, where its text is padded, its mask, and what is special about it."""

    mode: str
    padding: str = "none"
    mask: str = "none"
    special: str = ""

    @property
    def img_size(self) -> int:
        return 16 if "patch" in self.special else 48

    def __str__(self) -> str:
        return "-".join(part for part in self if part != "none" and part)


CASES = [
    *(Case("image", mask=mask) for mask in ("none", "causal", "arbitrary")),
    Case("image", special="masked_position"),
    Case("image", special="one_patch"),
    *(Case("text", p, mask) for p in PADDINGS for mask in ("none", "causal", "arbitrary")),
    Case("text", special="positions"),
    Case("text", special="one_token"),
    *(
        Case("pair", p, mask)
        for p in PADDINGS
        for mask in ("none", "seq2seq", "causal", "arbitrary")
    ),
    Case("pair", "right", special="masked_position"),
    Case("pair", special="one_token"),
    Case("pair", special="one_patch"),
    Case("pair", mask="seq2seq", special="one_patch_one_token"),
]
GRADIENT_CASES = [
    Case("image"),
    Case("image", special="masked_position"),
    Case("text", "right"),
    Case("text", "ragged", "causal"),
    Case("pair"),
    Case("pair", "ragged"),
    Case("pair", "right", "seq2seq"),
    Case("pair", "all-but-one", "arbitrary"),
]


def inputs(case: Case, shape: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keyword arguments of torchscale's ``BEiT3.forward``."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{shape} {case}".encode()))
    call: dict[str, Any] = {}
    num_vision = num_text = 0
    if case.mode != "text":
        size = case.img_size
        image = torch.randn(BATCH, 3, size, size, generator=generator)
        call["visual_tokens"] = image.to(dtype)
        num_vision = (size // 16) ** 2 + 1
    if case.mode != "image":
        num_text = 1 if "one_token" in case.special else TEXT
        call["textual_tokens"] = torch.randint(0, 120, (BATCH, num_text), generator=generator)
        padding = text_padding(case.padding, num_text, generator)
        if padding is not None:
            call["text_padding_position"] = padding
    if case.special == "masked_position":
        masked = torch.rand(BATCH, num_vision - 1, generator=generator) > 0.5
        call["vision_masked_position"] = masked
    if case.special == "positions":
        call["positions"] = torch.arange(5, 5 + num_text)[None]
    tokens = num_vision + num_text
    if case.mask != "none":
        call["attn_mask"] = blocked_mask(case.mask, num_vision, tokens, generator)
    return call


def text_padding(kind: str, num_text: int, generator: torch.Generator) -> Tensor | None:
    """bool [B, Nt], True for padding; every sample keeps a token, the first sample keeps all but for "left"."""
    if kind == "none":
        return None
    places, lengths = torch.arange(num_text)[None], torch.tensor([num_text, 2, 5])[:, None]
    if kind == "right":
        return places >= lengths
    if kind == "left":
        return places < num_text - lengths.flip(0)
    if kind == "all-but-one":
        padding = torch.zeros(BATCH, num_text, dtype=torch.bool)
        padding[1, 1:] = True
        return padding
    padding = torch.rand(BATCH, num_text, generator=generator) > 0.5
    padding[:, 3] = False
    padding[0] = False
    return padding


def blocked_mask(kind: str, num_vision: int, tokens: int, generator: torch.Generator) -> Tensor:
    """int64 [N, N], 1 where blocked; with "arbitrary" every token still sees itself."""
    if kind == "causal":
        return 1 - torch.ones(tokens, tokens, dtype=torch.int64).tril()
    if kind == "arbitrary":
        blocked = (torch.rand(tokens, tokens, generator=generator) > 0.5).long()
        return blocked.fill_diagonal_(0)
    blocked = torch.ones(tokens, tokens, dtype=torch.int64)
    blocked[:, :num_vision] = 0
    num_text = tokens - num_vision
    blocked[num_vision:, num_vision:] = 1 - torch.ones(num_text, num_text).tril().long()
    return blocked


@cache
def expected(case: Case, shape: str, dtype: str) -> dict[str, Any]:
    model, call = torchscale_model(shape, dtype, case.img_size), inputs(case, shape, DTYPES[dtype])
    with torch.no_grad():
        out = model(**call)
        if out["encoder_out"].isnan().any():
            # In fp16 a padded query that sees only padding is NaN, and the next layer spreads it.
            assert dtype == "fp16"
            assert case.mode == "text"
            out["encoder_out"] = without_padding(model, **call)
    return out


def without_padding(
    model: Any, textual_tokens: Tensor, text_padding_position: Tensor, attn_mask: Tensor
) -> Tensor:
    """torchscale's encoder_out, each text on its own with only its real tokens; zeros at padding."""
    samples = []
    for tokens, padding in zip(textual_tokens, text_padding_position, strict=True):
        real = (~padding).nonzero().flatten()
        out = model(
            textual_tokens=tokens[real][None],
            attn_mask=attn_mask[real][:, real],
            positions=real[None] + 2,
        )["encoder_out"]
        samples.append(out.new_zeros(len(tokens), out.shape[2]).index_copy(0, real, out[0]))
    return torch.stack(samples)


@cache
def slim(shape: str, dtype: str, img_size: int) -> Any:
    config = SHAPES[shape].replace(img_size=img_size)
    return slim_of(torchscale_model(shape, dtype, img_size), config)


@cache
def accelerated(shape: str, dtype: str, img_size: int, impl: str) -> Any:
    model = copy.deepcopy(torchscale_model(shape, dtype, img_size))
    return accelerate(model, impl)


def both(shape: str, dtype: str, img_size: int, impl: str) -> Iterator[tuple[str, Any]]:
    model = slim(shape, dtype, img_size)
    model.impl = impl
    yield "slim", model
    model = accelerated(shape, dtype, img_size, impl)
    yield "accelerated", model
    (status,) = accelerated_status(model)
    assert status.obstacle is None
    assert not status.fallback_reasons


def compare(name: str, ours: Tensor, case: Case, shape: str, dtype: str, key: str) -> None:
    """The rule of ``beit3_fast.parity`` on the tokens that are not padding."""
    truth, baseline = expected(case, shape, "fp32"), expected(case, shape, dtype)
    real = ~truth["encoder_padding_mask"].bool()
    parity = model_parity(ours[real], truth[key][real], baseline[key][real])
    assert_parity(parity, f"{name} {key}")
    if key == "encoder_out":
        assert not ours[~real].any(), f"{name}: padded positions must be zero"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_forward(case: Case, impl: str, dtype: str, shape: str) -> None:
    call = inputs(case, shape, DTYPES[dtype])
    theirs = expected(case, shape, dtype)
    for name, model in both(shape, dtype, case.img_size, impl):
        if impl == "cpu" and case.mask == "arbitrary":
            with pytest.raises(KernelUnavailable, match="mask tensor"):
                model(**call)
            continue
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


def gradients(
    model: Any, call: dict[str, Any], seed: int, autocast: bool = False
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """encoder_out with zeros at padding, and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**call)
    real = (~out["encoder_padding_mask"]).unsqueeze(-1)
    rows = out["encoder_out"].float() * real
    weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (rows * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return rows.detach(), {n: None if g is None else g.clone() for n, g in grads.items()}


def compare_gradients(
    name: str, ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]
) -> None:
    assert list(ours) == list(theirs)
    for parameter, grad in theirs.items():
        mine = ours[parameter]
        assert (mine is None) == (grad is None), f"{name}: {parameter}"
        if grad is None or mine is None:
            continue
        sibling = theirs[parameter.replace("k_proj", "q_proj")]
        assert sibling is not None
        scale = float(sibling.abs().max())
        if "k_proj" in parameter and parameter.endswith("bias") and grad.abs().max() < 1e-4 * scale:
            # A bias of all keys shifts every score of a query alike: the true gradient is zero.
            assert float(mine.abs().max()) < 1e-4 * scale, f"{name}: {parameter}"
            continue
        assert_parity(model_parity(mine, grad, gradient=True), f"{name}: gradient of {parameter}")


@cache
def training(shape: str, rate: float) -> tuple[Any, Any]:
    """torchscale's model and the slim one in train mode."""
    config = SHAPES[shape].replace(drop_path_rate=rate)
    theirs = torchscale_beit3(config).train()
    return theirs, slim_of(theirs, config)


@cache
def expected_training(case: Case, shape: str, rate: float, autocast: bool) -> Any:
    return gradients(training(shape, rate)[0], inputs(case, shape), seed=5, autocast=autocast)


def both_training(shape: str, rate: float, impl: str) -> Iterator[tuple[str, Any]]:
    theirs, model = training(shape, rate)
    model.impl = impl
    yield "slim", model
    try:
        yield "accelerated", accelerate(theirs, impl)
        assert not accelerated_status(theirs)[0].fallback_reasons
    finally:
        restore(theirs)


@pytest.mark.parametrize("rate", [0.0, 0.4], ids=["", "drop_path"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32"))
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_training(case: Case, impl: str, dtype: str, shape: str, rate: float) -> None:
    if impl == "cpu" and case.mask == "arbitrary":
        pytest.skip("cpu: takes mask structures, not a mask tensor")
    call = inputs(case, shape)
    truth, grads = expected_training(case, shape, rate, False)
    for name, model in both_training(shape, rate, impl):
        rows, mine = gradients(model, call, seed=5)
        assert_parity(model_parity(rows, truth), name)
        compare_gradients(name, mine, grads)


@pytest.mark.parametrize("rate", [0.0, 0.4], ids=["", "drop_path"])
@pytest.mark.parametrize("shape", ["base", "d88"])
@pytest.mark.parametrize("impl", ["reference", "composite", "auto"])
@pytest.mark.parametrize("case", [Case("image"), Case("pair", "right", "seq2seq")], ids=str)
def test_autocast(case: Case, impl: str, shape: str, rate: float) -> None:
    call = inputs(case, shape)
    truth, true_grads = expected_training(case, shape, rate, False)
    baseline, plain_grads = expected_training(case, shape, rate, True)
    for name, model in both_training(shape, rate, impl):
        rows, grads = gradients(model, call, seed=5, autocast=True)
        assert_parity(model_parity(rows.bfloat16(), truth, baseline.bfloat16()), name)
        for parameter, true in true_grads.items():
            if true is None or ("k_proj" in parameter and parameter.endswith("bias")):
                continue
            mine, plain = (g[parameter].bfloat16() for g in (grads, plain_grads))
            assert_parity(model_parity(mine, true, plain, gradient=True), f"{name}: {parameter}")


@pytest.mark.parametrize("shape", SHAPES)
def test_drop_path_draws_as_torchscale_does_and_not_in_evaluation(shape: str) -> None:
    case = Case("pair", "right")
    call = inputs(case, shape)
    for name, model in both_training(shape, 0.4, "auto"):
        outputs = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            outputs.append(model(**call)["encoder_out"])
        assert torch.equal(outputs[0], outputs[1]), name
        assert not torch.equal(outputs[0], outputs[2]), name
        model.eval()
        try:
            with torch.no_grad():
                compare(name, model(**call)["encoder_out"], case, shape, "fp32", "encoder_out")
        finally:
            model.train()


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
