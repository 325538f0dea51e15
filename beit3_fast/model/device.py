"""The device that a model is made for."""

from __future__ import annotations

import torch

from beit3_fast.errors import ConfigError


def device_of(device: str | torch.device) -> torch.device:
    """The device of this name. Raises ConfigError for a name that is none, and for a device that is not there."""
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device must be a torch.device or its name, such as 'cpu' or 'cuda:0', got {device!r}"
        ) from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r} is not there: this torch sees {torch.cuda.device_count()} CUDA devices"
        )
    try:
        torch.empty(0, device=wanted)
    # each backend has its own way of not being there
    except Exception as error:
        raise ConfigError(
            f"device {device!r} cannot be used with this torch ({str(error).splitlines()[0]}); use 'cpu' or 'cuda'"
        ) from error
    return wanted
