"""``accelerate``: torchscale's BEiT3, and whatever holds one, computed on packed rows without changing the model.

Only the ``forward`` of each encoder instance is replaced. Parameters, their names and order, ``state_dict()``
and every module stay as they are, so optimizers, layer decay, DDP and checkpoints do not notice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from beit3_fast.derived import forget
from beit3_fast.errors import ConfigError
from beit3_fast.integrations._encoder_forward import EncoderForward
from beit3_fast.integrations._self_check import difference
from beit3_fast.integrations._structure import is_encoder
from beit3_fast.integrations._tried import Tried
from beit3_fast.ops import dispatch

logger = logging.getLogger("beit3_fast")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class EncoderStatus:
    """One encoder of a model.

    name: its path in the model ("" for the model itself).
    impl: the implementation asked for, or None if the encoder is not accelerated.
    obstacle: why no call can take the fast path at present, or None.
    fallback_reasons: why calls were left to the encoder's own forward so far.
    """

    name: str
    impl: str | None
    obstacle: str | None
    fallback_reasons: tuple[str, ...]


def accelerate(model: M, impl: str = "auto") -> M:
    """Make a torchscale ``BEiT3``, or a model that holds one or several, run on packed rows; returns ``model``.

    In place: parameters are shared, nothing is copied or renamed, ``restore`` undoes it. Works for unilm's
    wrappers, for vendored copies of torchscale, for inference and training, under autocast, with drop path and
    activation checkpointing. Calling it again changes ``impl`` only.

    Results are torchscale's up to rounding, with one difference: ``encoder_out`` and ``encoder_states`` are
    zero at padded positions, where torchscale leaves values that depend on the padding.

    A call that the packed computation cannot do (dropout in train mode, hooks on inner modules, replaced
    modules, relative positions, mixtures of experts, ...) runs torchscale's own code; each reason is logged
    once as a warning of the logger "beit3_fast" and listed by ``accelerated_status``. Before an encoder is
    trusted, pairs are computed both ways, in evaluation and in train mode; if they differ, it is left alone. A class
    that comes into it later, or a method patched later, was not tried: its own code runs until ``accelerate`` is
    called again. ``torch.nn.DataParallel`` replicates modules without their forward and is not supported; use
    DistributedDataParallel.

    Weights written through ``.data`` or numpy, or by a collective, are stale in evaluation mode until
    ``beit3_fast.refresh(model)``. An ``encoder.forward`` taken out of its model does not keep the encoder.

    Raises ConfigError when there is nothing to accelerate or ``impl`` is unknown, and KernelUnavailable when an
    implementation asked for by name cannot run here.
    """
    if impl not in ("auto", *dispatch.IMPLEMENTATIONS):
        raise ConfigError(
            f"impl must be 'auto' or one of {list(dispatch.IMPLEMENTATIONS)}, got {impl!r}"
        )
    encoders = _encoders(model)
    if not encoders:
        raise ConfigError(
            f"found nothing to accelerate in this {type(model).__name__}: looked in it and all of its "
            "modules for torchscale's Encoder, a module of that class name with `layers` and "
            "`forward_embedding`. Models of beit3_fast itself are fast already"
        )
    for name, encoder in encoders:
        forward = encoder.__dict__.get("forward")
        if forward is not None and not isinstance(forward, EncoderForward):
            raise ConfigError(
                f"the encoder {name or '(the model itself)'} has a forward of its own, put there by other "
                f"code ({forward!r}); accelerate the model first, or remove that forward"
            )
    for name, encoder in encoders:
        forward = encoder.__dict__.get("forward") or EncoderForward(encoder, impl)
        forward.impl = impl
        _check(forward, name)
        encoder.forward = forward
    return model


def restore(model: M) -> M:
    """Undo ``accelerate``, exactly; returns ``model``. Does nothing for a model that was not accelerated.

    Raises ConfigError when other code has wrapped the accelerated forward since.
    """
    accelerated = []
    for name, encoder in _encoders(model):
        forward = encoder.__dict__.get("forward")
        if isinstance(forward, EncoderForward):
            accelerated.append(encoder)
        elif forward is not None:
            raise ConfigError(
                f"the encoder {name or '(the model itself)'} has a forward that other code put there "
                f"({forward!r}); remove it first"
            )
    for encoder in accelerated:
        del encoder.forward
        forget(encoder)
    return model


def accelerated_status(model: nn.Module) -> list[EncoderStatus]:
    """What ``accelerate`` made of each torchscale encoder in ``model``."""
    statuses = []
    for name, encoder in _encoders(model):
        forward = encoder.__dict__.get("forward")
        if isinstance(forward, EncoderForward):
            reasons = tuple(forward.fallback_reasons)
            statuses.append(EncoderStatus(name, forward.impl, forward.obstacle(), reasons))
        else:
            statuses.append(EncoderStatus(name, None, "not accelerated", ()))
    return statuses


def _encoders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    return [(name, module) for name, module in model.named_modules() if is_encoder(module)]


def _check(forward: EncoderForward, name: str) -> None:
    """Distrust an encoder whose own forward gives something else, as changed copies of torchscale do."""
    forward.distrusted, forward.tried = None, Tried()
    obstacles = forward.structure().obstacles
    if not obstacles:
        forward.tried = Tried(forward.structure().classes)
        forward.distrusted = difference(forward)
        obstacles = [forward.distrusted] if forward.distrusted else []
    for obstacle in obstacles:
        logger.warning("accelerate: encoder %r keeps torchscale's code: %s", name, obstacle)
    if not obstacles:
        logger.info("accelerate: encoder %r runs on packed rows, impl=%s", name, forward.impl)
