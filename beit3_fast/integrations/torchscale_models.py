"""The released task models on torchscale's own BEiT3: what this package is held against, and its main baseline.

The heads restate the official fine-tuning code (facts and names only), so that their state dicts have the
official keys and torchscale does all of the work that the official release gives to it. ``accelerate`` needs none
of this: it takes the user's own model.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.errors import ConfigError

_INSTALL = "pip install --no-deps torchscale==0.3.0 fairscale timm torchvision"


@cache
def import_torchscale() -> tuple[Any, Any]:
    """torchscale's (EncoderConfig, BEiT3). Raises ConfigError, with the mend, where it does not import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = import_module("torchscale.architecture.config").EncoderConfig
            return config, import_module("torchscale.model.BEiT3").BEiT3
        except ModuleNotFoundError as error:
            raise ConfigError(f"torchscale is needed, and {error}; {_INSTALL}") from error
        # a torchvision that was built for another torch raises RuntimeError
        except Exception as error:
            raise ConfigError(
                f"torchscale does not import ({type(error).__name__}: {error}); it imports timm, and that torchvision, "
                f"which must be the one built for torch {torch.__version__}"
            ) from error


def backbone(config: BEiT3Config) -> Any:
    """torchscale's BEiT3 with the released settings, in evaluation mode."""
    encoder_config, beit3 = import_torchscale()
    args = encoder_config(
        img_size=config.img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        vocab_size=config.vocab_size,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=config.normalize_output,
        no_output_layer=True,
        drop_path_rate=config.drop_path_rate,
        encoder_embed_dim=config.embed_dim,
        encoder_attention_heads=config.num_heads,
        encoder_ffn_embed_dim=config.ffn_dim,
        encoder_layers=config.num_layers,
        max_source_positions=config.max_text_positions,
        layernorm_eps=config.layer_norm_eps,
    )
    return beit3(args).eval()


class _Headed(nn.Module):
    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.beit3 = backbone(config)

    def states(self, image: Tensor | None, text: Tensor | None, padding: Tensor | None) -> Any:
        """torchscale's output dictionary."""
        return self.beit3(textual_tokens=text, visual_tokens=image, text_padding_position=padding)


class ImageClassification(_Headed):
    """Mean of the patch rows, LayerNorm, linear."""

    def __init__(self, config: BEiT3Config, num_classes: int = 1000) -> None:
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, classes]."""
        x = self.states(image, None, None)["encoder_out"]
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1)))


class _TwoLayerMLP(nn.Module):
    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.dense1 = nn.Linear(width, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.dense2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class VisualReasoning(_Headed):
    """CLS and BOS of both passes, two-layer head."""

    def __init__(self, config: BEiT3Config, num_classes: int = 2) -> None:
        super().__init__(config)
        self.head = _TwoLayerMLP(4 * config.embed_dim, 2 * config.embed_dim, num_classes)

    def forward(
        self, image_a: Tensor, image_b: Tensor, text_description: Tensor, padding_mask: Tensor
    ) -> Tensor:
        """-> [B, classes]."""
        batch = len(image_a)
        out = self.states(
            torch.cat((image_a, image_b)),
            torch.cat((text_description, text_description)),
            torch.cat((padding_mask, padding_mask)),
        )
        x, split = out["encoder_out"], out["multiway_split_position"]
        both = torch.cat((x[:, 0], x[:, split]), dim=-1)
        return self.head(torch.cat((both[:batch], both[batch:]), dim=-1))


class _Pooler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(x[:, 0])))


class VisualQuestionAnswering(_Headed):
    """CLS through a pooler and a two-layer head."""

    def __init__(self, config: BEiT3Config, num_classes: int = 3129) -> None:
        super().__init__(config)
        width = config.embed_dim
        self.pooler = _Pooler(width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, num_classes),
        )

    def forward(self, image: Tensor, question: Tensor, padding_mask: Tensor) -> Tensor:
        """-> [B, classes]."""
        return self.head(self.pooler(self.states(image, question, padding_mask)["encoder_out"]))


class Captioning(_Headed):
    """Vocabulary head on the caption rows, which see the image and earlier words; no decoding here."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__(config)
        self.mlm_head = nn.Linear(config.embed_dim, config.vocab_size)

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        padding_mask: Tensor,
        language_masked_pos: Tensor | None,
    ) -> tuple[Tensor, None]:
        """-> ([B, Nt, V], or [masked, V] with `language_masked_pos`, None)."""
        vision, text = self.beit3.vision_embed.num_position_embeddings(), text_ids.shape[1]
        seen = torch.zeros(vision + text, vision + text, dtype=torch.long, device=text_ids.device)
        seen[:, :vision] = 1
        seen[vision:, vision:] = torch.ones(text, text, dtype=torch.long).tril()
        out = self.beit3(
            textual_tokens=text_ids,
            visual_tokens=image,
            text_padding_position=padding_mask,
            attn_mask=1 - seen,
        )
        rows = out["encoder_out"][:, vision:]
        if language_masked_pos is not None:
            rows = rows[language_masked_pos.bool()]
        return self.mlm_head(rows), None


class Retrieval(_Headed):
    """Normalised linear projections of CLS and BOS; without the loss."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__(config)
        self.language_head = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        self.vision_head = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        image: Tensor | None = None,
        text_description: Tensor | None = None,
        padding_mask: Tensor | None = None,
        only_infer: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """-> (vision [B, C] or None, language [B, C] or None)."""
        vision = language = None
        if image is not None:
            x = self.states(image, None, None)["encoder_out"]
            vision = F.normalize(self.vision_head(x[:, 0]), dim=-1)
        if text_description is not None:
            x = self.states(None, text_description, padding_mask)["encoder_out"]
            language = F.normalize(self.language_head(x[:, 0]), dim=-1)
        return vision, language


MODELS: dict[str, Any] = {
    "backbone": backbone,
    "imageclassification": ImageClassification,
    "nlvr2": VisualReasoning,
    "vqav2": VisualQuestionAnswering,
    "captioning": Captioning,
    "retrieval": Retrieval,
}
"""By the official task names; each takes a BEiT3Config, and the number of classes where there are some."""
