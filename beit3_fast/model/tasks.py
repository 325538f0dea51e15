"""Three of the released fine-tuning models: official class names, forward signatures and parameter names.

Each computes in the last layer only the rows that its head reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.errors import ShapeError
from beit3_fast.model.task import BEiT3Task, text_of_all


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
        states = torch.cat([encoded.vision(), text_of_all(encoded)], dim=1)  # [2B, 2C]
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

    def _pools_first(self, kind: str) -> bool:
        return kind == "pair"

    def _pooled(self, kind: str, rows: Tensor) -> Tensor:
        return self.pooler(rows)
