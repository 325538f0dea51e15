"""Which implementation each op of a model takes on this machine, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from beit3_fast.errors import ConfigError
from beit3_fast.ops import cuda_kernels, dispatch
from beit3_fast.ops.packed_weight import PackedWeight


@dataclass(frozen=True)
class Explanation:
    """One op: the implementation taken, and the reason against each other one."""

    op: str
    impl: str
    rejected: tuple[tuple[str, str], ...]


def explain(model: nn.Module, *, quiet: bool = False) -> list[Explanation]:
    """Print (unless ``quiet``) and return op, choice and why not the others, for inference and for training.

    ``model`` is a beit3_fast model or one that ``beit3_fast.accelerate`` has treated. Raises KernelUnavailable
    when the model names an implementation that cannot run here, ConfigError for anything but a model.
    """
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is None:
        raise ConfigError(
            f"explain takes a model with parameters, got {type(model).__name__}; make one with "
            "beit3_fast.create_model"
        )
    named = (_impl(module) for module in model.modules())
    impl = next((name for name in named if isinstance(name, str)), None)
    if impl is None:
        raise ConfigError(
            f"{type(model).__name__} is neither a beit3_fast model nor accelerated; make one with "
            "beit3_fast.create_model or pass it to beit3_fast.accelerate first"
        )
    kept = [p for p in model.parameters() if isinstance(p, PackedWeight)]
    int8, float8 = any(p.is_int8 for p in kept), any(p.is_float8 for p in kept)
    sizes = _sizes(model, float8)
    lower = dispatch.autocast_dtype(parameter)
    explanations = []
    for needs_grad in (False, True):
        for op in dispatch.OPS:
            at = dispatch.Situation(
                op=op,
                device=parameter.device.type,
                dtype=lower or parameter.dtype,
                needs_grad=needs_grad,
                # Attention holds no weights: its operands are cast before the choice.
                autocast=lower is not None and op == "expert_linear",
                compiling=False,
                mask_tensor=False,
                int8=int8,
                float8=float8 and op == "expert_linear",
                **sizes.get(op, {}),
            )
            choice = dispatch.choose(at, impl)
            name = f"{op} ({'training' if needs_grad else 'inference'})"
            explanations.append(Explanation(name, choice.impl, choice.rejected))
    explanations += _encoders(model)
    if not quiet:
        print(_table(explanations))
    return explanations


def _impl(module: nn.Module) -> object:
    """What a module of beit3_fast, or an accelerated encoder of torchscale, was asked to run with."""
    return getattr(module, "impl", None) or getattr(vars(module).get("forward"), "impl", None)


def _sizes(model: nn.Module, float8: bool) -> dict[str, dict[str, Any]]:
    """What a choice depends on of the sizes of the model, by op."""
    for module in model.modules():
        heads, projection = getattr(module, "num_heads", None), getattr(module, "q_proj", None)
        if isinstance(heads, int) and isinstance(projection, nn.Module):
            width = next(projection.parameters()).shape[0]
            head = width // heads
            misfit = cuda_kernels.attention_misfit(head)
            return {
                "expert_linear": {"misfit": cuda_kernels.linear_misfit(width, width, float8)},
                "shared_attention": {"misfit": misfit, "head_width": head},
            }
    return {}


def _encoders(model: nn.Module) -> list[Explanation]:
    """Which accelerated encoders of torchscale run its own code, always or for some calls, and why."""
    explanations = []
    for name, module in model.named_modules():
        forward: Any = vars(module).get("forward")
        if not hasattr(forward, "fallback_reasons"):
            continue
        obstacle = forward.obstacle()
        if obstacle is None:
            explanations.append(Explanation(f"encoder {name or '.'}", "beit3_fast", ()))
        reasons = forward.fallback_reasons if obstacle is None else [obstacle]
        if reasons:
            op = f"encoder {name or '.'}{' (some calls)' if obstacle is None else ''}"
            rejected = tuple(("beit3_fast", reason) for reason in reasons)
            explanations.append(Explanation(op, "torchscale", rejected))
    return explanations


def _table(explanations: list[Explanation]) -> str:
    lines = []
    for item in explanations:
        lines.append(f"{item.op}: {item.impl}")
        lines += [f"    not {name}: {reason}" for name, reason in item.rejected]
    return "\n".join(lines)
