"""Mistakes where several processes train one model."""

from __future__ import annotations

from bugs.bug import RANKS, Bug

_ONE = f"{RANKS}::test_two_ranks_are_one"
_STOP = f"{RANKS}::test_sigterm_to_any_rank_and_a_gradient_that_is_not_finite_on_one"
_PROCESSES = "beit3_fast/train/processes.py"
_PARALLEL = "beit3_fast/train/parallel.py"

DISTRIBUTED_BUGS = (
    Bug(
        "ranks-take-the-mean-of-shares",
        _PARALLEL,
        "(share * self.processes.size).backward()",
        "share.backward()",
        (_ONE,),
    ),
    Bug(
        "ranks-take-the-same-samples",
        _PARALLEL,
        "first = step * accumulation + processes.rank * own",
        "first = step * accumulation",
        (_ONE, f"{RANKS}::test_micro_batches_of_a_step_are_the_same_on_any_number_of_ranks"),
    ),
    Bug(
        "fsdp2-decays-what-nobody-used",
        _PARALLEL,
        "parameter.grad = None",
        "pass",
        (_ONE,),
    ),
    Bug(
        "fsdp2-clips-by-the-norm-of-its-part",
        _PARALLEL,
        "get_total_norm([p.grad for",
        "get_total_norm([local(p.grad) for",
        (_ONE,),
    ),
    Bug(
        "fsdp2-keeps-what-was-packed-of-old-weights",
        _PARALLEL,
        "        forget(module)",
        "        pass",
        (f"{RANKS}::test_weights_that_are_gathered_anew_are_packed_anew",),
    ),
    Bug(
        "a-full-disk-of-another-rank-is-an-error-of-torch",
        "beit3_fast/train/checkpoints.py",
        "storage_writer=_Writer(",
        "storage_writer=dcp.FileSystemWriter(",
        (f"{RANKS}::test_a_disk_that_is_full_for_one_rank",),
    ),
    Bug(
        "drop-path-depends-on-the-rank",
        "beit3_fast/train/loop.py",
        "_seed(options.seed, number)",
        "_seed(options.seed, number + self.processes.rank)",
        (_ONE,),
    ),
    Bug(
        "a-model-is-another-one-once-it-is-sharded",
        "beit3_fast/train/loop.py",
        '"model": self.kind,',
        '"model": repr((type(self.model).__name__, getattr(self.model, "config", None))),',
        (f"{RANKS}::test_a_lost_rank_ends_the_run_and_nothing_is_lost",),
    ),
    Bug(
        "ranks-know-only-their-own-sums",
        _PROCESSES,
        "dist.all_gather_object(told, own)",
        "told = [own]",
        (_ONE, _STOP),
        can_hang=True,
    ),
    Bug(
        "a-lost-rank-is-not-named",
        _PROCESSES,
        "if processes.size == 1 or not is_lost(error):",
        "if True:",
        (f"{RANKS}::test_a_lost_rank_ends_the_run_and_nothing_is_lost",),
    ),
    Bug(
        "every-other-layer-is-the-first",
        "beit3_fast/model/stack.py",
        '"none" if number % what else "layer"',
        '"none" if (number - 1) % what else "layer"',
        ("tests/model/test_training.py::test_layers_that_are_recomputed",),
    ),
    Bug(
        "fsdp2-single-numbers-of-each-process",
        "beit3_fast/train/parallel.py",
        "                dist.all_reduce(mean)\n",
        "",
        (f"{RANKS}::test_contrastive_tuning_with_parts_is_that_with_whole_weights",),
    ),
)
