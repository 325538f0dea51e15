"""The released task models on torchscale's own BEiT3: the reference of every parity and the main baseline.

The heads restate the official fine-tuning code (facts and names only), so that their state dicts have the
official keys and torchscale does all of the work that the official release gives to it.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from beit3_fast.config import BEiT3Config
from beit3_fast.data import MaskedBatch

_SHIM: list[torch.library.Library] = []


@cache
def import_torchscale() -> tuple[Any, Any]:
    """torchscale's (EncoderConfig, BEiT3). Raises whatever its import raises.

    torchscale imports timm, and timm torchvision, whose compiled part may be made for another PyTorch than
    the one installed. Nothing of it is used here, so the two operator schemas that its Python part asks
    for are declared and it is imported again.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _import("torchvision")
        except ImportError:
            pass
        except RuntimeError:
            for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _SHIM.append(library)
        config = _import("torchscale.architecture.config").EncoderConfig
        return config, _import("torchscale.model.BEiT3").BEiT3


def _import(name: str) -> ModuleType:
    return importlib.import_module(name)


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
    """Normalised linear projections of CLS and BOS; the loss is not part of the benchmark."""

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


class Pretraining(_Headed):
    """Hidden patches and words through both heads, in three passes: images, padded pairs, padded texts.

    Takes the ``MaskedBatch`` of ``BEiT3ForPretraining`` and returns the same losses; words and patches are gathered before
    the heads, as the official captioning model does.
    """

    def __init__(self, config: BEiT3Config, num_classes: int = 8192) -> None:
        super().__init__(config)
        self.mlm_head = nn.Linear(config.embed_dim, config.vocab_size)
        self.mim_head = nn.Linear(config.embed_dim, num_classes)

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """-> cross-entropies [M] of the terms image, pair_image, pair_text and text."""
        images, pairs, texts = batch.num_images, batch.num_pairs, batch.num_texts
        passes: list[tuple[slice | None, slice | None]] = []
        if images:
            passes.append((slice(0, images), None))
        if pairs:
            passes.append((slice(images, images + pairs), slice(0, pairs)))
        if texts:
            passes.append((None, slice(pairs, pairs + texts)))
        padded = _padded_texts(batch) if pairs or texts else ()
        width = self.mlm_head.in_features
        visual, words = ([self.mlm_head.weight.new_zeros(0, width)] for _ in range(2))
        for seen, read in passes:
            text, padding, hidden = (None,) * 3 if read is None else (t[read] for t in padded)
            patches = None
            if seen is not None and batch.hidden_patches is not None:
                patches = batch.hidden_patches[seen]
            rows = self.beit3(
                textual_tokens=text,
                visual_tokens=None if seen is None or batch.images is None else batch.images[seen],
                text_padding_position=padding,
                vision_masked_position=patches,
            )["encoder_out"]
            if patches is not None:
                visual.append(rows[:, 1 : 1 + patches.shape[1]][patches])
            if hidden is not None:
                words.append(rows[:, rows.shape[1] - hidden.shape[1] :][hidden])
        patch_logits = self.mim_head(torch.cat(visual)).float()
        word_logits = self.mlm_head(torch.cat(words)).float()
        of_patches = F.cross_entropy(patch_logits, batch.codes, reduction="none")
        of_words = F.cross_entropy(word_logits, batch.words, reduction="none")
        own, own_pairs = batch.counts["image"], batch.counts["pair_text"]
        return {
            "image": of_patches[:own],
            "pair_image": of_patches[own:],
            "pair_text": of_words[:own_pairs],
            "text": of_words[own_pairs:],
        }


def _padded_texts(batch: MaskedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, padding and hidden words of all texts, [P + T, Nt] each."""
    assert batch.tokens is not None
    assert batch.hidden_words is not None
    tokens = pad_sequence(
        batch.tokens.split(batch.text_lengths), batch_first=True, padding_value=1.0
    )
    hidden = pad_sequence(batch.hidden_words.split(batch.text_lengths), batch_first=True)
    lengths = torch.tensor(batch.text_lengths)[:, None]
    return tokens, torch.arange(tokens.shape[1])[None] >= lengths, hidden


MODELS: dict[str, Any] = {
    "backbone": backbone,
    "imageclassification": ImageClassification,
    "nlvr2": VisualReasoning,
    "vqav2": VisualQuestionAnswering,
    "captioning": Captioning,
    "retrieval": Retrieval,
    "pretraining": Pretraining,
}
"""The model that each of `bench.tasks.TASKS` runs on, by the official task names."""
