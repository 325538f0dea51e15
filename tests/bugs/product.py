"""Mistakes in what stands around the models: integrations, parity, packed weights, commands, benchmark."""

from __future__ import annotations

from bugs.bug import BENCH_RUN, BENCH_TIMING, PARITY, Bug

PRODUCT_BUGS = (
    # integrations
    Bug(
        "torchscale-packing-forgets-the-order",
        "beit3_fast/integrations/_packing.py",
        "return places[kept] if order is None else places[order][kept[order]]",
        "return places[kept]",
        ("tests/integrations/test_torchscale_calls.py::test_padding_anywhere_in_any_dtype",),
    ),
    Bug(
        "torchscale-changed-modules-not-seen",
        "beit3_fast/integrations/_structure.py",
        "return self._read() == self._state",
        "return True",
        (
            "tests/integrations/test_torchscale_left_alone.py::test_a_changed_encoder_runs_its_own_code",
        ),
    ),
    # parity
    Bug(
        "parity-ten-times-the-allowance",
        "beit3_fast/parity.py",
        "_FORWARD_FACTOR = 2.0",
        "_FORWARD_FACTOR = 20.0",
        (PARITY,),
    ),
    Bug(
        "parity-rows-not-judged",
        "beit3_fast/parity.py",
        "    broken.extend(_turned_rows(f, r, p, p_truth, dtype, factor))\n",
        "",
        (PARITY,),
    ),
    # weights kept only in the layout of the kernels
    Bug(
        "packed-weight-state-dict-stays-packed",
        "beit3_fast/ops/packed_weight.py",
        "    linear.register_state_dict_post_hook(_unpack_entry)\n",
        "",
        ("tests/model/test_inference_only.py::test_state_dict_files_and_copies",),
    ),
    Bug(
        "packed-weight-copied-by-reference",
        "beit3_fast/ops/packed_weight.py",
        "_parameter(self.packed.clone(),",
        "_parameter(self.packed,",
        ("tests/model/test_inference_only.py::test_a_copy_is_independent",),
    ),
    Bug(
        "captioning-head-kept-twice",
        "beit3_fast/model/registry.py",
        "        products.append(model.mlm_head)\n",
        "        pass\n",
        ("tests/model/test_inference_only.py::test_nothing_keeps_a_second_copy",),
    ),
    Bug(
        "patch-projection-kept-twice",
        "beit3_fast/model/registry.py",
        "        products.append(backbone.vision_embed.proj)\n",
        "        pass\n",
        ("tests/model/test_inference_only.py::test_nothing_keeps_a_second_copy",),
    ),
    Bug(
        "packed-weight-new-data-ignored",
        "beit3_fast/ops/packed_weight.py",
        "            self.packed = self._packed_like(value)\n",
        "            pass\n",
        ("tests/model/test_inference_only.py::test_new_data_is_packed",),
    ),
    Bug(
        "packed-weight-assigned-stays-plain",
        "beit3_fast/ops/packed_weight.py",
        "    linear.register_load_state_dict_pre_hook(_pack_assigned)\n",
        "",
        ("tests/model/test_inference_only.py::test_assigned_weights_are_packed",),
    ),
    Bug(
        "packed-weight-changes-not-counted",
        "beit3_fast/ops/packed_weight.py",
        "            increment_version(first.packed)  # PyTorch does not count changes made within a dispatch\n",
        "",
        (
            "tests/model/test_inference_only.py::test_new_weights_are_seen_where_panels_are_not_whole",
        ),
    ),
    Bug(
        "int8-joined-parts-not-rounded",
        "beit3_fast/ops/expert_linear.py",
        "if sources[0].dtype is torch.int8:",
        "if False:",
        ("tests/model/test_int8.py::test_parts_whose_panels_are_not_whole",),
    ),
    Bug(
        "int8-rounded-from-bfloat16",
        "beit3_fast/model/registry.py",
        "wanted = torch.float32 if int8 or float8 else _dtype(dtype)",
        "wanted = torch.bfloat16 if int8 or float8 else _dtype(dtype)",
        (
            "tests/model/test_rounded_weights.py::test_a_checkpoint_is_rounded_from_its_own_precision",
        ),
    ),
    Bug(
        "incremental-words-of-a-pair-to-the-text-expert",
        "beit3_fast/model/incremental.py",
        "layout = replace(layout, text_only=0)",
        "pass",
        ("tests/model/test_properties.py::test_decoding_in_pieces_of_any_size",),
    ),
    # generate
    Bug(
        "beam-negative-penalty-stops-early",
        "beit3_fast/generate/beam.py",
        "if options.length_penalty < 0 and not options.compat:",
        "if False:",
        ("tests/generate/test_beam.py::test_a_search_that_ends_early_has_missed_nothing",),
    ),
    Bug(
        "sample-top-p-leaves-out-the-word-that-reaches-it",
        "beit3_fast/generate/sample.py",
        "p.cumsum(-1) - p >= options.top_p",
        "p.cumsum(-1) - 0.5 * p >= options.top_p",
        ("tests/generate/test_sample.py::test_the_word_that_reaches_top_p_is_the_last",),
    ),
    # scores that are not finite
    Bug(
        "answers-of-numbers-that-are-not-finite",
        "beit3_fast/model/tasks.py",
        '            check_finite(logits, "question", range(start, start + len(logits)))\n',
        "",
        ("tests/model/test_answers.py::test_an_image_that_is_not_finite_has_no_answer",),
    ),
    Bug(
        "overflow-seen-in-the-sigmoid-only",
        "beit3_fast/model/tasks.py",
        'check_finite(logits, "question"',
        'check_finite(logits.sigmoid(), "question"',
        ("tests/model/test_answers.py::test_a_score_of_one_may_be_an_overflow",),
    ),
    # embed, cli
    Bug(
        "cli-caption-batches-draw-the-same",
        "beit3_fast/cli/caption.py",
        "(seed + first) % 2**63",
        "seed",
        ("tests/test_cli_tasks.py::test_batches_are_drawn_apart",),
    ),
    Bug(
        "cli-images-that-are-missing-are-no-failure",
        "beit3_fast/cli/options.py",
        "return 1 if missing else 0",
        "return 0",
        ("tests/test_cli_tasks.py::test_one_bad_image_is_named_and_the_others_are_done",),
    ),
    Bug(
        "embed-ranks-take-the-same-shards",
        "beit3_fast/embed/ranks.py",
        'while (index := self.store.add("taken", 1) - 1) < len(todo):',
        'while (index := self.store.add(f"taken {self.rank}", 1) - 1) < len(todo):',
        ("tests/embed/test_engines.py::test_ranks_share_a_job_and_one_may_die",),
        can_hang=True,
    ),
    Bug(
        "embed-rank-0-hears-nothing-before-the-end",
        "beit3_fast/embed/ranks.py",
        "        self._done, self._skipped = done, skipped\n        self._listen()\n",
        "        self._done, self._skipped = done, skipped\n",
        ("tests/embed/test_engines.py::test_ranks_share_a_job_and_one_may_die",),
        can_hang=True,
    ),
    Bug(
        "embed-two-threads-in-one-folder",
        "beit3_fast/checkpoint/lock.py",
        "with _held_here(folder), _held_by_process(folder):",
        "with _held_by_process(folder):",
        ("tests/embed/test_resume.py::test_two_threads_do_not_meet",),
    ),
    Bug(
        "embed-job-of-any-weights",
        "beit3_fast/embed/job.py",
        '        "weights": _weights(model),\n',
        "",
        ("tests/embed/test_resume.py::test_weights_that_differ_a_little_are_another_job",),
    ),
    Bug(
        "embed-waits-for-memory-that-is-not-there",
        "beit3_fast/embed/decode.py",
        "return chunk if get_worker_info() is None else _shared(chunk)",
        "return chunk",
        ("tests/embed/test_resume.py::test_shared_memory_that_is_too_small",),
        can_hang=True,
    ),
    Bug(
        "embed-follows-a-link-without-end",
        "beit3_fast/embed/sources.py",
        "        if real in entered:\n",
        "        if False:\n",
        ("tests/embed/test_embed_dataset.py::test_links_and_what_is_no_file_in_a_folder",),
    ),
    Bug(
        "embed-a-row-for-each-path-of-a-file",
        "beit3_fast/embed/sources.py",
        "        return os.path.realpath(path)\n",
        "        return path\n",
        ("tests/embed/test_embed_dataset.py::test_one_row_a_file",),
    ),
    Bug(
        "index-of-other-layers-searched",
        "beit3_fast/retrieval/origin.py",
        "or not (rounded or _same(self.layers, own.layers))",
        "",
        ("tests/retrieval/test_origin.py::test_another_checkpoint_is_refused",),
    ),
    Bug(
        "index-of-class-tokens-searched",
        "beit3_fast/retrieval/origin.py",
        'COMPARABLE = ("pooled image", "pooled text")',
        'COMPARABLE = ("pooled image", "pooled text", "cls image")',
        ("tests/retrieval/test_origin.py::test_rows_of_another_space",),
    ),
    Bug(
        "search-build-replaces-any-file",
        "beit3_fast/cli/search.py",
        "if not os.path.lexists(path):",
        "if True:",
        ("tests/test_cli_tasks.py::test_build_replaces_an_index_only",),
    ),
    Bug(
        "verify-says-the-same-of-other-weights",
        "beit3_fast/integrations/verification.py",
        "return not self.changed and all(own.parity.passed for own in self.comparisons)",
        "return all(own.parity.passed for own in self.comparisons)",
        ("tests/test_cli_machine.py::test_what_is_not_the_same_is_seen",),
    ),
    Bug(
        "verify-judged-by-itself",
        "beit3_fast/integrations/verification.py",
        "_compare(key, found[key], reference[key], baseline[key])",
        "_compare(key, baseline[key], reference[key], baseline[key])",
        ("tests/test_cli_machine.py::test_what_is_not_the_same_is_seen",),
    ),
    Bug(
        "cli-bench-counts-calls-not-samples",
        "beit3_fast/cli/bench.py",
        '"samples_per_s": asdict(rates(seconds, batch)),',
        '"samples_per_s": asdict(rates(seconds, 1)),',
        ("tests/test_cli_machine.py::test_bench",),
    ),
    # bench
    Bug(
        "bench-ratio-inverted",
        "beit3_fast/timing.py",
        "[b / a for a, b in",
        "[a / b for a, b in",
        (f"{BENCH_TIMING}::test_speed_up_is_the_median_of_ratios_within_rounds",),
    ),
    Bug(
        "bench-parity-of-the-baseline-with-itself",
        "bench/measure.py",
        "found = baseline if name == REFERENCE else outputs(name, case.dtype)",
        "found = baseline",
        (f"{BENCH_RUN}::test_a_wrong_runtime_is_found_and_nothing_is_timed",),
    ),
)
