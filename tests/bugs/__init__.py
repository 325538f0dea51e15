"""The mistakes that ``planted_bugs.py`` plants, and the tests that should see each."""

from __future__ import annotations

from bugs.bug import Bug
from bugs.cuda import CUDA_BUGS
from bugs.cuda_attention import CUDA_ATTENTION_BUGS
from bugs.cuda_decoding import CUDA_DECODING_BUGS
from bugs.cuda_float8 import CUDA_FLOAT8_BUGS
from bugs.cuda_linear import CUDA_LINEAR_BUGS
from bugs.distributed import DISTRIBUTED_BUGS
from bugs.files import FILES_BUGS
from bugs.finetuning import FINETUNING_BUGS
from bugs.kernel_gates import KERNEL_GATES_BUGS
from bugs.kernels import KERNELS_BUGS
from bugs.layers import LAYERS_BUGS
from bugs.measuring import MEASURING_BUGS
from bugs.model import MODEL_BUGS
from bugs.native import NATIVE_BUGS
from bugs.native_levels import NATIVE_LEVELS_BUGS
from bugs.native_many_keys import NATIVE_MANY_KEYS_BUGS
from bugs.native_memory import NATIVE_MEMORY_BUGS
from bugs.native_statistics import NATIVE_STATISTICS_BUGS
from bugs.ops import OPS_BUGS
from bugs.pretraining import PRETRAINING_BUGS
from bugs.product import PRODUCT_BUGS
from bugs.rows import ROWS_BUGS
from bugs.runs import RUNS_BUGS
from bugs.sample_blocks import SAMPLE_BLOCKS_BUGS
from bugs.visual_tokens import VISUAL_TOKENS_BUGS

__all__ = ["BUGS", "Bug"]

BUGS = (
    *OPS_BUGS,
    *MODEL_BUGS,
    *FILES_BUGS,
    *PRODUCT_BUGS,
    *KERNELS_BUGS,
    *MEASURING_BUGS,
    *KERNEL_GATES_BUGS,
    *PRETRAINING_BUGS,
    *RUNS_BUGS,
    *FINETUNING_BUGS,
    *VISUAL_TOKENS_BUGS,
    *DISTRIBUTED_BUGS,
    *LAYERS_BUGS,
    *NATIVE_BUGS,
    *NATIVE_LEVELS_BUGS,
    *NATIVE_MANY_KEYS_BUGS,
    *NATIVE_MEMORY_BUGS,
    *NATIVE_STATISTICS_BUGS,
    *SAMPLE_BLOCKS_BUGS,
    *ROWS_BUGS,
    *CUDA_BUGS,
    *CUDA_LINEAR_BUGS,
    *CUDA_ATTENTION_BUGS,
    *CUDA_DECODING_BUGS,
    *CUDA_FLOAT8_BUGS,
)
