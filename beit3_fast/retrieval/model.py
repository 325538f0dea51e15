"""The one kind of model that puts images and texts in the same space."""

from __future__ import annotations

from typing import Any

from beit3_fast.errors import ConfigError
from beit3_fast.model import BEiT3ForRetrieval


def check_retrieval(model: Any) -> BEiT3ForRetrieval:
    """The model itself. Raises ConfigError unless it has the retrieval heads."""
    if not isinstance(model, BEiT3ForRetrieval):
        raise ConfigError(
            f"expected a retrieval model, whose images and texts can be compared, got {type(model).__name__}; make "
            "one with beit3_fast.create_model('beit3_base_patch16_384_retrieval', ...)"
        )
    return model
