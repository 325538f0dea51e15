"""Mistakes in the CUDA kernels of captioning steps, which the tests run on the CPU, and in the steps around them."""

from __future__ import annotations

from bugs.bug import CUDA_DECODING, CUDA_DECODING_BINDING, CUDA_HEAD, HEAD_TOP_K, STEP_GRAPH, Bug

_ATTENTION = (f"{CUDA_DECODING}::test_against_the_formula",)
_HEAD = (f"{CUDA_HEAD}::test_against_the_formula",)
_TIES = (f"{CUDA_HEAD}::test_equals_come_in_the_order_of_their_classes",)

CUDA_DECODING_BUGS = (
    Bug(
        "cuda-decoding-a-hidden-word-of-the-row-before",
        "csrc/cuda/decode_attention.cuh",
        "const int row = first + group + 8 * (i / 2 % 2);",
        "const int row = first + group;",
        _ATTENTION,
    ),
    Bug(
        "cuda-decoding-words-hidden-from-the-first-key-on",
        "csrc/cuda/decode_attention.cuh",
        "if (seen && key >= op.front && row < op.num_rows) {",
        "if (seen && key > op.front && row < op.num_rows) {",
        _ATTENTION,
    ),
    Bug(
        "cuda-decoding-keys-behind-the-last",
        "csrc/cuda/decode_attention.cuh",
        "bool seen = key < op.num_keys;",
        "bool seen = key <= op.num_keys;",
        _ATTENTION,
    ),
    Bug(
        "cuda-decoding-values-of-other-keys-than-their-weights",
        "csrc/cuda/decode_attention.cuh",
        "const int key = from + 2 * place + i % 2 + 8 * (i / 2);\n      const uint16_t* own = v",
        "const int key = from + 2 * place + 8 * (i % 2) + i / 2;\n      const uint16_t* own = v",
        _ATTENTION,
    ),
    Bug(
        "cuda-decoding-warps-joined-before-all-have-shown",
        "csrc/cuda/decode_attention.cuh",
        "    show(base);\n    sync_block();",
        "    show(base);",
        (CUDA_DECODING,),
    ),
    Bug(
        "cuda-decoding-shares-of-warps-on-different-scales",
        "csrc/cuda/decode_attention.cuh",
        "exp2_fast((load_shared(own + 4 * kHeadDim) - highest) * call.scale)",
        "exp2_fast(load_shared(own + 4 * kHeadDim) - highest)",
        _ATTENTION,
    ),
    Bug(
        "cuda-decoding-sequences-read-the-sample-of-their-number",
        "csrc/cuda/decode_attention.cuh",
        "op.samples == nullptr ? sequence : op.samples[sequence]",
        "sequence",
        _ATTENTION,
    ),
    Bug(
        "cuda-head-classes-behind-the-last-count",
        "csrc/cuda/head_top_k.cuh",
        "logits[i] = own < op.classes ?",
        "logits[i] = own <= op.classes ?",
        _HEAD,
    ),
    Bug(
        "cuda-head-highest-of-equals",
        "csrc/cuda/head_top_k.cuh",
        "for (int i = kOwn - 1; i >= 0; --i) {",
        "for (int i = 0; i < kOwn; ++i) {",
        _TIES,
    ),
    Bug(
        "cuda-head-what-is-not-allowed-does-not-count",
        "csrc/cuda/head_top_k.cuh",
        "ranks[i] = own < op.classes",
        "logits[i] = allowed ? logits[i] : -INFINITY;\n      ranks[i] = own < op.classes",
        (f"{CUDA_HEAD}::test_what_is_not_allowed_counts_and_is_not_chosen",),
    ),
    Bug(
        "cuda-head-a-tile-gives-one-class",
        "csrc/cuda/head_top_k.cuh",
        "if (taken >= op.count) continue;",
        "if (taken >= 1) continue;",
        _HEAD,
    ),
    Bug(
        "cuda-binding-seen-read-with-the-stride-of-q",
        "csrc/cuda_decoding_ops.cpp",
        "call.seen_stride = seen.stride(1);",
        "call.seen_stride = q.stride(1);",
        (f"{CUDA_DECODING_BINDING}::test_cached_attention",),
    ),
    Bug(
        "front-of-cached-keys-hidden",
        "beit3_fast/ops/cached_attention.py",
        "seen = F.pad(seen, (front, 0), value=True)",
        "seen = F.pad(seen, (front, 0), value=False)",
        (f"{CUDA_DECODING_BINDING}::test_cached_attention",),
    ),
    Bug(
        "head-top-k-sum-of-the-allowed-only",
        "beit3_fast/composite/head_top_k.py",
        "    return best - total, ids",
        "    return best - logits.logsumexp(dim=-1, keepdim=True), ids",
        (f"{HEAD_TOP_K}::test_against_the_formula",),
    ),
    Bug(
        "graph-of-steps-that-stands-still",
        "beit3_fast/model/decoding.py",
        "            steps.add_(1)\n",
        "",
        (STEP_GRAPH,),
    ),
    Bug(
        "graph-of-the-cache-before-images-left",
        "beit3_fast/model/decoding.py",
        "self.seen, self.graph = self.seen[inputs], None",
        "self.seen = self.seen[inputs]",
        (STEP_GRAPH,),
    ),
)
