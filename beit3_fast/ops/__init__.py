"""The ops that a BEiT-3 is made of, with one signature for every implementation.

Two of a layer, one in front of the layers (images become rows), one behind them (the loss of a head).
"""

from beit3_fast.ops.cached_attention import (
    NewKeys,
    PackedKeys,
    cached_attention,
    measured_cached_attention,
    pack_keys,
    reads_packed_keys,
)
from beit3_fast.ops.expert_linear import expert_linear, measured_expert_linear
from beit3_fast.ops.head_top_k import head_top_k
from beit3_fast.ops.masked_linear_cross_entropy import masked_linear_cross_entropy
from beit3_fast.ops.operands import Measured, Norm, measured, rounding
from beit3_fast.ops.patch_embedding import patch_embedding, patch_embedding_and_words
from beit3_fast.ops.rows import ExpertNorm, expert_layer_norm, unpack_rows
from beit3_fast.ops.shared_attention import (
    MASKS,
    measured_shared_attention,
    shared_attention,
)

__all__ = [
    "MASKS",
    "ExpertNorm",
    "Measured",
    "NewKeys",
    "Norm",
    "PackedKeys",
    "cached_attention",
    "expert_layer_norm",
    "expert_linear",
    "head_top_k",
    "masked_linear_cross_entropy",
    "measured",
    "measured_cached_attention",
    "measured_expert_linear",
    "measured_shared_attention",
    "pack_keys",
    "patch_embedding",
    "patch_embedding_and_words",
    "reads_packed_keys",
    "rounding",
    "shared_attention",
    "unpack_rows",
]
