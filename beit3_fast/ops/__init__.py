"""The ops that a BEiT-3 is made of, with one signature for every implementation: two of a layer, one of a head."""

from beit3_fast.ops.expert_linear import Norm, expert_linear
from beit3_fast.ops.masked_linear_cross_entropy import masked_linear_cross_entropy
from beit3_fast.ops.shared_attention import MASKS, cached_attention, shared_attention

__all__ = [
    "MASKS",
    "Norm",
    "cached_attention",
    "expert_linear",
    "masked_linear_cross_entropy",
    "shared_attention",
]
