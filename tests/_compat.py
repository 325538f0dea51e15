"""torchscale itself, at reduced size and with weights that matter: what every parity is held against."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.config import BEiT3Config
from beit3_fast.model import BEiT3
from beit3_fast.ops import library
from bench.baselines import fill, torchscale_obstacle
from bench.official_captioning import official_caption_step, reorder_cache  # noqa: F401
from bench.torchscale_heads import MODELS, import_torchscale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SMALL = BEiT3Config(
    num_layers=2, img_size=48, patch_size=16, vocab_size=120, max_text_positions=64
)
# Head counts of base and large; head widths of the released models (64) and of the giant (88).
SHAPES = {
    "base": _SMALL.replace(embed_dim=96, num_heads=12, ffn_dim=384),
    "large": _SMALL.replace(embed_dim=128, num_heads=16, ffn_dim=320, num_layers=3),
    "d64": _SMALL.replace(embed_dim=128, num_heads=2, ffn_dim=512, normalize_output=False),
    "d88": _SMALL.replace(embed_dim=176, num_heads=2, ffn_dim=200, num_layers=3),
}


def need_torchscale() -> None:
    """Skip a whole test module where torchscale is not installed; the gate's environment has it."""
    obstacle = torchscale_obstacle()
    if obstacle is not None:
        pytest.skip(f"torchscale: {obstacle}", allow_module_level=True)


def impls(*dtypes: str) -> list[Any]:
    """(impl, dtype name) parameters for every implementation, those that cannot run here skipped with the reason."""
    reason = "" if library.available() else f"cpu: the library {library.why_unavailable()}"
    skip = pytest.mark.skipif(bool(reason), reason=reason)
    pairs = [(impl, dtype) for impl in ("reference", "composite", "cpu") for dtype in dtypes]
    return [
        pytest.param(impl, dtype, marks=skip if impl == "cpu" else ())
        for impl, dtype in pairs
        if (impl, dtype) != ("cpu", "fp16")
    ]


def torchscale_args(config: BEiT3Config, **changes: Any) -> Any:
    """torchscale's EncoderConfig with the released settings, some of them changed."""
    encoder_config, _ = import_torchscale()
    settings: dict[str, Any] = {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "vocab_size": config.vocab_size,
        "multiway": True,
        "normalize_output": config.normalize_output,
        "no_output_layer": True,
        "drop_path_rate": config.drop_path_rate,
        "encoder_embed_dim": config.embed_dim,
        "encoder_attention_heads": config.num_heads,
        "encoder_ffn_embed_dim": config.ffn_dim,
        "encoder_layers": config.num_layers,
        "max_source_positions": config.max_text_positions,
        "layernorm_eps": config.layer_norm_eps,
    }
    return encoder_config(**{**settings, **changes})


def torchscale_beit3(config: BEiT3Config, **changes: Any) -> Any:
    """torchscale's BEiT3 in evaluation mode, with biases, LayerNorms and attention far from their defaults."""
    _, beit3 = import_torchscale()
    model = beit3(torchscale_args(config, **changes)).eval()
    fill(model)
    return model


@cache
def torchscale_model(shape: str, dtype: str = "fp32", img_size: int = 48) -> Any:
    """One model a shape and dtype, for tests that leave it as it is."""
    model = torchscale_beit3(SHAPES[shape].replace(img_size=img_size))
    return model.to(DTYPES[dtype])


def slim_of(model: Any, config: BEiT3Config, impl: str = "auto") -> BEiT3:
    """Our backbone with the weights of torchscale's, loaded strictly by name."""
    slim = BEiT3(config, impl).to(next(model.parameters()).dtype)
    slim.load_state_dict(model.state_dict(), strict=True)
    return slim.train(model.training)


def official_task(task: str, config: BEiT3Config, *num_classes: int) -> Any:
    """One of the released task models restated on torchscale, weights filled."""
    model = MODELS[task](config, *num_classes)
    fill(model)
    return model.eval()


def official_loss(model: Any, vision: Tensor, language: Tensor) -> Tensor:
    """The released contrastive loss on one process."""
    scale = model.logit_scale.exp()
    labels = torch.arange(len(vision))
    by_image = F.cross_entropy(scale * vision @ language.t(), labels)
    by_text = F.cross_entropy(scale * language @ vision.t(), labels)
    return (by_image + by_text) / 2
