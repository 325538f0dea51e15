"""The two ops that a BEiT-3 layer is made of, with one signature for every implementation."""

from beit3_fast.ops.expert_linear import expert_linear
from beit3_fast.ops.operands import Norm
from beit3_fast.ops.shared_attention import MASKS, cached_attention, shared_attention

__all__ = ["MASKS", "Norm", "cached_attention", "expert_linear", "shared_attention"]
