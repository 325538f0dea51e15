"""The mistakes that ``planted_bugs.py`` plants, and the tests that should see each."""

from __future__ import annotations

from dataclasses import dataclass

LINEAR = "tests/ops/test_expert_linear.py"
TRITON_GRADIENTS = "tests/ops/test_triton_linear_gradients.py"
TRITON_CROSS_ENTROPY = "tests/ops/test_triton_cross_entropy.py"
TRITON_ATTENTION = "tests/ops/test_triton_shared_attention.py"
CROSS_ENTROPY = "tests/ops/test_masked_linear_cross_entropy.py"
ATTENTION = "tests/ops/test_shared_attention.py"
PADDED = "tests/ops/test_padded_attention.py"
KERNELS = "tests/ops/test_cpu_kernels.py"
INT8 = "tests/ops/test_cpu_int8.py"
EMULATED = "tests/ops/test_emulated_levels.py"
PROCESSES = "tests/ops/test_cpu_processes.py"
ARGUMENTS = "tests/ops/test_cpu_arguments.py"
CONTRACT = "tests/test_api_contract.py"
DERIVED = "tests/test_derived.py"
LAYOUT = "tests/test_layout.py"
PARITY = "tests/test_parity.py"
FORMULA = "tests/model/test_formula.py"
FORWARD = "tests/model/test_forward.py"
PARTS = "tests/model/test_encode_in_parts.py"
TASKS = "tests/model/test_tasks.py"
TASK_PARITY = "tests/model/test_task_parity.py"
CAPTIONING = "tests/model/test_captioning.py"
TORCHSCALE_PARITY = "tests/model/test_torchscale_parity.py"
LOAD = "tests/checkpoint/test_load_checkpoint.py"
SAVE = "tests/checkpoint/test_save_checkpoint.py"
POSITIONS = "tests/checkpoint/test_positions.py"
MALFORMED = "tests/checkpoint/test_malformed_files.py"
FUZZ = "tests/checkpoint/test_checkpoint_fuzz.py"
BENCH_RUN = "tests/bench/test_bench_run.py"
BENCH_TIMING = "tests/bench/test_bench_timing.py"


@dataclass(frozen=True)
class Bug:
    """One mistake.

    name: what is wrong, in words joined by hyphens.
    file: the file that has it.
    old: text that stands there exactly once; new: what takes its place.
    tests: pytest arguments, the tests of the gate that are expected to fail.
    isa: for a mistake in the code of some instruction-set levels only, their names; it is left out where the
        processor runs none of them.
    can_hang: whether tests that come to no end count as a catch.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    isa: tuple[str, ...] = ()
    can_hang: bool = False

    @property
    def is_native(self) -> bool:
        """Whether the copy must be compiled for it."""
        return self.file.startswith("csrc/")

    def planted(self, text: str) -> str:
        """The file's text with the mistake. Raises ValueError unless ``old`` stands there exactly once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.file} has its text {count} times, not once")
        return text.replace(self.old, self.new)


BUGS = (
    # reference
    Bug(
        "reference-eps-outside-the-root",
        "beit3_fast/reference/expert_linear.py",
        "torch.sqrt(variance + eps)",
        "(torch.sqrt(variance) + eps)",
        (f"{LINEAR}::test_the_formula_itself",),
    ),
    Bug(
        "reference-tanh-gelu",
        "beit3_fast/reference/expert_linear.py",
        "part * 0.5 * (1.0 + torch.erf(part * 0.5**0.5))",
        'torch.nn.functional.gelu(part, approximate="tanh")',
        (f"{LINEAR}::test_the_formula_itself",),
    ),
    Bug(
        "reference-unscaled-query",
        "beit3_fast/reference/shared_attention.py",
        'torch.einsum("qhd,khd->hqk", q, k) * scale',
        'torch.einsum("qhd,khd->hqk", q, k)',
        (f"{ATTENTION}::test_the_formula_itself",),
    ),
    Bug(
        "reference-seq2seq-text-does-not-see-itself",
        "beit3_fast/reference/shared_attention.py",
        'text_keys <= text)\n    elif mask == "causal":',
        'text_keys < text)\n    elif mask == "causal":',
        (f"{ATTENTION}::test_the_formula_itself",),
    ),
    Bug(
        "reference-mask-of-another-sample",
        "beit3_fast/reference/shared_attention.py",
        "mask[keys.order[sample]]",
        "mask[sample]",
        (f"{ATTENTION}::test_the_formula_itself", f"{ATTENTION}::test_forward"),
    ),
    Bug(
        "reference-smoothing-takes-nothing-from-the-target",
        "beit3_fast/reference/masked_linear_cross_entropy.py",
        "(1.0 - label_smoothing) * losses",
        "losses",
        (f"{CROSS_ENTROPY}::test_the_formula_itself",),
    ),
    # composite
    Bug(
        "composite-exponentials-of-earlier-slices-keep-their-top",
        "beit3_fast/composite/masked_linear_cross_entropy.py",
        "        total *= (top - new_top).exp_()\n",
        "",
        (f"{CROSS_ENTROPY}::test_losses_and_gradients",),
    ),
    Bug(
        "composite-all-logits-at-once",
        "beit3_fast/composite/masked_linear_cross_entropy.py",
        "max(_THINNEST, _LOGITS // max(1, count))",
        "vocabulary",
        (f"{CROSS_ENTROPY}::test_the_logits_are_never_whole",),
    ),
    Bug(
        "composite-tanh-gelu",
        "beit3_fast/composite/expert_linear.py",
        'return F.gelu(y) if activation == "gelu" else y',
        'return F.gelu(y, approximate="tanh") if activation == "gelu" else y',
        (f"{LINEAR}::test_forward",),
    ),
    Bug(
        "composite-backward-weight-transposed",
        "beit3_fast/composite/expert_linear.py",
        "dweights.append(dy.T @ normed)",
        "dweights.append((normed.T @ dy).reshape(weight.shape))",
        (f"{LINEAR}::test_gradients",),
    ),
    Bug(
        "composite-causal-mask-dropped-for-images",
        "beit3_fast/composite/shared_attention.py",
        'scale=scale, is_causal=mask == "causal")',
        "scale=scale)",
        (f"{ATTENTION}::test_forward",),
    ),
    Bug(
        "composite-padded-text-counted-from-the-selected-image-rows",
        "beit3_fast/composite/shared_attention.py",
        "layout.positions[rows] + text * full_vision",
        "layout.positions[rows] + text * own_vision",
        (PADDED,),
    ),
    Bug(
        "composite-backward-scale-forgotten",
        "beit3_fast/composite/shared_attention.py",
        "(dweights * weights).sum(-1, keepdim=True)) * scale",
        "(dweights * weights).sum(-1, keepdim=True))",
        (f"{ATTENTION}::test_gradients",),
    ),
    # ops
    Bug(
        "ops-eps-forgotten-when-an-expert-has-no-rows",
        "beit3_fast/ops/expert_linear.py",
        "[norm.biases[e] for e in used], norm.eps)",
        "[norm.biases[e] for e in used])",
        (f"{LINEAR}::test_experts_without_rows_change_nothing",),
    ),
    Bug(
        "ops-residual-gradient-on-rows-not-named",
        "beit3_fast/ops/expert_linear.py",
        "dresidual = torch.zeros_like(grad).index_copy(0, rows, grad[rows])",
        "dresidual = grad.clone()",
        (f"{LINEAR}::test_gradients",),
    ),
    Bug(
        "ops-row-check-off-by-one",
        "beit3_fast/ops/expert_linear.py",
        "<= int(named[-1]) < count:",
        "<= int(named[-1]) <= count:",
        (f"{CONTRACT}::test_expert_linear",),
    ),
    Bug(
        "ops-backward-positions-forgotten",
        "beit3_fast/ops/shared_attention.py",
        "_layout_of(cu_vision_q, cu_text_q, positions_q)",
        "_layout_of(cu_vision_q, cu_text_q, None)",
        (f"{ATTENTION}::test_gradients",),
    ),
    Bug(
        "dispatch-autocast-not-seen",
        "beit3_fast/ops/dispatch.py",
        "autocast=autocast_enabled(first.device.type),",
        "autocast=False,",
        (f"{FORWARD}::test_kernels_that_know_no_autocast_are_refused_under_it",),
    ),
    # derived
    Bug(
        "derived-version-not-compared",
        "beit3_fast/derived.py",
        "        source._version,\n",
        "",
        (f"{DERIVED}::test_every_change_of_a_weight_is_seen",),
    ),
    Bug(
        "derived-fused-optimizers-not-watched",
        "beit3_fast/derived.py",
        "register_optimizer_step_post_hook(_after_step)",
        "",
        (f"{DERIVED}::test_every_change_of_a_weight_is_seen",),
    ),
    # layout
    Bug(
        "layout-split-off-by-one",
        "beit3_fast/layout.py",
        "return (0, self.num_vision_rows, self.num_rows)",
        "return (0, max(self.num_vision_rows - 1, 0), self.num_rows)",
        (f"{LAYOUT}::test_experts_own_the_rows_of_their_kind",),
    ),
    Bug(
        "layout-part-counts-image-only-samples-beyond-its-end",
        "beit3_fast/layout.py",
        "max(0, min(stop, self.image_only) - start)",
        "max(0, self.image_only - start)",
        (PARTS,),
    ),
    # model
    Bug(
        "encoder-swapped-experts",
        "beit3_fast/model/encoder.py",
        'Route([children["A"], children["B"]]',
        'Route([children["B"], children["A"]]',
        (f"{FORMULA}::test_mixed_batches",),
    ),
    Bug(
        "encoder-pair-expert-last",
        "beit3_fast/model/encoder.py",
        'for name in "ACB"]',
        'for name in "ABC"]',
        (f"{FORMULA}::test_mixed_batches",),
    ),
    Bug(
        "encoder-attention-sub-layernorm-forgotten",
        "beit3_fast/model/encoder.py",
        "_branch(o, attention.out_proj, attention.inner_attn_ln, residual, keep, impl)",
        "_branch(o, attention.out_proj, None, residual, keep, impl)",
        (f"{FORMULA}::test_mixed_batches",),
    ),
    Bug(
        "encoder-ffn-sub-layernorm-forgotten",
        "beit3_fast/model/encoder.py",
        "return _experts_linear(h, linears, experts.bounds, inner, None, x, impl)",
        "return _experts_linear(h, linears, experts.bounds, None, None, x, impl)",
        (f"{FORMULA}::test_mixed_batches",),
    ),
    Bug(
        "encoder-eps-of-the-norms-ignored",
        "beit3_fast/model/encoder.py",
        "return Norm([n.weight for n in modules], [n.bias for n in modules], modules[0].eps)",
        "return Norm([n.weight for n in modules], [n.bias for n in modules])",
        (f"{FORMULA}::test_mixed_batches",),
    ),
    Bug(
        "encoder-eps-of-the-ffn-norm-ignored",
        "beit3_fast/model/encoder.py",
        "inner = Norm([n.weight for n in norms], [n.bias for n in norms], norms[0].eps)",
        "inner = Norm([n.weight for n in norms], [n.bias for n in norms])",
        (f"{FORMULA}::test_mixed_batches",),
    ),
    Bug(
        "encoder-key-and-value-swapped-where-few-rows-are-read",
        "beit3_fast/model/encoder.py",
        'k, v = project(layer, x, layout, "kv", impl)',
        'v, k = project(layer, x, layout, "kv", impl)',
        (f"{TASKS}::test_visual_question_answering",),
    ),
    Bug(
        "embedding-text-positions-without-offset",
        "beit3_fast/model/embedding.py",
        "F.embedding(places + POSITION_OFFSET, table)",
        "F.embedding(places, table)",
        (f"{FORMULA}::test_mixed_batches",),
    ),
    Bug(
        "batch-padding-of-another-sample",
        "beit3_fast/model/batch.py",
        "    kept = sorted_samples(kept)\n",
        "",
        (f"{FORMULA}::test_padded_batches",),
    ),
    Bug(
        "beit3-order-of-samples-inverted",
        "beit3_fast/model/beit3.py",
        "torch.empty_like(rows).index_copy(0, torch.tensor(order, device=rows.device), rows)",
        "rows[torch.tensor(order, device=rows.device)]",
        (f"{FORWARD}::test_encoded_rows_in_the_caller_s_order",),
    ),
    Bug(
        "masks-left-padding-not-moved",
        "beit3_fast/model/masks.py",
        "= visible[kept][:, kept]",
        "= visible[: len(kept), : len(kept)]",
        (f"{TORCHSCALE_PARITY}::test_forward[text-left-arbitrary-reference-fp32-base]",),
    ),
    Bug(
        "incremental-rows-put-back-inverted",
        "beit3_fast/model/incremental.py",
        "return torch.empty_like(packed).index_copy(0, rows, packed)",
        "return packed[rows]",
        (f"{TASKS}::test_the_first_decoding_step_is_the_plain_forward",),
    ),
    Bug(
        "incremental-eps-ignored",
        "beit3_fast/model/incremental.py",
        "inner = Norm([n.weight for n in norms], [n.bias for n in norms], norms[0].eps)",
        "inner = Norm([n.weight for n in norms], [n.bias for n in norms])",
        (f"{TASKS}::test_decoding_step_by_step_is_decoding_at_once",),
    ),
    Bug(
        "registry-preset-of-the-checkpoint-ignored",
        "beit3_fast/model/registry.py",
        'model.preset = preset or (task.preset if task else "square")',
        'model.preset = task.preset if task else "square"',
        ("tests/test_public_api.py::test_a_checkpoint_carries_the_whole_model",),
    ),
    Bug(
        "tasks-class-token-in-the-mean",
        "beit3_fast/model/tasks.py",
        "tokens[:, 1:].mean(1)",
        "tokens.mean(1)",
        (f"{TASKS}::test_image_classification",),
    ),
    Bug(
        "tasks-labels-of-the-first-rank",
        "beit3_fast/model/retrieval.py",
        "torch.distributed.get_rank() * vision.shape[0]",
        "torch.distributed.get_rank()",
        (f"{TASKS}::test_the_contrastive_loss_meets_the_batches_of_all_ranks",),
    ),
    Bug(
        "tasks-decoding-positions-put-right",
        "beit3_fast/model/captioning.py",
        "torch.arange(length, length + new, device=device)[None]",
        "torch.arange(length - new, length, device=device)[None]",
        (f"{TASK_PARITY}::test_caption_decoded_step_by_step",),
    ),
    # captions
    Bug(
        "decoding-mask-token-sees-all-mask-tokens",
        "beit3_fast/model/decoding.py",
        "seen[:, width + own, self.num_vision + used + width + own] = True",
        "seen[:, width:, self.num_vision + used + width :] = True",
        (f"{CAPTIONING}::test_logits_of_every_step",),
    ),
    Bug(
        "decoding-parents-ignored",
        "beit3_fast/model/decoding.py",
        "self.seen.gather(1, parents[:, :, None].expand(-1, -1, self.words))",
        "self.seen.expand(-1, parents.shape[1], -1).clone()",
        (f"{CAPTIONING}::test_logits_of_every_step",),
    ),
    Bug(
        "decoding-pairs-to-the-text-expert",
        "beit3_fast/model/decoding.py",
        "layout = replace(layout, text_only=0)",
        "pass",
        (f"{CAPTIONING}::test_the_cache_gives_what_a_whole_forward_gives",),
    ),
    Bug(
        "decoding-mask-token-at-the-word-s-place",
        "beit3_fast/model/decoding.py",
        "places[:, words.shape[1] :] += 1",
        "pass",
        (f"{CAPTIONING}::test_logits_of_every_step",),
    ),
    Bug(
        "decoding-samples-that-left-are-written",
        "beit3_fast/model/decoding.py",
        "tuple(self.samples[index] for index in inputs.tolist())",
        "tuple(range(len(inputs)))",
        (f"{CAPTIONING}::test_token_for_token",),
    ),
    Bug(
        "beam-ends-beyond-full-beams-count",
        "beit3_fast/generate/beam.py",
        "counts = (ends & walked) | last",
        "counts = ends | last",
        (CAPTIONING, "tests/generate/test_beam.py"),
    ),
    Bug(
        "beam-done-too-soon",
        "beit3_fast/generate/beam.py",
        "done |= found.scores[:, -1] >=",
        "done |= found.scores[:, 0] >=",
        (CAPTIONING, "tests/generate/test_beam.py"),
    ),
    Bug(
        "beam-length-without-the-end",
        "beit3_fast/generate/beam.py",
        "scores / (before + 2) ** options.length_penalty",
        "scores / (before + 1) ** options.length_penalty",
        (f"{CAPTIONING}::test_token_for_token",),
    ),
    Bug(
        "sample-top-p-without-the-word-that-reaches-it",
        "beit3_fast/generate/sample.py",
        "p.cumsum(-1) - p >= options.top_p",
        "p.cumsum(-1) >= options.top_p",
        ("tests/generate/test_sample.py",),
    ),
    # checkpoint
    Bug(
        "keys-prefix-covers-part-of-a-name",
        "beit3_fast/checkpoint/keys.py",
        'name.startswith(p.rstrip(".") + ".")',
        'name.startswith(p.rstrip("."))',
        (f"{LOAD}::test_prefixes_cover_whole_parts_of_names_only",),
    ),
    Bug(
        "positions-corners-aligned",
        "beit3_fast/checkpoint/positions.py",
        "align_corners=False)",
        "align_corners=True)",
        (f"{POSITIONS}::test_square_grids_are_the_official_result_bit_for_bit",),
    ),
    Bug(
        "save-whole-memory-behind-a-view",
        "beit3_fast/checkpoint/save.py",
        "tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes",
        "tensor.is_contiguous()",
        (f"{SAVE}::test_every_bit_comes_back",),
    ),
    Bug(
        "atomic-name-before-the-data",
        "beit3_fast/checkpoint/atomic.py",
        "os.fsync(file.fileno())\n                os.replace(partial, target)",
        "os.replace(partial, target)\n                os.fsync(file.fileno())",
        (f"{SAVE}::test_data_reaches_the_disk_before_the_name",),
    ),
    Bug(
        "safetensors-digest-not-compared",
        "beit3_fast/checkpoint/safetensors_file.py",
        'if verify and claimed and digest.hexdigest() != claimed["sha256"]:',
        'if verify and claimed and not claimed["sha256"]:',
        (f"{MALFORMED}::test_a_malformed_file_is_refused", f"{FUZZ}::test_random_damage"),
    ),
    Bug(
        "pickle-any-name-of-torch",
        "beit3_fast/checkpoint/pickle_scan.py",
        "if name not in ALLOWED:",
        'if name not in ALLOWED and not name.startswith("torch."):',
        (f"{MALFORMED}::test_no_gadget_runs", f"{MALFORMED}::test_a_malformed_file_is_refused"),
    ),
    Bug(
        "pickle-tensor-one-number-beyond-its-storage",
        "beit3_fast/checkpoint/pickle_scan.py",
        "(last + 1) * width > available",
        "last * width > available",
        (f"{MALFORMED}::test_a_malformed_file_is_refused",),
    ),
    # data
    Bug(
        "tokenizer-special-pieces-keep-their-numbers",
        "beit3_fast/data/tokenizer.py",
        "_ID_OF_SPECIAL = (UNK, BOS, EOS)",
        "_ID_OF_SPECIAL = (BOS, PAD, EOS)",
        ("tests/data/test_tokenizer.py::TestIds",),
    ),
    Bug(
        "tokenizer-first-padding-not-marked",
        "beit3_fast/data/tokenizer.py",
        "torch.arange(width) >= torch.tensor(lengths)[:, None]",
        "torch.arange(width) > torch.tensor(lengths)[:, None]",
        ("tests/data/test_tokenizer.py::TestSegments",),
    ),
    Bug(
        "images-channels-in-bgr",
        "beit3_fast/data/presets.py",
        "mean=(0.485, 0.456, 0.406)",
        "mean=(0.406, 0.456, 0.485)",
        ("tests/data/test_images.py::TestPresets",),
    ),
    Bug(
        "processor-reserved-positions-counted",
        "beit3_fast/data/processor.py",
        "positions = config.max_text_positions - _RESERVED_POSITIONS",
        "positions = config.max_text_positions",
        ("tests/data/test_processor.py::TestForModel",),
    ),
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
        "    broken.extend(_turned_rows(f, r, p, p_truth, _ROW_BOUND[dtype], factor))\n",
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
        "wanted = torch.float32 if int8 else _dtype(dtype)",
        "wanted = torch.bfloat16 if int8 else _dtype(dtype)",
        ("tests/model/test_int8.py::test_a_checkpoint_is_rounded_from_its_own_precision",),
    ),
    Bug(
        "incremental-words-of-a-pair-to-the-text-expert",
        "beit3_fast/model/incremental.py",
        "layout = replace(layout, text_only=0)",
        "pass",
        ("tests/model/test_properties.py::test_decoding_in_pieces_of_any_size",),
    ),
    # bench
    Bug(
        "bench-ratio-inverted",
        "bench/timing.py",
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
    # kernels
    Bug(
        "triton-last-step-of-a-part-takes-rows-of-the-next-expert",
        "kernels/_weight_gradient.py",
        "        real = real & (row < end)[:, None]\n",
        "        real = real\n",
        (f"{TRITON_GRADIENTS}::test_gradients",),
    ),
    Bug(
        "triton-gelu-derivative-without-its-slope",
        "kernels/_expert_linear_backward.py",
        "dz *= 0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * bell",
        "dz *= 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))",
        (f"{TRITON_GRADIENTS}::test_gradients",),
    ),
    Bug(
        "triton-norm-backward-keeps-the-mean",
        "kernels/_expert_linear_backward.py",
        "(g - (tl.sum(g, 1) / K)[:, None] - normed",
        "(g - normed",
        (f"{TRITON_GRADIENTS}::test_gradients",),
    ),
    Bug(
        "triton-padding-of-the-vocabulary-counts",
        "kernels/masked_linear_cross_entropy.py",
        '        z = tl.where((column < V)[None, :], z, float("-inf"))\n',
        "",
        (f"{TRITON_CROSS_ENTROPY}::test_losses_and_gradients",),
    ),
    Bug(
        "triton-whole-rows-without-the-mask",
        "kernels/shared_attention.py",
        'pieces += (tl.where(place[None, :] < limit[:, None], scores, float("-inf")),)',
        "pieces += (scores,)",
        (f"{TRITON_ATTENTION}::test_whole_rows_of_scores",),
    ),
    # csrc: single levels; those that this processor lacks run emulated
    Bug(
        "amx-second-half-of-the-panel-again-the-first",
        "csrc/cpu/amx_tiles.h",
        "_tile_loadd(7, b + 16, kBRow);",
        "_tile_loadd(7, b, kBRow);",
        (EMULATED,),
    ),
    Bug(
        "amx-lower-rows-forgotten-with-one-half",
        "csrc/cpu/amx_tiles.h",
        "if (M == 2) _tile_stored(2, lower, c_row);",
        "if (M == 2 && N == 2) _tile_stored(2, lower, c_row);",
        (EMULATED,),
    ),
    Bug(
        "amx-sums-of-earlier-depth-dropped",
        "csrc/cpu/amx_tiles.h",
        "_tile_loadd(0, c, c_row);",
        "_tile_zero(0);",
        (EMULATED,),
    ),
    Bug(
        "avx2-upper-half-of-the-gelu-table-unused",
        "csrc/cpu/vec_avx2.h",
        "_mm256_load_ps(kTail[k] + 8)",
        "_mm256_load_ps(kTail[k])",
        (KERNELS,),
        isa=("avx2",),
    ),
    Bug(
        "avx2-odd-numbers-of-a-pair-read-as-even",
        "csrc/cpu/kernels_avx2.cpp",
        ": each == 1   ? _mm256_and_si256(unit, high)",
        ": each == 2   ? _mm256_and_si256(unit, high)",
        (KERNELS,),
        isa=("avx2",),
    ),
    Bug(
        "vnni-offsets-forgotten",
        "csrc/cpu/linear_loops.h",
        "Arch::kUnsigned ? scales.offsets + column : nullptr",
        "nullptr",
        (EMULATED,),
    ),
    Bug(
        "avx2-int8-odd-numbers-twice",
        "csrc/cpu/int8_avx2.cpp",
        "right[j] = odd ? odds(unit) : evens(unit);",
        "right[j] = odds(unit);",
        (INT8,),
        isa=("avx2",),
    ),
    # csrc: what all instruction-set levels share
    Bug(
        "int8-numbers-not-finite-become-whole",
        "csrc/cpu/tile_loops.h",
        "scales[r] = largest / 127.0f + v_sum(poison);",
        "scales[r] = largest / 127.0f;",
        (f"{INT8}::test_numbers_that_are_not_finite_are_not_hidden",),
    ),
    Bug(
        "int8-one-scale-for-a-tile",
        "csrc/cpu/linear_loops.h",
        "v_set(scales.rows[row])",
        "v_set(scales.rows[0])",
        (f"{INT8}::test_sizes",),
    ),
    Bug(
        "int8-scales-of-the-first-panel",
        "csrc/cpu/linear_loops.h",
        "behind + inside,",
        "behind,",
        (f"{INT8}::test_sizes",),
    ),
    Bug(
        "int8-weights-cut-instead-of-rounded",
        "csrc/cpu/packed_weight.cpp",
        "std::lrint(element(dtype, row, i) * inverse)",
        "element(dtype, row, i) * inverse",
        (f"{INT8}::test_unpacked_weights",),
    ),
    Bug(
        "ops-cpp-named-rows-cleared",
        "csrc/ops.cpp",
        "if (!named[i]) std::memset",
        "if (named[i]) std::memset",
        (f"{LINEAR}::test_rows_that_are_not_named_are_zero",),
    ),
    Bug(
        "ops-cpp-position-check-off-by-one",
        "csrc/ops.cpp",
        "position < keys[s + 1] - keys[s]",
        "position <= keys[s + 1] - keys[s]",
        (f"{ARGUMENTS}::test_shared_attention_rejects",),
    ),
    Bug(
        "ops-cpp-eps-fixed",
        "csrc/ops.cpp",
        "call.eps = static_cast<float>(eps);",
        "call.eps = 1e-5f;",
        (f"{LINEAR}::test_forward",),
    ),
    Bug(
        "linear-scratch-never-given-back",
        "csrc/cpu/expert_linear.cpp",
        "    thread_local Scratch scratch;\n    const LinearBlock& task",
        "    Scratch& scratch = *new Scratch;\n    const LinearBlock& task",
        (f"{PROCESSES}::test_memory_does_not_grow",),
    ),
    Bug(
        "ops-cpp-all-work-on-one-thread",
        "csrc/ops.cpp",
        "torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {",
        "[&](auto all) { all(int64_t{0}, count); }([&](int64_t begin, int64_t end) {",
        (f"{PROCESSES}::test_the_threads_are_those_of_torch",),
    ),
    Bug(
        "packed-weight-write-to-a-copy",
        "beit3_fast/ops/packed_weight.py",
        "            _check_written(func._schema, args, kwargs or {})\n",
        "            pass\n",
        ("tests/model/test_inference_only.py::test_no_write_is_lost_on_a_copy",),
    ),
    Bug(
        "int8-state-dict-rounded-twice",
        "beit3_fast/ops/packed_weight.py",
        "weight.unpack(torch.float32 if weight.is_int8 else None)",
        "weight.unpack()",
        ("tests/model/test_int8.py::test_the_state_dict_holds_what_is_multiplied",),
    ),
    Bug(
        "positions-of-every-size-kept",
        "beit3_fast/model/embedding.py",
        "if len(tables) >= MOST_GRIDS:",
        "if False:",
        (f"{FORWARD}::test_a_server_of_any_size_keeps_the_positions_of_a_few",),
    ),
    Bug(
        "packed-weight-stride-ignored",
        "csrc/cpu/packed_weight.cpp",
        "const int64_t row_bytes = stride * bytes_of(dtype);\n  const int64_t words",
        "const int64_t row_bytes = in_features * bytes_of(dtype);\n  const int64_t words",
        (f"{KERNELS}::test_rows_of_a_weight_may_lie_apart",),
    ),
    Bug(
        "packed-weight-of-another-height",
        "csrc/cpu/packed_weight.cpp",
        " && header.out_features == out_features",
        "",
        (f"{ARGUMENTS}::test_pack_weight_says_what_it_holds",),
    ),
    Bug(
        "linear-rows-of-the-first-expert",
        "csrc/cpu/expert_linear.cpp",
        "task.first = expert.first + begin;",
        "task.first = begin;",
        (f"{KERNELS}::test_expert_linear_sizes",),
    ),
    Bug(
        "linear-last-panels-lost-between-threads",
        "csrc/cpu/expert_linear.cpp",
        "task.panel_end = panels * (split + 1) / splits;",
        "task.panel_end = task.panel_begin + panels / splits;",
        (f"{KERNELS}::test_columns_are_shared_out_among_threads",),
    ),
    Bug(
        "linear-parameters-padded-with-old-numbers",
        "csrc/cpu/expert_linear.cpp",
        "  std::fill(to + count, to + padded, 0.0f);\n",
        "  (void)padded;\n",
        (f"{KERNELS}::test_parameters_of_an_earlier_call_are_not_read",),
    ),
    Bug(
        "linear-rows-not-gathered",
        "csrc/cpu/linear_loops.h",
        "return block.rows == nullptr ? sorted : block.rows[sorted];",
        "return sorted;",
        (f"{LINEAR}::test_gathered_rows_give_the_packed_result",),
    ),
    Bug(
        "tiles-eps-outside-the-root",
        "csrc/cpu/tile_loops.h",
        "__builtin_sqrtf((variance > 0.0f ? variance : variance * 0.0f) + eps)",
        "(__builtin_sqrtf(variance > 0.0f ? variance : variance * 0.0f) + eps)",
        (f"{KERNELS}::test_expert_linear_values",),
    ),
    Bug(
        "tiles-variance-counts-the-padding",
        "csrc/cpu/tile_loops.h",
        "    if (left < 16) d = v_keep(d, left, 0.0f);\n",
        "",
        (f"{KERNELS}::test_expert_linear_sizes",),
    ),
    Bug(
        "attention-text-does-not-see-itself",
        "csrc/cpu/attention_loops.h",
        "min_of(position + 1, block.text_keys) : block.vision_keys;",
        "min_of(position, block.text_keys) : block.vision_keys;",
        (f"{KERNELS}::test_shared_attention",),
    ),
    Bug(
        "attention-positions-of-queries-ignored",
        "csrc/cpu/attention_loops.h",
        "  if (block.positions != nullptr) position = block.positions[row];\n",
        "  (void)row;\n",
        (f"{KERNELS}::test_shared_attention",),
    ),
    Bug(
        "attention-largest-score-of-invisible-keys",
        "csrc/cpu/attention_loops.h",
        "left < 16 ? v_keep(x, left, -__builtin_inff()) : x",
        "x",
        (f"{KERNELS}::test_shared_attention",),
    ),
    Bug(
        "attention-weight-of-invisible-keys",
        "csrc/cpu/attention_loops.h",
        "      if (left < 16) part[j] = v_keep(part[j], left, 0.0f);\n",
        "",
        (f"{KERNELS}::test_shared_attention",),
    ),
    # csrc: the portable level
    Bug(
        "portable-tanh-gelu",
        "csrc/cpu/vec_portable.h",
        "0.5f * a * std::erfc(a * -0.70710678118654752f)",
        "0.5f * a * (1.0f + std::tanh(0.79788456f * (a + 0.044715f * a * a * a)))",
        (f"{KERNELS}::test_expert_linear_sizes", f"{KERNELS}::test_lower_levels"),
        isa=("portable",),
    ),
    Bug(
        "portable-ties-of-bf16-away-from-zero",
        "csrc/cpu/vec_portable.h",
        "bits + 0x7fffu + ((bits >> 16) & 1u)",
        "bits + 0x8000u",
        (f"{KERNELS}::test_bfloat16_is_rounded_to_the_nearest_ties_to_even",),
        isa=("portable",),
    ),
)
