"""Mistakes in layers that are computed in one call."""

from __future__ import annotations

from bugs.bug import LAYER_ARGUMENTS, WHOLE_LAYER, Bug

LAYERS_BUGS = (
    # csrc/layer_ops.cpp
    Bug(
        "layer-second-residual-is-the-first",
        "csrc/layer_ops.cpp",
        "add(attended, second);",
        "add(x, second);",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-without-gelu",
        "csrc/layer_ops.cpp",
        "first.activation = Activation::kGelu;",
        "",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-one-eps-for-all-products",
        "csrc/layer_ops.cpp",
        "own_.eps[name]",
        "own_.eps[0]",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-values-are-the-keys",
        "csrc/layer_ops.cpp",
        "keys_at + part, call.dtype",
        "keys_at, call.dtype",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-biases-of-the-first-expert-for-all",
        "csrc/layer_ops.cpp",
        "const Tensor& bias = own_.biases[first + i];",
        "const Tensor& bias = own_.biases[first_[name] + from + i];",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-of-rows-apart-read-as-dense",
        "csrc/layer_ops.cpp",
        "call.x_stride = x.stride(0);",
        "call.x_stride = in_features;",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-residual-of-rows-apart-read-as-dense",
        "csrc/layer_ops.cpp",
        "call.residual_stride = residual.stride(0);",
        "call.residual_stride = residual.size(1);",
        (WHOLE_LAYER,),
    ),
    Bug(
        "decoder-words-ask-instead-of-masks",
        "csrc/layer_ops.cpp",
        "skipped * call.q_stride",
        "0 * call.q_stride",
        (WHOLE_LAYER,),
    ),
    Bug(
        "decoder-residual-of-the-words",
        "csrc/layer_ops.cpp",
        "i / count * each + each - count + i % count",
        "i / count * each + i % count",
        (WHOLE_LAYER,),
    ),
    Bug(
        "decoder-values-written-are-keys",
        "csrc/layer_ops.cpp",
        "write_rows(projected, 2 * width,",
        "write_rows(projected, width,",
        (WHOLE_LAYER,),
    ),
    Bug(
        "decoder-writes-beyond-the-cache",
        "csrc/layer_ops.cpp",
        "require(place >= 0 && place + each <= call.keys, op",
        "require(place >= 0 && place <= call.keys, op",
        (LAYER_ARGUMENTS,),
    ),
    Bug(
        "layer-rows-beyond-x",
        "csrc/layer_ops.cpp",
        "index[i] >= 0 && index[i] < x.size(0)",
        "index[i] >= 0 && index[i] <= x.size(0)",
        (LAYER_ARGUMENTS,),
    ),
    Bug(
        "layer-bounds-end-anywhere",
        "csrc/layer_ops.cpp",
        "require(bounds[experts] == x.size(0), op_",
        "require(bounds[experts] > 0, op_",
        (LAYER_ARGUMENTS,),
    ),
    Bug(
        "bias-in-parts-is-its-first-part",
        "csrc/cpu/expert_linear.cpp",
        "expert.bias[static_cast<std::size_t>(i)]",
        "expert.bias[0]",
        (WHOLE_LAYER,),
    ),
    # Python
    Bug(
        "layer-in-one-call-under-autocast",
        "beit3_fast/ops/whole_layer.py",
        "if at.needs_grad or at.autocast:",
        "if at.needs_grad:",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-in-one-call-loses-gradients",
        "beit3_fast/ops/whole_layer.py",
        "if at.needs_grad or at.autocast:",
        "if at.autocast:",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-in-one-call-whatever-the-dtype-of-its-weights",
        "beit3_fast/ops/whole_layer.py",
        "x.shape[1] % PANEL or any(weight.dtype is not x.dtype for weight in weights)",
        "x.shape[1] % PANEL",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-in-one-call-with-panels-across-its-parts",
        "beit3_fast/ops/whole_layer.py",
        "x.shape[1] % PANEL or any(",
        "any(",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-in-one-call-drops-paths-no-more",
        "beit3_fast/model/encoder.py",
        "if first is None and second is None and x.parts is None:",
        "if x.parts is None:",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-in-one-call-forgets-a-mask-tensor",
        "beit3_fast/model/encoder.py",
        'if x.device.type != "cpu" or isinstance(mask, Tensor) or isinstance(layout, PaddedLayout):\n        return None',
        'if x.device.type != "cpu" or isinstance(layout, PaddedLayout):\n        return None\n'
        '    mask = "bidirectional" if isinstance(mask, Tensor) else mask',
        (WHOLE_LAYER,),
    ),
    Bug(
        "experts-differ-in-eps-unseen",
        "beit3_fast/model/experts.py",
        "if any(norm.eps != one for",
        "if any(norm.eps == -one for",
        (WHOLE_LAYER,),
    ),
    Bug(
        "experts-of-asked-rows-bound-like-all-rows",
        "beit3_fast/model/experts.py",
        "    if own is not layout:\n        among",
        "    if own is None:\n        among",
        (WHOLE_LAYER,),
    ),
    Bug(
        "layer-failure-taken-for-a-refusal",
        "beit3_fast/ops/whole_layer.py",
        'return str(error).startswith(f"{op}: ")',
        "return True",
        (f"{WHOLE_LAYER}::test_a_failure_is_not_taken_for_a_refusal",),
    ),
)
