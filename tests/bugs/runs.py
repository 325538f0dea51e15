"""Mistakes in how a run goes on its way: what it loads, counts, exchanges, computes again and says."""

from __future__ import annotations

from bugs.bug import FINETUNE, LOOP, THROUGHPUT, Bug

_STACKS = "tests/train/test_stacks.py"
_STOPPING = "tests/train/test_stopping.py"
_EXCHANGE = "tests/train/test_exchange.py"
_RUN_LOOP = "beit3_fast/train/loop.py"
_PARALLEL = "beit3_fast/train/parallel.py"
_SKIP = "            self.skipped += 1\n            self.in_a_row += 1\n"
_UPDATE = (
    "            if self.average is not None:\n                self.average.update(self.model)\n"
)
_LOAD = "                    micro = self._load(batches, stop)\n"
_CLOCK = "                    start = time.perf_counter()\n"

RUNS_BUGS = (
    Bug(
        "loop-computes-nothing-again",
        _RUN_LOOP,
        "            set_recompute(model, options.checkpoint_activations)\n",
        "            pass\n",
        (f"{_STACKS}::test_what_a_run_computes_again",),
    ),
    Bug(
        "tokenizer-computes-nothing-again",
        "beit3_fast/model/vision_transformer.py",
        "self.recompute if self.training else ()",
        "()",
        (f"{_STACKS}::test_what_a_run_computes_again",),
    ),
    Bug(
        "fsdp2-shards-the-root-only",
        _PARALLEL,
        '(*layers_of(model).items(), ("", model))',
        '(("", model),)',
        (f"{_STACKS}::test_every_layer_is_a_unit_of_fsdp2",),
    ),
    Bug(
        "tokenizer-has-no-layers-for-fsdp2",
        "beit3_fast/model/stack.py",
        "for layer in stack.in_order()}",
        'for layer in getattr(stack, "layers", ())}',
        (f"{_STACKS}::test_every_layer_is_a_unit_of_fsdp2",),
    ),
    Bug(
        "tokenizer-in-bfloat16-parts-mixes-dtypes",
        "beit3_fast/model/vision_transformer.py",
        "attn.k_bias.to(attn.q_bias.dtype)",
        "attn.k_bias",
        (f"{_STACKS}::test_a_tokenizer_in_parts",),
    ),
    Bug(
        "tokenizer-counts-a-gradient-of-its-choice",
        "beit3_fast/model/visual_tokenizer.py",
        "training_work(pixels, encoder + codes + decoder + heads) + choice",
        "training_work(pixels, encoder + codes + decoder + heads + choice)",
        (f"{_STACKS}::test_the_work_of_a_tokenizer_s_step",),
    ),
    Bug(
        "average-follows-skipped-steps",
        _RUN_LOOP,
        _SKIP,
        _SKIP + _UPDATE,
        (f"{LOOP}::test_a_step_that_is_not_finite_changes_nothing",),
    ),
    Bug(
        "mfu-of-one-device-of-several",
        "beit3_fast/train/throughput.py",
        "own * devices",
        "own",
        (f"{THROUGHPUT}::test_several_devices_can_do_as_much_more",),
    ),
    Bug(
        "rate-leaves-out-waiting-for-data",
        _RUN_LOOP,
        _CLOCK + _LOAD,
        _LOAD + _CLOCK,
        (f"{_STOPPING}::test_waiting_for_data_is_time_of_the_run",),
    ),
    Bug(
        "bar-begins-anew-in-a-continuation",
        _RUN_LOOP,
        "Progress(options.steps, self.step, shown)",
        "Progress(options.steps, 0, shown)",
        (f"{_STOPPING}::test_the_bar_goes_on_where_the_run_does",),
    ),
    Bug(
        "loop-trains-in-evaluation-mode",
        _RUN_LOOP,
        "        self.model.train()\n",
        "",
        (f"{_STOPPING}::test_a_model_in_evaluation_mode_is_trained_in_training_mode",),
    ),
    Bug(
        "signal-waits-for-the-next-step-to-be-loaded",
        _RUN_LOOP,
        "            if stop.asked:\n                break\n",
        "",
        (f"{_STOPPING}::test_a_signal_comes_before_what_is_to_be_loaded",),
    ),
    Bug(
        "ranks-load-before-they-agree-to-stop",
        _RUN_LOOP,
        "                    if stops:\n                        break\n",
        "",
        (f"{_STOPPING}::test_a_signal_to_one_of_two_processes",),
    ),
    Bug(
        "contrastive-tuning-on-any-number-of-processes",
        "beit3_fast/train/contrastive.py",
        "across_processes = True",
        "across_processes = False",
        (f"{_STOPPING}::test_contrastive_tuning_keeps_its_number_of_processes",),
    ),
    Bug(
        "ddp-exchanges-in-every-micro-batch",
        _PARALLEL,
        "nullcontext() if last else self.called.no_sync()",
        "nullcontext()",
        (f"{_EXCHANGE}::test_gradients_are_exchanged_once_a_step",),
    ),
    Bug(
        "fsdp2-exchanges-in-every-micro-batch",
        _PARALLEL,
        "set_requires_gradient_sync(last)",
        "set_requires_gradient_sync(True)",
        (f"{_EXCHANGE}::test_gradients_are_exchanged_once_a_step",),
    ),
    Bug(
        "fsdp2-adds-gradients-in-bfloat16",
        _PARALLEL,
        "MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)",
        "MixedPrecisionPolicy(torch.bfloat16)",
        (f"{_EXCHANGE}::test_gradients_are_exchanged_once_a_step",),
    ),
    Bug(
        "answers-are-judged-in-training-mode",
        "beit3_fast/train/question_answering.py",
        "    model.eval()\n",
        "",
        (f"{FINETUNE}::test_accuracy_is_the_score_of_the_likeliest_answer",),
    ),
    Bug(
        "retrieval-is-judged-in-training-mode",
        "beit3_fast/train/downstream.py",
        "    model.eval()\n",
        "",
        (f"{FINETUNE}::test_recall_knows_the_captions_of_an_image",),
    ),
    Bug(
        "held-out-samples-are-augmented",
        "beit3_fast/train/recipe.py",
        "self.train.seed + 1, None)",
        "self.train.seed + 1, self.augment)",
        ("tests/train/test_recipe.py::test_only_what_is_trained_on_is_augmented",),
    ),
    Bug(
        "finetune-says-from-scratch-with-a-checkpoint",
        "beit3_fast/cli/finetune.py",
        'begun = f"from {loaded.source}',
        'begun = f"from scratch {loaded.source}',
        (f"{FINETUNE}::test_the_command",),
    ),
)
