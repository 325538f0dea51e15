"""What a planted mistake is, and names for the test files that should see it."""

from __future__ import annotations

from dataclasses import dataclass

LINEAR = "tests/ops/test_expert_linear.py"
TRIED = "tests/integrations/test_torchscale_tried.py"
TRITON_GRADIENTS = "tests/ops/test_triton_linear_gradients.py"
TRITON_CROSS_ENTROPY = "tests/ops/test_triton_cross_entropy.py"
TRITON_ATTENTION = "tests/ops/test_triton_shared_attention.py"
TRITON_STRIDES = "tests/ops/test_triton_strides.py"
TRITON_PADDING = "tests/ops/test_triton_padding.py"
TRITON_TILES = "tests/ops/test_triton_tiles.py"
TRITON_FAR = "tests/ops/test_triton_far_rows.py"
KERNEL_CHECK = "tests/ops/test_kernel_check.py"
CROSS_ENTROPY = "tests/ops/test_masked_linear_cross_entropy.py"
ATTENTION = "tests/ops/test_shared_attention.py"
PADDED = "tests/ops/test_padded_attention.py"
KERNELS = "tests/ops/test_cpu_kernels.py"
BLOCKS = "tests/ops/test_cpu_blocks.py"
SPECIAL_VALUES = "tests/ops/test_cpu_special_values.py"
CPU_LEVEL = "tests/ops/test_cpu_level.py"
CUDA_ATTENTION = "tests/cuda/test_cuda_attention.py"
CUDA_DECODING = "tests/cuda/test_cuda_decoding.py"
CUDA_DECODING_BINDING = "tests/ops/test_cuda_decoding_binding.py"
CUDA_HEAD = "tests/cuda/test_cuda_head.py"
LIKELIEST = "tests/ops/test_likeliest.py"
HEAD_TOP_K = "tests/ops/test_head_top_k.py"
STEP_GRAPH = "tests/model/test_step_graph.py"
CUDA_BINDING = "tests/ops/test_cuda_binding.py"
TRITON_DISPATCH = "tests/ops/test_triton_dispatch.py"
CUDA_DISPATCH = "tests/ops/test_cuda_dispatch.py"
INT8 = "tests/ops/test_cpu_int8.py"
EMULATED = "tests/ops/test_emulated_levels.py"
CUDA_FLOAT8 = "tests/cuda/test_cuda_float8.py"
CUDA_FLOAT8_OPS = "tests/ops/test_cuda_float8_ops.py"
FLOAT8 = "tests/model/test_float8.py"
CUDA_LINEAR = "tests/cuda/test_cuda_expert_linear.py"
MEMORY = "tests/ops/test_cpu_memory.py"
PROCESSES = "tests/ops/test_cpu_processes.py"
THREADS = "tests/ops/test_cpu_threads.py"
FAR_ROWS = "tests/ops/test_cpu_far_rows.py"
ARGUMENTS = "tests/ops/test_cpu_arguments.py"
AUTOCAST = "tests/ops/test_autocast.py"
COMPILE = "tests/model/test_compile.py"
DROP_PATH = "tests/model/test_drop_path.py"
CAPTURE = "tests/model/test_capture.py"
OP_CONTRACT = "tests/ops/test_op_contract.py"
DERIVED = "tests/test_derived.py"
LAYOUT = "tests/test_layout.py"
PARITY = "tests/test_parity.py"
FORMULA = "tests/model/test_formula.py"
FORWARD = "tests/model/test_forward.py"
WHOLE_LAYER = "tests/model/test_whole_layer.py"
LAYERS_IN_ONE_CALL = "tests/model/test_layers_in_one_call.py"
LAYER_ARGUMENTS = "tests/ops/test_layer_arguments.py"
PARTS = "tests/model/test_encode_in_parts.py"
TASKS = "tests/model/test_tasks.py"
TASK_PARITY = "tests/model/test_task_parity.py"
CAPTIONING = "tests/model/test_captioning.py"
TORCHSCALE_PARITY = "tests/model/test_torchscale_parity.py"
PRETRAINING = "tests/model/test_pretraining.py"
MASKING = "tests/data/test_masking.py"
MIXED = "tests/data/test_mixed.py"
WORLD = "tests/data/test_world.py"
WORLD_FOLDER = "tests/data/test_world_folder.py"
OBJECTIVE = "tests/train/test_objective.py"
OPTIMIZER = "tests/train/test_optimizer.py"
BEFORE = "tests/train/test_before_training.py"
RECIPE = "tests/train/test_recipe.py"
FINETUNE = "tests/train/test_finetune.py"
PAIRED = "tests/data/test_paired.py"
VIEWS = "tests/data/test_views.py"
INITIAL = "tests/train/test_initial.py"
THROUGHPUT = "tests/train/test_throughput.py"
REPORT = "tests/train/test_report.py"
LOOP = "tests/train/test_loop.py"
RESUME = "tests/train/test_continuation.py"
CONTRASTIVE = "tests/train/test_contrastive.py"
TOKENIZER_TRAINING = "tests/train/test_tokenizer_training.py"
TOKENIZE_IMAGES = "tests/train/test_tokenize_images.py"
CODEBOOK = "tests/model/test_codebook.py"
RANKS = "tests/train/test_two_ranks.py"
LOAD = "tests/checkpoint/test_load_checkpoint.py"
SAVE = "tests/checkpoint/test_save_checkpoint.py"
ATOMIC_SAVE = "tests/checkpoint/test_atomic_save.py"
POSITIONS = "tests/checkpoint/test_positions.py"
MALFORMED = "tests/checkpoint/test_malformed_files.py"
FUZZ = "tests/checkpoint/test_checkpoint_fuzz.py"
BENCH_INT8 = "tests/bench/test_bench_int8.py"
BENCH_RUN = "tests/bench/test_bench_run.py"
BENCH_TIMING = "tests/bench/test_bench_timing.py"
COST_MODEL = "tests/bench/test_cost_model.py"
FIGURES = "tests/bench/test_figures.py"
GPU = "tests/bench/test_bench_gpu.py"
GPU_PLAN = "tests/bench/test_gpu_plan.py"
GRADIENTS = "tests/ops/test_attention_gradients.py"
KERNEL_RESOURCES = "tests/bench/test_kernel_resources.py"


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
