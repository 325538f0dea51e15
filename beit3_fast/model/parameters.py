"""The parameters of the encoder by their official names; model/encoder.py computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from beit3_fast.config import BEiT3Config
from beit3_fast.model.encoder import Layer
from beit3_fast.model.stack import Stack, set_recompute

EXPERT_OF = {"vision": "A", "text": "B"}


class Multiway(nn.Module):
    """One module per expert, named A (vision), B (text) and, for pairs, C; a holder of parameters."""

    def __init__(self, **experts: nn.Module) -> None:
        super().__init__()
        for name, module in experts.items():
            self.add_module(name, module)


def multiway(names: Sequence[str], make: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A Multiway of ``make(*args, **kwargs)`` modules, or one bare module where names is empty."""
    if not names:
        return make(*args, **kwargs)
    return Multiway(**{name: make(*args, **kwargs) for name in names})


class Attention(nn.Module):
    """Parameters of joint attention: four projections and the sub-LayerNorm in front of the last."""

    def __init__(self, config: BEiT3Config, names: Sequence[str]) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.k_proj = multiway(names, nn.Linear, width, width)
        self.v_proj = multiway(names, nn.Linear, width, width)
        self.q_proj = multiway(names, nn.Linear, width, width)
        self.out_proj = multiway(names, nn.Linear, width, width)
        self.inner_attn_ln = multiway(names, nn.LayerNorm, width, config.layer_norm_eps)


class FeedForward(nn.Module):
    """Parameters of one feed-forward expert."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)
        self.ffn_layernorm = nn.LayerNorm(config.ffn_dim, config.layer_norm_eps)


class EncoderLayer(Layer):
    """Parameters of one layer; ``encoder_layer`` computes it."""

    def __init__(self, config: BEiT3Config, depth: int) -> None:
        super().__init__()
        own = [EXPERT_OF[modality] for modality in config.modalities]
        attention = own if config.attention == "decoupled" else []
        fused = len(own) == 2 and depth >= config.num_layers - config.vl_expert_layers
        experts = [*own, "C"] if fused else own
        width, eps = config.embed_dim, config.layer_norm_eps
        self.self_attn = Attention(config, attention)
        self.self_attn_layer_norm = multiway(attention, nn.LayerNorm, width, eps)
        self.ffn = multiway(experts, FeedForward, config)
        self.final_layer_norm = multiway(experts, nn.LayerNorm, width, eps)


class Encoder(Stack):
    """Parameters of the encoder: position tables, layers, output LayerNorm."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        own = [EXPERT_OF[modality] for modality in config.modalities]
        tables = {
            "A": config.num_vision_tokens + 2,
            "B": config.max_text_positions,
        }
        self.embed_positions = Multiway(
            **{name: nn.Embedding(tables[name], config.embed_dim) for name in own}
        )
        self.layers = nn.ModuleList(
            [EncoderLayer(config, depth) for depth in range(config.num_layers)]
        )
        self.layer_norm = (
            multiway(own, nn.LayerNorm, config.embed_dim, config.layer_norm_eps)
            if config.normalize_output
            else None
        )
        if config.checkpoint_activations:
            set_recompute(self, "layer")
        steps = max(config.num_layers - 1, 1)
        self.drop_path_rates = tuple(
            config.drop_path_rate * depth / steps for depth in range(config.num_layers)
        )

    def in_order(self) -> nn.ModuleList:
        """See Stack."""
        return self.layers
