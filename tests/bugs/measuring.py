"""Mistakes in what is measured on a GPU, and in what it is set beside."""

from __future__ import annotations

from bugs.bug import COST_MODEL, FIGURES, GPU, Bug

MEASURING_BUGS = (
    Bug(
        "cost-of-a-product-without-its-residual",
        "bench/cost_model.py",
        "residual = result * max(read, 2.0) if product.residual else 0.0",
        "residual = 0.0",
        (f"{COST_MODEL}::test_a_product_by_hand",),
    ),
    Bug(
        "cost-of-experts-as-launches-of-their-own",
        "bench/cost_model.py",
        "key = (product.width, product.out, product.times, product.residual)",
        "key = (product.width, product.out, product.rows, product.residual)",
        (f"{COST_MODEL}::test_a_workload_by_hand",),
    ),
    Bug(
        "cost-of-the-shorter-of-products-and-memory",
        "bench/cost_model.py",
        "return max(self.products, self.memory)",
        "return min(self.products, self.memory)",
        (f"{COST_MODEL}::test_floors_are_those_of_an_independent_reckoning",),
    ),
    Bug(
        "cost-of-a-backward-without-the-scores-again",
        "bench/cost_model.py",
        "return Cost(10.0 * scores * width, BYTES[dtype] * 8 * rows * width)",
        "return Cost(8.0 * scores * width, BYTES[dtype] * 8 * rows * width)",
        (f"{COST_MODEL}::test_an_attention_by_hand",),
    ),
    Bug(
        "scores-of-text-that-sees-later-text",
        "beit3_fast/model/work.py",
        "return vision * tokens + text * (text + 1) // 2",
        "return vision * tokens + text * text",
        (f"{COST_MODEL}::test_scores_of_a_mask_are_those_that_the_op_lets_through",),
    ),
    Bug(
        "work-of-the-third-expert-in-a-layer-too-many",
        "beit3_fast/model/work.py",
        "above = max(config.vl_expert_layers - (layers - whole), 0)",
        "above = config.vl_expert_layers",
        (f"{COST_MODEL}::test_giant_multiplies_its_shared_and_its_third_weights_once",),
    ),
    Bug(
        "gpu-every-call-waits",
        "bench/events.py",
        "        call()\n        mark.record()\n",
        "        call()\n        mark.record()\n        mark.synchronize()\n",
        (f"{COST_MODEL}::test_a_round_on_a_gpu_waits_once",),
    ),
    Bug(
        "gpu-children-of-a-step-outlive-it",
        "bench/gpu.py",
        "os.killpg(process.pid, signal.SIGKILL)",
        "process.kill()",
        (f"{GPU}::test_a_step_that_takes_too_long_is_stopped_with_its_children",),
    ),
    Bug(
        "gpu-the-sanitizer-joins-no-parts",
        "bench/gpu_steps.py",
        '"or (op_before and 0.0-3-)"',
        '"or joined"',
        (f"{GPU}::test_the_sanitizer_sees_every_kernel",),
    ),
    Bug(
        "gpu-a-step-that-never-ran-stops-nothing",
        "bench/gpu.py",
        'if (why := _outcome(record, name)) != "passed"',
        'if (why := _outcome(record, name)) not in ("passed", "not run")',
        (f"{GPU}::test_only_judges_earlier_steps_by_the_record",),
    ),
    Bug(
        "gpu-a-step-passed-with-any-sources",
        "bench/gpu.py",
        'if record[name].get("sources") != now.get(name)]',
        "if name not in now]",
        (f"{GPU}::test_a_changed_source_runs_a_step_again",),
    ),
    Bug(
        "gpu-a-step-that-outlasts-the-budget",
        "bench/gpu.py",
        "elif step.limit_s > end - time.monotonic():",
        "elif end < time.monotonic():",
        (f"{GPU}::test_no_step_begins_that_could_outlast_the_budget",),
    ),
    Bug(
        "gpu-a-step-outlives-its-session",
        "bench/gpu.py",
        "preexec_fn=os.setpgrp,",
        "start_new_session=True,",
        (f"{GPU}::test_ended_from_outside_it_ends_its_step",),
    ),
    Bug(
        "gpu-tests-pass-in-front-of-stand-ins",
        "tests/ops/cuda_cases.py",
        'if reason is not None and os.environ.get("BEIT3_FAST_TESTS_NEED_GPU") == "1":',
        "if reason is None and False:",
        (f"{GPU}::test_tests_that_need_a_gpu_do_not_pass_without_one",),
    ),
    Bug(
        "gpu-a-library-of-any-sources",
        "bench/gpu_library.py",
        'library.load().stamp.get("cuda_sources") == sources_hash()',
        'bool(library.load().stamp.get("cuda_sources"))',
        (f"{GPU}::test_the_library_is_known_by_its_sources",),
    ),
    Bug(
        "gpu-figures-count-half-of-attention",
        "bench/micro/figures.py",
        "4.0 * samples * tokens**2 * width",
        "2.0 * samples * tokens**2 * width",
        (f"{FIGURES}::test_the_work_is_that_of_the_useful_operations",),
    ),
    Bug(
        "captions-of-any-score-are-as-good",
        "bench/products.py",
        "if mine < theirs - limit or abs(a.score - mine) > limit",
        "if abs(a.score - mine) > limit",
        ("tests/bench/test_bench_products.py::test_captions_are_judged_by_their_scores",),
    ),
)
