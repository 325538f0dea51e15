"""Layers in one call of the compiled library, see ``beit3_fast.ops.whole_layer``: when, and with which parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from beit3_fast.layout import Selection, TokenLayout
from beit3_fast.model.experts import expert_norm, layer_operands
from beit3_fast.ops import whole_layer
from beit3_fast.padded_layout import PaddedLayout

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_watched(module: Any, called: type[nn.Module]) -> bool:
    """Whether somebody hooks into the calls of a module, or computes it in another way than its class ``called`` does.
    Layers of other classes are not called as modules.
    """
    if not isinstance(module, called):
        return False
    own = module.__dict__
    if type(module).forward is not called.forward or "forward" in own:
        return True
    if own.get("_compiled_call_impl") is not None or _has_any_global_hook():
        return True
    return any(own[hooks] for hooks in _HOOKS)


def layers_in_one_call(
    layers: Sequence[Any],
    x: Tensor,
    layout: TokenLayout,
    mask: str | Tensor,
    read: Selection | None,
    impl: str,
    last: nn.Module | None = None,
    most_rows: int | None = None,
) -> Tensor | None:
    """Layers one after the other, and the LayerNorm ``last`` behind them, where the compiled library computes all of them; else
    None. None for more than ``most_rows`` rows as well, unless the library takes samples through all layers one by one."""
    if x.device.type != "cpu" or isinstance(mask, Tensor) or isinstance(layout, PaddedLayout):
        return None
    own = layout if read is None else read.layout
    operands = []
    for layer in layers:
        found = layer_operands(layer, layout, own)
        if found is None:
            return None
        operands.append(found)
    norm = None if last is None else expert_norm(last, own)
    how: dict[str, Any] = {"mask": mask, "read": read, "last": norm, "impl": impl}
    return whole_layer.encoder_layers(x, operands, layout, most_rows=most_rows, **how)
