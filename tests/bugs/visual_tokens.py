"""Mistakes in visual tokens and in contrastive tuning."""

from __future__ import annotations

from bugs.bug import CODEBOOK, CONTRASTIVE, TOKENIZER_TRAINING, Bug

VISUAL_TOKENS_BUGS = (
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
    Bug(
        "codebook-learns-in-evaluation",
        "beit3_fast/model/codebook.py",
        "        if self.training:\n            self._follow",
        "        if True:\n            self._follow",
        (f"{CODEBOOK}::test_only_training_teaches",),
    ),
    Bug(
        "codebook-leaves-dead-codes-dead",
        "beit3_fast/model/codebook.py",
        "z[place].where(dead[:, None], self.embedding.weight)",
        "self.embedding.weight",
        (
            f"{CODEBOOK}::test_a_dead_code_begins_again_at_a_row",
            f"{TOKENIZER_TRAINING}::test_it_learns_what_the_teacher_sees",
        ),
    ),
    Bug(
        "codebook-of-each-process-alone",
        "beit3_fast/model/codebook.py",
        "dist.all_reduce(sums)",
        "pass",
        (f"{CODEBOOK}::test_two_processes_keep_one_codebook",),
    ),
    Bug(
        "codebook-learns-from-nan",
        "beit3_fast/model/codebook.py",
        "torch.cat([z.where(good, 0.0), good.to(z.dtype)], dim=1)",
        "torch.cat([z, torch.ones_like(z[:, :1])], dim=1)",
        (f"{CODEBOOK}::test_rows_that_are_not_finite_teach_nothing",),
    ),
    Bug(
        "codebook-looks-up-in-half-precision",
        "beit3_fast/model/codebook.py",
        "with torch.autocast(z.device.type, enabled=False):",
        "with torch.autocast(z.device.type, enabled=torch.is_autocast_enabled('cpu')):",
        (f"{CODEBOOK}::test_autocast_changes_no_code",),
    ),
    Bug(
        "tokenizer-gives-the-bias-to-the-keys",
        "beit3_fast/model/vision_transformer.py",
        "(attn.q_bias, attn.k_bias, attn.v_bias)",
        "(attn.q_bias, attn.v_bias, attn.k_bias)",
        ("tests/model/test_visual_tokenizer_timm.py::test_the_encoder",),
    ),
    Bug(
        "distillation-forgets-the-commitment",
        "beit3_fast/train/distillation.py",
        "reconstruction + self.commitment * commitment",
        "reconstruction + commitment",
        (f"{TOKENIZER_TRAINING}::test_micro_batches_add_up",),
    ),
    Bug(
        "tokenize-images-goes-on-in-mid-row",
        "beit3_fast/train/tokenize_images.py",
        "os.truncate(codes, done * row)",
        "pass",
        ("tests/train/test_tokenize_images.py::test_a_killed_job_goes_on",),
    ),
)
