"""Mistakes in fine-tuning, and in what a run says about itself."""

from __future__ import annotations

from bugs.bug import (
    FINETUNE,
    INITIAL,
    OPTIMIZER,
    PAIRED,
    REPORT,
    THROUGHPUT,
    VIEWS,
    WORLD,
    Bug,
)

FINETUNING_BUGS = (
    Bug(
        "answers-cost-their-mean",
        "beit3_fast/train/question_answering.py",
        'reduction="sum")',
        'reduction="mean")',
        (f"{FINETUNE}::test_questions_cost_what_the_official_engine_counts",),
    ),
    Bug(
        "accuracy-counts-any-score-as-right",
        "beit3_fast/train/question_answering.py",
        "float(own.scores.gather(1, logits.argmax(1, keepdim=True)).sum())",
        "float(own.scores.gather(1, logits.argmax(1, keepdim=True)).ceil().sum())",
        (f"{FINETUNE}::test_accuracy_is_the_score_of_the_likeliest_answer",),
    ),
    Bug(
        "held-out-images-are-augmented",
        "beit3_fast/data/views.py",
        "if luck is not None and self.changes:",
        "if self.changes:",
        (f"{PAIRED}::test_views_change_with_the_epoch_but_held_out_images_do_not",),
    ),
    Bug(
        "fine-tuning-forgets-the-checkpoint",
        "beit3_fast/train/finetune.py",
        "if checkpoint is None:",
        "if checkpoint is None or True:",
        (f"{FINETUNE}::test_the_checkpoint_s_weights_are_the_first",),
    ),
    Bug(
        "heads-learn-no-faster",
        "beit3_fast/train/optimizer.py",
        "options.head_lr_scale if in_head else 1.0",
        "1.0",
        (f"{OPTIMIZER}::test_heads_may_learn_faster",),
    ),
    Bug(
        "work-of-a-step-is-that-of-a-forward",
        "beit3_fast/model/work.py",
        "pixels + pixels + forward + backward + backward",
        "pixels + forward",
        (f"{THROUGHPUT}::test_counted_work_of_a_step_is_three_forwards_but_the_pixels",),
    ),
    Bug(
        "curves-end-in-one-step",
        "beit3_fast/train/report.py",
        "starts = range(0, len(own) - width + 1, width)",
        "starts = range(0, len(own), width)",
        (f"{REPORT}::test_every_point_of_a_curve_is_the_mean_of_as_many_steps",),
    ),
    Bug(
        "examples-paint-the-wrong-patch",
        "beit3_fast/train/examples.py",
        "top, left = place // columns * high, place % columns * wide",
        "top, left = place % columns * high, place // columns * wide",
        (f"{REPORT}::test_hidden_patches_and_words_are_filled_in",),
    ),
    Bug(
        "digits-are-trained-on-and-held-out",
        "beit3_fast/data/world/digits.py",
        '"train": 2 * HELD_OUT}',
        '"train": HELD_OUT}',
        (f"{WORLD}::test_real_digits_with_captions",),
    ),
    Bug(
        "images-are-kept-without-end",
        "beit3_fast/data/views.py",
        "if len(self._kept) < self.keep:",
        "if self.keep:",
        (f"{VIEWS}::test_what_is_kept_is_not_read_again",),
    ),
    Bug(
        "positions-of-texts-drawn-like-those-of-images",
        "beit3_fast/train/initial.py",
        '"B": self.text_positions}',
        '"B": self.image_positions}',
        (f"{INITIAL}::test_each_option_is_the_spread_of_its_weights_and_of_no_others",),
    ),
    Bug(
        "patches-drawn-like-linear-layers",
        "beit3_fast/train/initial.py",
        "std = self.patches",
        "std = self.linear",
        (f"{INITIAL}::test_each_option_is_the_spread_of_its_weights_and_of_no_others",),
    ),
    Bug(
        "fine-tuning-from-scratch-begins-officially",
        "beit3_fast/train/finetune.py",
        "        self.initial.draw(model)\n",
        "",
        (f"{INITIAL}::test_a_checkpoint_takes_the_place_of_what_was_drawn",),
    ),
    Bug(
        "facts-count-colours-as-shapes",
        "beit3_fast/data/world/language.py",
        "count = sum(word == (t.shape if by_shape else t.colour) for t in scene.things)",
        "count = sum(word == t.shape for t in scene.things)",
        (f"{WORLD}::test_answers_are_true",),
    ),
)
