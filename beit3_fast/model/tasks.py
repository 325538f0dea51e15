"""The five released fine-tuning models: official class names, forward signatures and parameter names.

Each computes in the last layer only the rows that its head reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.model.beit3 import BEiT3, Encoded, init_weights

_HEAD_INIT_SCALE = 0.001


class BEiT3Task(nn.Module):
    """A backbone with a head; ``config`` and ``impl`` are the backbone's."""

    def __init__(self, config: BEiT3Config, impl: str = "auto") -> None:
        super().__init__()
        self.beit3 = BEiT3(config, impl)
        self.name: str | None = None

    @property
    def config(self) -> BEiT3Config:
        """The backbone's configuration."""
        return self.beit3.config

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch rows and columns of the position table."""
        return self.beit3.grid_size

    def get_num_layers(self) -> int:
        """Encoder layers (official helper for layer-wise learning rates)."""
        return self.config.num_layers

    def no_weight_decay(self) -> set[str]:
        """Names that the official optimizer exempts from weight decay."""
        return {
            "pos_embed",
            "cls_token",
            "beit3.encoder.embed_positions.A.weight",
            "beit3.vision_embed.cls_token",
            "logit_scale",
        }

    def _init_head(self, *small: nn.Linear) -> None:
        for name, child in self.named_children():
            if name != "beit3":
                child.apply(init_weights)
        for linear in small:
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.mul_(_HEAD_INIT_SCALE)


def _text_of_all(encoded: Encoded) -> Tensor:
    """[B, C]: the first text row of every sample. Raises ShapeError where a sample has none."""
    lengths = encoded.layout.text_lengths
    if 0 in lengths:
        sample = encoded.layout.order[lengths.index(0)]
        raise ShapeError(
            f"the head reads the first text token of every sample, but the text of sample {sample} of the "
            "batch is empty or all padding"
        )
    return encoded.text()


class BEiT3ForImageClassification(BEiT3Task):
    """Mean of the patch rows, LayerNorm, linear head: image [B, 3, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: BEiT3Config, num_classes: int = 1000, impl: str = "auto") -> None:
        super().__init__(config, impl)
        self.fc_norm = nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, num_classes)
        self._init_head(self.head)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> logits [B, num_classes]."""
        encoded = self.beit3.encode(image=image)
        batch, width = encoded.layout.batch_size, encoded.rows.shape[1]
        tokens = encoded.rows.view(batch, encoded.rows.shape[0] // max(batch, 1), width)
        return self.head(self.fc_norm(tokens[:, 1:].mean(1)))


class TwoLayerMLP(nn.Module):
    """LayerNorm, linear, LayerNorm, GELU, linear, by the official names."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_features)
        self.dense1 = nn.Linear(in_features, hidden_features)
        self.norm2 = nn.LayerNorm(hidden_features)
        self.dense2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class BEiT3ForVisualReasoning(BEiT3Task):
    """Is the sentence true of the two images (NLVR2)? -> logits [B, num_classes]."""

    def __init__(self, config: BEiT3Config, num_classes: int = 2, impl: str = "auto") -> None:
        super().__init__(config, impl)
        width = config.embed_dim
        self.head = TwoLayerMLP(4 * width, 2 * width, num_classes)
        self._init_head(self.head.dense1, self.head.dense2)

    def forward(
        self, image_a: Tensor, image_b: Tensor, text_description: Tensor, padding_mask: Tensor
    ) -> Tensor:
        """Images [B, 3, H, W] each, text int64 [B, Nt], padding_mask [B, Nt], nonzero for padding."""
        if image_a.shape != image_b.shape:
            raise ShapeError(
                "image_a and image_b must have the same shape, got "
                f"{list(image_a.shape)} and {list(image_b.shape)}"
            )
        encoded = self.beit3.encode(
            torch.cat([image_a, image_b]),
            torch.cat([text_description, text_description]),
            None if padding_mask is None else torch.cat([padding_mask, padding_mask]),
            read_vision="first",
            read_text="first",
        )
        states = torch.cat([encoded.vision(), _text_of_all(encoded)], dim=1)  # [2B, 2C]
        return self.head(torch.cat(states.chunk(2), dim=1))


class Pooler(nn.Module):
    """LayerNorm, linear, tanh of one row a sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] -> [B, C]."""
        return torch.tanh(self.dense(self.norm(x)))


class BEiT3ForVisualQuestionAnswering(BEiT3Task):
    """Which of the known answers fits the question about the image? -> logits [B, num_classes]."""

    def __init__(self, config: BEiT3Config, num_classes: int = 3129, impl: str = "auto") -> None:
        super().__init__(config, impl)
        width = config.embed_dim
        self.pooler = Pooler(width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, num_classes),
        )
        self._init_head()

    def forward(self, image: Tensor, question: Tensor, padding_mask: Tensor) -> Tensor:
        """image [B, 3, H, W], question int64 [B, Nt], padding_mask [B, Nt], nonzero for padding."""
        encoded = self.beit3.encode(
            image, question, padding_mask, read_vision="first", read_text="none"
        )
        return self.head(self.pooler(encoded.vision()))


class BEiT3ForCaptioning(BEiT3Task):
    """Masked prediction of caption tokens; the text sees the image and earlier text."""

    def __init__(self, config: BEiT3Config, impl: str = "auto") -> None:
        super().__init__(config, impl)
        self.mlm_head = nn.Linear(config.embed_dim, config.vocab_size)
        self._init_head()

    def forward(
        self,
        image: Tensor | None,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        language_masked_pos: Tensor | None,
        text_len: int | None = None,
        incremental_state: dict[int, dict[str, Tensor]] | None = None,
    ) -> tuple[Tensor, dict[int, dict[str, Tensor]] | None]:
        """Predict tokens; returns (logits, incremental_state).

        image [B, 3, H, W], text_ids int64 [B, Nt], padding_mask [B, Nt], nonzero for padding. With
        ``language_masked_pos`` [B, Nt] logits are [masked, V], else [B, Nt, V]. Decoding: the first call has the
        image and an empty ``incremental_state``; later calls have ``image=None``, the last word and a mask token
        as ``text_ids`` [B, 2], and ``text_len``, the length of the text so far including both.
        """
        if incremental_state is not None or image is None:
            return self._decode(
                image, text_ids, padding_mask, language_masked_pos, text_len, incremental_state
            )
        encoded = self.beit3.encode(
            image,
            text_ids,
            padding_mask,
            mask="seq2seq",
            read_vision="none",
            read_text="all" if language_masked_pos is None else language_masked_pos,
        )
        if language_masked_pos is not None:
            return self.mlm_head(self._caller_order(encoded)), None
        features = encoded.rows
        kept = torch.ones_like(text_ids, dtype=torch.bool)
        if padding_mask is not None:
            kept = ~padding_mask.bool()
        order = torch.tensor(encoded.layout.order, device=text_ids.device)
        places = torch.arange(text_ids.numel(), device=text_ids.device).view_as(text_ids)
        padded = features.new_zeros(text_ids.numel(), features.shape[1])
        padded = padded.index_copy(0, places[order][kept[order]], features)
        return self.mlm_head(padded.view(*text_ids.shape, -1)), None

    def _caller_order(self, encoded: Any) -> Tensor:
        """Text rows sorted by the caller's samples, as indexing with the mask would give them."""
        order = encoded.layout.order
        if order == tuple(range(len(order))):
            return encoded.rows
        return encoded.rows[encoded.layout.sample_of_row.argsort(stable=True)]

    def _decode(
        self,
        image: Tensor | None,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        language_masked_pos: Tensor | None,
        text_len: int | None,
        state: dict[int, dict[str, Tensor]] | None,
    ) -> tuple[Tensor, dict[int, dict[str, Tensor]] | None]:
        if state is None:
            raise ConfigError("a caption step without an image needs incremental_state")
        for index in range(self.get_num_layers()):
            state.setdefault(index, {})
        new, length = text_ids.shape[1], text_len or text_ids.shape[1]
        num_image = self.config.num_vision_tokens
        if image is not None:
            rows, columns = self.beit3.vision_embed.grid_size(image)
            num_image = rows * columns + 1
        elif "prev_key" in state[0]:
            num_image = state[0]["prev_key"].shape[2] + new - length
        device = text_ids.device
        total = num_image + length
        blocked = torch.ones(total, total, dtype=torch.bool, device=device)
        blocked[:, :num_image] = False
        blocked[num_image:, num_image:] = ~torch.ones(
            length, length, dtype=torch.bool, device=device
        ).tril()
        positions = None
        if image is None:
            blocked = blocked[-new:]
            padding_mask = None
            # The offset of two rows in the position table equals the two tokens that a step feeds.
            positions = torch.arange(length, length + new, device=device)[None]
        outputs = self.beit3(
            text_ids,
            image,
            padding_mask,
            attn_mask=blocked,
            incremental_state=state,
            positions=positions,
        )
        features = outputs["encoder_out"]
        if image is not None:
            features = features[:, num_image:]
        if language_masked_pos is not None:
            features = features[language_masked_pos.bool()]
        return self.mlm_head(features), state


class BEiT3ForRetrieval(BEiT3Task):
    """Image and text embeddings in one space, and the contrastive loss between them."""

    def __init__(self, config: BEiT3Config, impl: str = "auto") -> None:
        super().__init__(config, impl)
        width = config.embed_dim
        self.language_head = nn.Linear(width, width, bias=False)
        self.vision_head = nn.Linear(width, width, bias=False)
        self._init_head()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        image: Tensor | None = None,
        text_description: Tensor | None = None,
        padding_mask: Tensor | None = None,
        only_infer: bool = False,
    ) -> tuple[Any, ...]:
        """(vision [B, C], language [B, C]), each None without its input; the loss comes first unless only_infer.

        image [B, 3, H, W]; text_description int64 [B, Nt]; padding_mask [B, Nt], nonzero for padding. The
        embeddings have unit length. Under torch.distributed the loss compares with every rank's batch.
        """
        vision = language = None
        if image is not None:
            encoded = self.beit3.encode(image=image, read_vision="first")
            vision = F.normalize(self.vision_head(encoded.vision()), dim=-1)
        if text_description is not None:
            encoded = self.beit3.encode(
                text=text_description, text_padding=padding_mask, read_text="first"
            )
            language = F.normalize(self.language_head(_text_of_all(encoded)), dim=-1)
        if only_infer:
            return vision, language
        if vision is None or language is None:
            raise ShapeError(
                "the contrastive loss needs an image and a text; pass only_infer=True for one of them"
            )
        return contrastive_loss(vision, language, self.logit_scale.exp()), vision, language


def contrastive_loss(vision: Tensor, language: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross entropy between matching rows of [B, C] embeddings, over the batches of all ranks."""
    all_vision, all_language, first = vision, language, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.nn.functional import all_gather

        first = torch.distributed.get_rank() * vision.shape[0]
        all_vision, all_language = torch.cat(all_gather(vision)), torch.cat(all_gather(language))
    labels = torch.arange(vision.shape[0], device=vision.device) + first
    to_text = F.cross_entropy(scale * vision @ all_language.T, labels)
    to_image = F.cross_entropy(scale * language @ all_vision.T, labels)
    return (to_text + to_image) / 2
