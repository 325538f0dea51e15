"""What made the rows of an index, and whether a model's embeddings can be compared with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.derived import derived
from beit3_fast.errors import InputError
from beit3_fast.retrieval.model import check_retrieval

COMPARABLE = ("pooled image", "pooled text")
_VALUES = 16
# bfloat16 and float16 each round a weight by at most half of these.
_RELATIVE, _ABSOLUTE = 2.0**-8, 2.0**-24


class Origin(NamedTuple):
    """Which rows of which model.

    rows: output and kind of input, as "pooled image".
    outside: fp32 [N], some values of every weight outside the encoder's layers.
    layers: fp32 [M], some values of every weight of the layers; [0] where the layers are rounded to 8 bits.

    Not a digest: the same checkpoint in bfloat16, float16, int8 or float8 is the same model, and rounding moves every
    digest. Not a probe embedding: models that were fine-tuned from one checkpoint may lie nearer to each other than
    float8 to float32.
    """

    rows: str
    outside: Tensor
    layers: Tensor

    def check_comparable(self, model: Any) -> None:
        """Raises ConfigError for no retrieval model, InputError unless its texts and images can be compared with the rows.

        A weight is the same where it differs by no more than rounding to 16 bits does. Layers in 8 bits are taken to
        be those of the weights outside them.
        """
        own = origin_of(check_retrieval(model), self.rows)
        if self.rows not in COMPARABLE:
            raise InputError(
                f"the index holds {self.rows} embeddings, with which neither texts nor images can be compared; make one of "
                "pooled image or text embeddings (beit3-fast search --build, or embed --output pooled)"
            )
        rounded = not (len(self.layers) and len(own.layers))
        if not _same(self.outside, own.outside) or not (rounded or _same(self.layers, own.layers)):
            raise InputError(
                "the index was made by another model or checkpoint than the one it is searched with; search it with that "
                "one, or make it again"
            )


def origin_of(model: Any, rows: str) -> Origin:
    """The origin of such rows of a model in its present state."""
    parameters = tuple(model.parameters())
    return Origin(rows, *derived("values of an origin", parameters, lambda: _values(model)))


def _values(model: Any) -> tuple[Tensor, Tensor]:
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    rounded = False
    for name, parameter in model.named_parameters():
        rounded |= getattr(parameter, "is_rounded", False)
        flat = parameter.detach().flatten()
        step = -(-flat.numel() // _VALUES)
        parts[".layers." in f".{name}"].append(flat[::step].float())
    outside, layers = torch.cat(parts[False]).cpu(), torch.cat(parts[True]).cpu()
    return outside, layers[:0] if rounded else layers


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE)
