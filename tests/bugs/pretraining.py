"""Mistakes in pretraining."""

from __future__ import annotations

from bugs.bug import LOOP, MASKING, MIXED, OBJECTIVE, OPTIMIZER, PRETRAINING, RESUME, WORLD, Bug

PRETRAINING_BUGS = (
    Bug(
        "masking-shows-the-words-to-predict",
        "beit3_fast/data/masking.py",
        "instead = np.where(luck < random_words, drawn, mask_id)",
        "instead = np.where(luck < 0.2, own, mask_id)",
        (f"{MASKING}::test_the_share_of_words",),
    ),
    Bug(
        "masking-hides-more-than-the-share",
        "beit3_fast/data/masking.py",
        "new = np.flatnonzero(~block)[:left]",
        "new = np.flatnonzero(~block)",
        (f"{MASKING}::test_the_share_of_patches_is_exact",),
    ),
    Bug(
        "mixed-data-masks-alike-in-every-epoch",
        "beit3_fast/data/mixed.py",
        "place = KINDS.index(kind), epoch, index",
        "place = KINDS.index(kind), 0, index",
        (f"{MIXED}::test_a_sample_is_masked_anew_in_each_epoch",),
    ),
    Bug(
        "augment-mirrors-every-image",
        "beit3_fast/data/augment.py",
        "if generator.random() < self.flip:",
        "if generator.random() >= self.flip:",
        ("tests/data/test_augment.py::test_mirror_images_at_their_chance",),
    ),
    Bug(
        "randaugment-always-goes-one-way",
        "beit3_fast/data/rand_augment.py",
        "angle = sign * _MOST_DEGREES * magnitude",
        "angle = _MOST_DEGREES * magnitude",
        (
            "tests/data/test_augment.py::test_randaugment_moves_pixels_as_far_as_the_official_recipe",
        ),
    ),
    Bug(
        "masked-batch-mixes-up-images-and-texts-of-pairs",
        "beit3_fast/data/masked_batch.py",
        "seen, read = images + pairs, pairs + texts",
        "seen, read = images + pairs, pairs[::-1] + texts",
        (f"{PRETRAINING}::test_one_packed_pass_is_each_sample_alone",),
    ),
    Bug(
        "world-swaps-above-and-below",
        "beit3_fast/data/world/language.py",
        'return "above" if a.row < b.row else "below"',
        'return "below" if a.row < b.row else "above"',
        (f"{WORLD}::test_answers_are_true",),
    ),
    Bug(
        "world-asks-about-unlabelled-scenes",
        "beit3_fast/data/world/files.py",
        "questions[: labelled * QUESTIONS]",
        "questions[:: count // labelled]",
        (f"{WORLD}::test_labels_for_the_first_scenes_only",),
    ),
    Bug(
        "world-says-the-place-of-another-thing",
        "beit3_fast/data/world/language.py",
        'return f"{thing.place}: {_named(thing)}"',
        'return f"{scene.things[0].place}: {_named(thing)}"',
        (f"{WORLD}::test_regions_are_true",),
    ),
    Bug(
        "pretraining-predicts-the-patch-before",
        "beit3_fast/model/pretraining.py",
        "[hidden.new_zeros(len(hidden), 1), hidden]",
        "[hidden, hidden.new_zeros(len(hidden), 1)]",
        (f"{PRETRAINING}::test_one_packed_pass_is_each_sample_alone",),
    ),
    Bug(
        "pretraining-shows-hidden-patches",
        "beit3_fast/model/pretraining.py",
        "vision_masked_position=hidden,",
        "vision_masked_position=None,",
        (f"{PRETRAINING}::test_what_is_hidden_cannot_be_seen",),
    ),
    Bug(
        "objective-forgets-the-other-micro-batches",
        "beit3_fast/train/objective.py",
        "losses[term].sum() / totals[term]",
        "losses[term].mean()",
        (f"{OBJECTIVE}::test_micro_batches_add_up_to_the_whole_batch",),
    ),
    Bug(
        "optimizer-decays-what-is-exempt",
        "beit3_fast/train/optimizer.py",
        " and name not in exempt",
        "",
        (f"{OPTIMIZER}::test_rates_and_decay_of_every_parameter",),
    ),
    Bug(
        "loop-steps-on-a-gradient-that-is-not-finite",
        "beit3_fast/train/loop.py",
        "if math.isfinite(self.loss) and math.isfinite(norm):",
        "if math.isfinite(self.loss):",
        (f"{LOOP}::test_a_step_that_is_not_finite_changes_nothing",),
    ),
    Bug(
        "resume-forgets-random-numbers",
        "beit3_fast/train/loop.py",
        "SeedSequence((seed, number))",
        "SeedSequence()",
        (f"{RESUME}::test_killed_and_continued",),
    ),
    Bug(
        "resume-forgets-the-average",
        "beit3_fast/train/loop.py",
        'state["average"] = self.average.state()',
        "pass",
        (f"{RESUME}::test_killed_and_continued",),
    ),
    Bug(
        "resume-repeats-a-line-of-the-log",
        "beit3_fast/train/log.py",
        '["step"] <= step]',
        '["step"] <= step + 1]',
        (f"{RESUME}::test_killed_and_continued",),
    ),
    Bug(
        "checkpoint-written-under-its-own-name",
        "beit3_fast/train/checkpoints.py",
        'return self.folder / f".{_PREFIX}{step:08}{_PARTIAL}"',
        'return self.folder / f"{_PREFIX}{step:08}"',
        (f"{RESUME}::test_killed_and_continued",),
    ),
)
