"""Calls of torchscale models, and how an accelerated copy is compared with the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _compat import (
    SHAPES,
    need_torchscale,
    torchscale_model,
)
from torch import Tensor, nn

from beit3_fast.integrations.torchscale import accelerate, accelerated_status
from beit3_fast.parity import assert_parity, model_parity

need_torchscale()

CONFIG = SHAPES["base"]
BATCH, TEXT, VISION = 3, 6, 10


def pair(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    padding = torch.arange(TEXT)[None] >= torch.tensor([[6], [2], [4]])
    call = {
        "visual_tokens": torch.randn(BATCH, 3, 48, 48, generator=generator),
        "textual_tokens": torch.randint(0, 120, (BATCH, TEXT), generator=generator),
        "text_padding_position": padding,
    }
    return {name: value for name, value in {**call, **changes}.items() if value is not None}


def image() -> dict[str, Any]:
    return {"visual_tokens": pair()["visual_tokens"]}


def text() -> dict[str, Any]:
    return pair(visual_tokens=None)


def encoder_call(seed: int = 2, **changes: Any) -> dict[str, Any]:
    """Arguments of ``Encoder.forward`` for a pair of 10 + 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(BATCH, VISION + TEXT, CONFIG.embed_dim, generator=generator)
    call = {"src_tokens": None, "token_embeddings": embeddings, "multiway_split_position": VISION}
    return {**call, **changes}


def accelerated_copy(model: Any = None, impl: str = "auto") -> Any:
    return accelerate(copy.deepcopy(torchscale_model("base") if model is None else model), impl)


@torch.no_grad()
def assert_same(ours: Any, theirs: Any, call: dict[str, Any]) -> None:
    """Equal to torchscale by the rule, where there is no padding."""
    mine, truth = ours(**call), theirs(**call)
    assert set(mine) == set(truth)
    real = ~truth["encoder_padding_mask"].bool()
    for key in ("encoder_out", "encoder_embedding"):
        assert_parity(model_parity(mine[key][real], truth[key][real]), key)
    for one, other in zip(mine["encoder_states"], truth["encoder_states"], strict=True):
        assert_parity(model_parity(one[real], other[real]), "encoder_states")


def reasons(model: Any) -> tuple[str, ...]:
    return tuple(reason for s in accelerated_status(model) for reason in s.fallback_reasons)


def lora(model: Any) -> None:
    class LoraLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.1

    old = model.encoder.layers[1].self_attn.q_proj.A
    new = LoraLinear(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.encoder.layers[1].self_attn.q_proj.A = new


def class_changed(model: Any) -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    model.encoder.layers[1].ffn.A.fc2.__class__ = Half


def eps_changed(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.encoder.layers[1].get_submodule(name).eps = 0.5

    return change


def doubled_dropout(model: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model.encoder.dropout_module = Doubled()


def own_embedding(model: Any) -> None:
    real = model.encoder.forward_embedding

    def doubled(*args: Any) -> Any:
        x, embedding = real(*args)
        return 2 * x, embedding

    model.encoder.forward_embedding = doubled


def own_residual(model: Any) -> None:
    model.encoder.layers[1].residual_connection = lambda x, residual: 2 * x + residual


def encoder_class_changed(model: Any) -> None:
    class Encoder(type(model.encoder)):  # type: ignore[misc]
        def forward_embedding(self, *args: Any) -> Any:
            x, embedding = super().forward_embedding(*args)
            return 2 * x, embedding

    model.encoder.__class__ = Encoder


def attention_class_changed(model: Any) -> None:
    attention = model.encoder.layers[1].self_attn

    class MultiheadAttention(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    attention.__class__ = MultiheadAttention


def own_xpos(model: Any) -> None:
    model.encoder.layers[1].self_attn.xpos = lambda x, **_: 2 * x


def bias_removed(model: Any) -> None:
    model.encoder.layers[1].ffn.B.fc1.bias = None


def own_forward(model: Any) -> None:
    layer = model.encoder.layers[0]
    real = type(layer).forward.__get__(layer)

    def forward(x: Tensor, **kwargs: Any) -> Any:
        x, aux = real(x, **kwargs)
        return x * 1.1, aux

    layer.forward = forward


def parametrized(model: Any) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(
        model.encoder.layers[0].ffn.A.fc1, "weight", Double()
    )


def adapter(model: Any) -> None:
    layer = model.encoder.layers[1]
    layer.adapter = nn.Linear(CONFIG.embed_dim, CONFIG.embed_dim)
    own_forward(model)


def wrapped_layer(model: Any) -> None:
    """As FSDP and torch.compile do: another module in its place that hands attributes on."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return self._modules[name] if name in self._modules else getattr(self.inner, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            x, aux = self.inner(*args, **kwargs)
            return x + 1, aux

    model.encoder.layers[0] = Wrapped(model.encoder.layers[0])


def identity_norm(model: Any) -> None:
    model.encoder.layer_norm = nn.Identity()


def ffn_relu(model: Any) -> None:
    for layer in model.encoder.layers:
        layer.ffn.B.activation_fn = F.relu


def set_on_layers(name: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.encoder.layers:
            setattr(layer, name, value)

    return change


def rescaled(model: Any) -> None:
    model.encoder.layers[1].self_attn.scaling *= 1.5


def hook(register: str, path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.encoder.get_submodule(path)
        if register == "forward":
            module.register_forward_hook(lambda module, args, out: out * 1.1)
        elif register == "pre":
            module.register_forward_pre_hook(lambda module, args: tuple(1.1 * a for a in args))
        elif register == "backward":
            module.register_full_backward_hook(lambda *_: None)
        else:
            module.register_full_backward_pre_hook(lambda *_: None)

    return change
