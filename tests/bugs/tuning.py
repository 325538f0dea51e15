"""Mistakes in what follows pretraining, and in its visual tokens."""

from __future__ import annotations

from bugs.bug import CONTRASTIVE, Bug

TUNING_BUGS = (
    Bug(
        "contrast-labels-of-the-first-rank",
        "beit3_fast/model/contrastive_loss.py",
        "dist.get_rank() * len(vision)",
        "0",
        (f"{CONTRASTIVE}::test_two_processes_are_one_with_all_pairs",),
    ),
    Bug(
        "contrast-without-gradients-of-other-ranks",
        "beit3_fast/model/contrastive_loss.py",
        "gathered.chunk(2, dim=1)",
        "gathered.detach().chunk(2, dim=1)",
        (f"{CONTRASTIVE}::test_two_processes_are_one_with_all_pairs",),
    ),
    Bug(
        "contrast-forgets-the-size-of-its-share",
        "beit3_fast/train/contrastive.py",
        "batch.num_samples / totals",
        "1 / totals",
        (f"{CONTRASTIVE}::test_shares_of_two_processes_add_up",),
    ),
)
