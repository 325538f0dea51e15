"""The two ops that a BEiT-3 layer is made of, and the embedding of images in front of them.

Each has one signature for every implementation.
"""

from beit3_fast.ops.expert_linear import Norm, expert_linear
from beit3_fast.ops.patch_embedding import patch_embedding
from beit3_fast.ops.shared_attention import MASKS, cached_attention, shared_attention

__all__ = [
    "MASKS",
    "Norm",
    "cached_attention",
    "expert_linear",
    "patch_embedding",
    "shared_attention",
]
