"""Mistakes in attention over more keys than stay near."""

from __future__ import annotations

from bugs.bug import Bug

MANY_KEYS = "tests/ops/test_attention_many_keys.py"

NATIVE_MANY_KEYS_BUGS = (
    Bug(
        "later-keys-replace-the-earlier",
        "csrc/cpu/attention_loops.h",
        "columns, front > 0 || !is_first);",
        "columns, front > 0);",
        (MANY_KEYS,),
    ),
    Bug(
        "sums-of-weights-by-an-earlier-top",
        "csrc/cpu/attention_loops.h",
        "    sum *= v_top(share);  // all the same\n",
        "",
        (MANY_KEYS,),
    ),
    Bug(
        "values-by-an-earlier-top",
        "csrc/cpu/attention_loops.h",
        "v_store(out + j, v_mul(v_load(out + j), share));",
        "v_store(out + j, v_load(out + j));",
        (MANY_KEYS,),
    ),
    Bug(
        "values-of-hidden-keys-kept",
        "csrc/cpu/attention_loops.h",
        "if (sum == 0.0f) {  // nothing yet",
        "if (false) {  // nothing yet",
        (MANY_KEYS,),
    ),
    Bug(
        "mask-of-the-first-keys-for-later-ones",
        "csrc/cpu/attention_loops.h",
        "hide(scores, seen + range.begin, vision, block.scale)",
        "hide(scores, seen, vision, block.scale)",
        (MANY_KEYS,),
    ),
    Bug(
        "keys-of-the-first-range-again",
        "csrc/cpu/attention_loops.h",
        "key_row(block, range.begin + key) * block.v_stride",
        "key_row(block, key) * block.v_stride",
        (MANY_KEYS,),
    ),
    Bug(
        "all-keys-of-a-range-seen-by-early-queries",
        "csrc/cpu/attention_loops.h",
        "const int64_t own = visible_keys(block, query, at[r]) - range.begin;",
        "const int64_t own = visible_keys(block, query, at[r]) - (range.begin > 0 ? 1 : 0);",
        (MANY_KEYS,),
    ),
)
