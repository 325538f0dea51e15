"""Mistakes in visual tokens and in contrastive tuning."""

from __future__ import annotations

from bugs.bug import CODEBOOK, CONTRASTIVE, TOKENIZE_IMAGES, TOKENIZER_TRAINING, Bug

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
        (f"{TOKENIZE_IMAGES}::test_a_killed_job_goes_on",),
    ),
    Bug(
        "tokenize-images-looks-at-names-alone",
        "beit3_fast/train/tokenize_images.py",
        "repr([*zip(self.names, states, strict=True)])",
        "repr(self.names)",
        (f"{TOKENIZE_IMAGES}::test_images_that_changed_under_their_names",),
    ),
    Bug(
        "tokenize-images-looks-at-sizes-alone",
        "beit3_fast/train/tokenize_images.py",
        "zip(self.names, states, strict=True)",
        "zip(self.names, self.sizes, strict=True)",
        (f"{TOKENIZE_IMAGES}::test_images_that_changed_under_their_names",),
    ),
    Bug(
        "tokens-of-a-codebook-that-was-never-filled",
        "beit3_fast/model/visual_tokenizer.py",
        "not bool(own.initted) or ",
        "",
        (f"{TOKENIZE_IMAGES}::test_a_tokenizer_that_knows_no_codes",),
    ),
    Bug(
        "tokens-of-an-encoder-with-nan",
        "beit3_fast/model/visual_tokenizer.py",
        "        if spoiled:\n",
        "        if False:\n",
        (f"{TOKENIZE_IMAGES}::test_a_tokenizer_that_knows_no_codes",),
    ),
    Bug(
        "codes-beyond-the-last",
        "beit3_fast/train/visual_tokens.py",
        "most >= self.num_codes",
        "most > self.num_codes + 23",
        (f"{TOKENIZE_IMAGES}::test_a_file_of_codes_with_rubbish_in_it",),
    ),
    Bug(
        "codes-of-an-image-of-another-size",
        "beit3_fast/train/visual_tokens.py",
        "if bytes_now != size:",
        "if False:",
        (f"{TOKENIZE_IMAGES}::test_pretraining_notices_an_image_that_changed",),
    ),
    Bug(
        "codes-of-images-scaled-in-another-way",
        "beit3_fast/train/visual_tokens.py",
        '        ("image preset", preset, processor.preset),\n',
        "",
        ("tests/train/test_tokenizer_recipe.py::test_codes_of_images_scaled_in_another_way",),
    ),
)
