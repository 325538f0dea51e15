"""Pairs computed by an encoder's own forward and on packed rows: do they agree?

Vendored copies of torchscale keep its names and change its code. Structure cannot tell; results can. A few tokens
go through all layers. Many tokens, which show a window of attention or the like, go through the first and the last
layer of each kind, in evaluation and in train mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_fast.derived import forget
from beit3_fast.integrations._encoder_forward import Call, EncoderForward, LeaveAlone


class _Size(NamedTuple):
    batch: int
    vision: int
    text: int


_FEW, _MANY = _Size(2, 2, 3), _Size(2, 64, 32)
# Rows of torchscale's position tables that no token uses.
_UNUSED_POSITIONS = 2
# With this rate and these random numbers (on a CPU) each branch is dropped for one of two samples.
_DROP_PATH_RATE, _SEED = 0.3, 4
# Of the output's scale: well above rounding, well below what a changed formula does.
_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def difference(forward: EncoderForward) -> str | None:
    """Why the two results differ, or why that cannot be known, in words; None when they agree.

    Raises KernelUnavailable when the implementation asked for by name cannot run.
    """
    encoder = forward.encoder
    weight = encoder.layers[0].self_attn.q_proj.A.weight
    if weight.is_meta or weight.dtype not in _TOLERANCE:
        where = "on the meta device" if weight.is_meta else f"of {weight.dtype}"
        return f"weights {where}, with which nothing can be tried; accelerate the model again later"
    try:
        with torch.no_grad(), _as_it_was(encoder, weight.device), _without_autocast():
            return _differences(forward, weight)
    finally:
        forget(encoder)


def _differences(forward: EncoderForward, weight: Tensor) -> str | None:
    encoder = forward.encoder
    few, many = _pair(_FEW, weight), _pair(_fitting(encoder), weight)
    _set(encoder, training=False, drop_path_rate=0.0)
    reason = _difference(forward, few, _seq2seq(few))
    with _few_layers(encoder):
        reason = reason or _difference(forward, many, None)
        reason = reason or _difference(forward, many, _seq2seq(many))
        # The random numbers of other devices are not begun again.
        known = weight.device.type in ("cpu", "cuda")
        _set(encoder, training=True, drop_path_rate=_DROP_PATH_RATE if known else 0.0)
        return reason or _difference(forward, many, None)


def _pair(size: _Size, weight: Tensor) -> Call:
    """A pair with padding in the last sample, of noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = size.vision + size.text
    noise = torch.randn(size.batch, tokens, weight.shape[1], generator=generator)
    padding = torch.zeros(size.batch, tokens, dtype=torch.bool, device=weight.device)
    padding[-1, -(size.text // 3) :] = True
    embeddings = noise.to(weight.device, weight.dtype)
    return Call(None, padding, None, False, embeddings, size.vision, True, None, None)


def _fitting(encoder: Any) -> _Size:
    """As many tokens as there are positions for, at most ``_MANY``."""
    tables = encoder.embed_positions
    if tables is None:
        return _MANY
    rows = [getattr(table, "num_embeddings", 0) for table in (tables.A, tables.B)]
    vision, text = (own - _UNUSED_POSITIONS for own in rows)
    return _Size(
        _MANY.batch,
        max(_FEW.vision, min(_MANY.vision, vision)),
        max(_FEW.text, min(_MANY.text, text)),
    )


def _seq2seq(call: Call) -> Tensor:
    assert call.token_embeddings is not None
    vision, tokens = call.multiway_split_position, call.token_embeddings.shape[1]
    blocked = torch.ones(tokens, tokens, dtype=torch.int64, device=call.token_embeddings.device)
    blocked[:, :vision] = 0
    blocked[vision:, vision:].triu_(1)
    return blocked


def _tolerance(dtype: torch.dtype) -> float:
    # TF32 and its like round the operands of fp32 products to 16 bits or so.
    exact = torch.get_float32_matmul_precision() == "highest"
    if dtype is torch.float32 and not exact:
        return _TOLERANCE[torch.bfloat16]
    return _TOLERANCE[dtype]


def _difference(forward: EncoderForward, call: Call, mask: Tensor | None) -> str | None:
    """How the results of one call differ, or why the fast path cannot do it in evaluation mode."""
    encoder, call = forward.encoder, call._replace(attn_mask=mask)
    assert call.token_embeddings is not None
    assert call.encoder_padding_mask is not None
    real = ~call.encoder_padding_mask
    try:
        plan = forward.plan(call)
    except LeaveAlone as refusal:
        return None if encoder.training else str(refusal)
    _seed(real.device)
    ours = forward.run(call, plan)["encoder_out"]
    _seed(real.device)
    try:
        theirs = type(encoder).forward(encoder, **_given(call))["encoder_out"]
    except Exception as error:
        return f"a trial in which its own forward failed ({type(error).__name__}: {error})"
    if theirs.shape != ours.shape:
        return f"a trial whose result has shape {list(theirs.shape)}, not {list(ours.shape)}"
    deviation = (ours[real].double() - theirs[real].double()).abs().max()
    worst = float(deviation / theirs[real].double().abs().max().clamp_min(1e-30))
    if worst <= _tolerance(call.token_embeddings.dtype):
        return None
    mode = " in train mode" if encoder.training else ""
    return f"a trial whose result{mode} differs from its own by {worst:.1e} of the scale"


def _given(call: Call) -> dict[str, Any]:
    """The arguments without the late ones, which older versions do not have."""
    return {
        name: value
        for name, value in call._asdict().items()
        if value is not None or name == "src_tokens"
    }


@contextmanager
def _as_it_was(encoder: nn.Module, device: torch.device) -> Iterator[None]:
    """What a trial changes is put back afterwards: modes, rates, split positions and the state of random numbers."""
    names = ("training", "split_position", "p", "drop_prob")
    before = [
        (module, name, vars(module)[name])
        for module in encoder.modules()
        for name in names
        if name in vars(module)
    ]
    draws = [(generator, generator.get_state()) for generator in _generators(device)]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        for generator, state in draws:
            generator.set_state(state)


def _generators(device: torch.device) -> list[torch.Generator]:
    if device.type == "cuda":
        return [torch.default_generator, torch.cuda.default_generators[device.index]]
    return [torch.default_generator]


def _seed(device: torch.device) -> None:
    for generator in _generators(device):
        generator.manual_seed(_SEED)


def _set(encoder: nn.Module, training: bool, drop_path_rate: float) -> None:
    """A mode and rates for all modules; no dropout, with which torchscale's own code runs."""
    rates = {"Dropout": ("p", 0.0), "DropPath": ("drop_prob", drop_path_rate)}
    for module in encoder.modules():
        module.training = training
        name, rate = rates.get(type(module).__name__, ("", 0.0))
        if name in vars(module):
            setattr(module, name, rate)


@contextmanager
def _few_layers(encoder: Any) -> Iterator[None]:
    """An encoder of the first and the last layer of each combination of classes."""
    table = encoder.layers._modules
    kinds: dict[tuple[type, ...], list[str]] = {}
    for name, layer in table.items():
        kinds.setdefault(tuple(type(module) for module in layer.modules()), []).append(name)
    kept = {name for names in kinds.values() for name in (names[0], names[-1])}
    layers, count = dict(table), vars(encoder).get("num_layers")
    for name in layers.keys() - kept:
        del table[name]
    if count is not None:
        encoder.num_layers = len(table)
    try:
        yield
    finally:
        table.clear()
        table.update(layers)
        if count is not None:
            encoder.num_layers = count


def _without_autocast() -> ExitStack:
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
