"""One pair of a few tokens, computed by an encoder's own forward and on packed rows: do they agree?

Vendored copies of torchscale keep its names and change its code. Structure cannot tell; results can.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from beit3_fast.derived import forget
from beit3_fast.integrations._encoder_forward import Call, EncoderForward, LeaveAlone
from beit3_fast.integrations._structure import Structure

_NUM_VISION, _NUM_TEXT = 2, 3
# Of the output's scale: well above rounding, well below what a changed formula does.
_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def difference(forward: EncoderForward) -> str | None:
    """Why the two results differ, in words; None when they agree or nothing can be computed yet.

    Raises KernelUnavailable when the implementation asked for by name cannot run.
    """
    encoder = forward.encoder
    weight = encoder.layers[0].self_attn.q_proj.A.weight
    if weight.is_meta or weight.dtype not in _TOLERANCE:
        return None
    generator = torch.Generator().manual_seed(0)
    tokens = _NUM_VISION + _NUM_TEXT
    noise = torch.randn(2, tokens, weight.shape[1], generator=generator)
    embeddings = noise.to(weight.device, weight.dtype)
    padding = torch.zeros(2, tokens, dtype=torch.bool, device=weight.device)
    padding[1, -1] = True
    seq2seq = torch.ones(tokens, tokens, dtype=torch.int64, device=weight.device)
    seq2seq[:, :_NUM_VISION] = 0
    seq2seq[_NUM_VISION:, _NUM_VISION:] = 1 - seq2seq[_NUM_VISION:, _NUM_VISION:].tril()
    for mask in (None, seq2seq):
        worst = _compare(
            forward, Call(None, padding, mask, False, embeddings, _NUM_VISION, True, None, None)
        )
        if isinstance(worst, str):
            return worst
        if not worst <= _tolerance(weight):
            return f"a trial whose result differs from its own by {worst:.1e} of the scale"
    return None


def _tolerance(weight: Tensor) -> float:
    # TF32 and its like round the operands of fp32 products to 16 bits or so.
    exact = torch.get_float32_matmul_precision() == "highest"
    if weight.dtype is torch.float32 and not exact:
        return _TOLERANCE[torch.bfloat16]
    return _TOLERANCE[weight.dtype]


def _compare(forward: EncoderForward, call: Call) -> float | str:
    encoder = forward.encoder
    with torch.no_grad(), _in_evaluation(encoder, forward.structure()), _without_autocast():
        try:
            ours = forward.run(call, forward.plan(call))["encoder_out"]
        except LeaveAlone as refusal:
            return str(refusal)
        try:
            theirs = type(encoder).forward(encoder, **_given(call))["encoder_out"]
        except Exception as error:
            return f"a trial in which its own forward failed ({type(error).__name__}: {error})"
        finally:
            forget(encoder)
    if theirs.shape != ours.shape:
        return f"a trial whose result has shape {list(theirs.shape)}, not {list(ours.shape)}"
    assert call.encoder_padding_mask is not None
    real = ~call.encoder_padding_mask
    deviation = (ours[real].double() - theirs[real].double()).abs().max()
    scale = theirs[real].double().abs().max()
    return float(deviation / scale.clamp_min(1e-30))


def _given(call: Call) -> dict[str, Any]:
    """The arguments without the late ones, which older versions do not have."""
    return {
        name: value
        for name, value in call._asdict().items()
        if value is not None or name == "src_tokens"
    }


@contextmanager
def _in_evaluation(encoder: Any, structure: Structure) -> Iterator[None]:
    """Every module in evaluation mode; modes and split positions are put back."""
    modes = [(module, module.training) for module in encoder.modules()]
    splits = [
        (module, module.split_position) for module, _ in modes if hasattr(module, "split_position")
    ]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, split in splits:
            module.split_position = split


def _without_autocast() -> ExitStack:
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
