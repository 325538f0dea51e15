"""What a visual tokenizer learns from: a teacher's features, to be told from the codes alone (VQ-KD, arXiv 2208.06366)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.data.image_data import ImageBatch
from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.model.visual_tokenizer import Distilled


@dataclass(frozen=True, repr=False)
class VisualTokenizerDistillation:
    """One minus the cosine between predicted and true features, plus ``commitment`` times the distance of the encoder's outputs
    from their codes.

    ``teacher``: images as the tokenizer gets them, [B, 3, H, W] in [-1, 1], to features [B, patches, D] of the same patches; a
    module or any function, such as a ``train.teachers.Teacher``. Raises ConfigError for a commitment that is no number of at
    least 0.
    """

    teacher: Callable[[Tensor], Tensor]
    commitment: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.commitment, (int, float)) and 0 <= self.commitment < float("inf")):
            raise ConfigError(f"commitment must be a number of at least 0, got {self.commitment!r}")

    def __repr__(self) -> str:
        """What a continuation must share, the teacher by its ``identity`` where it has one."""
        teacher = getattr(self.teacher, "identity", type(self.teacher).__name__)
        return f"VisualTokenizerDistillation({teacher!r}, commitment={self.commitment})"

    def counts(self, batch: ImageBatch) -> dict[str, int]:
        """Images of a micro-batch."""
        return {"images": batch.num_samples}

    def __call__(
        self, model: nn.Module, batch: ImageBatch, totals: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's loss; of its terms "reconstruction" and "commitment", and of "used_codes", the
        share of the codebook that a micro-batch needs."""
        with torch.no_grad():
            target = self.teacher(batch.images)
        made: Distilled = model(batch.images)
        if target.shape != made.features.shape:
            raise ShapeError(
                f"the teacher must give features {list(made.features.shape)}, a row for each patch, got "
                f"{list(target.shape)}; fit teacher_dim and patch_size of the tokenizer to it"
            )
        cosine = F.cosine_similarity(made.features.float(), target.float(), dim=-1)
        share = batch.num_samples / totals["images"]
        reconstruction = (1 - cosine).mean() * share
        commitment = made.commitment * share
        used = made.codes.unique().numel() / made.num_codes
        terms = {
            "reconstruction": reconstruction.detach(),
            "commitment": commitment.detach(),
            "used_codes": torch.tensor(used * share),
        }
        return reconstruction + self.commitment * commitment, terms
