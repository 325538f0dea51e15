"""Teachers of a visual tokenizer: frozen models whose features of patches it learns to name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.checkpoint import load_checkpoint, read_checkpoint
from beit3_fast.config import BEiT3Config
from beit3_fast.data.digest import digest_of_tensors
from beit3_fast.data.presets import ImagePreset
from beit3_fast.errors import CheckpointError, ConfigError
from beit3_fast.model import BEiT3, create_model


@dataclass(frozen=True)
class TeacherOptions:
    """``[teacher]``: a model of ours, which ``checkpoint`` names by itself where we wrote it and ``model`` names for official
    files; or ``timm``, a model of that library, with weights from ``checkpoint`` or, with ``pretrained``, from where it gets them.
    ``project`` puts timm's head behind every patch, as the published tokenizers do with CLIP. Raises ConfigError unless it is
    one of the two."""

    model: str | None = None
    checkpoint: str | None = None
    timm: str | None = None
    pretrained: bool = False
    project: bool = False

    def __post_init__(self) -> None:
        of_timm, of_ours = self.timm is not None, self.model is not None
        if (of_timm and of_ours) or not (of_timm or of_ours or self.checkpoint is not None):
            raise ConfigError(
                'a teacher is needed: checkpoint = "file" (of ours, with model = "name" for official files), or '
                'timm = "name"'
            )

    def make(self, folder: Path, device: str | torch.device = "cpu") -> Teacher:
        """The teacher; files count from ``folder``. Raises ConfigError and CheckpointError."""
        file = None if self.checkpoint is None else folder / self.checkpoint
        if self.timm is not None:
            return timm_teacher(self.timm, file, self.pretrained, self.project, device)
        return backbone_teacher(file, self.model, device)


class Teacher:
    """images [B, 3, H, W] in [-1, 1] -> features [B, patches, D] of a frozen model.

    ``features`` takes images normalised by ``mean`` and ``std``; ``identity`` tells this teacher from others.
    """

    def __init__(
        self,
        module: nn.Module,
        features: Callable[[Tensor], Tensor],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        identity: str,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.features = features
        self.identity = identity
        place = next(module.parameters()).device
        self._mean, self._std = (
            torch.tensor(own, device=place)[:, None, None] for own in (mean, std)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of every patch, row by row."""
        return self.features(((images + 1) / 2 - self._mean) / self._std)


def backbone_teacher(
    checkpoint: Path | None, name: str | None = None, device: str | torch.device = "cpu"
) -> Teacher:
    """The patch rows of a BEiT-3's output. Raises ConfigError where neither name nor file says which model it is."""
    source = None if checkpoint is None else read_checkpoint(checkpoint)
    if source is not None and source.config is not None:
        backbone = BEiT3(BEiT3Config.from_dict(source.config))
        load_checkpoint(backbone, source)
        preset = source.preset
    elif name is not None:
        model = create_model(name, checkpoint)
        backbone, preset = model.backbone, model.preset
    else:
        raise ConfigError(f"{checkpoint} does not say which model it is; name it with model = ...")
    backbone = backbone.to(device)

    def features(images: Tensor) -> Tensor:
        rows = backbone.encode(image=images).rows
        return rows.view(len(images), -1, rows.shape[1])[:, 1:]

    own = ImagePreset.get(preset or "square")
    identity = f"{name} {digest_of_tensors(backbone.state_dict().items())}"
    return Teacher(backbone, features, own.mean, own.std, identity)


def timm_teacher(
    name: str,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    project: bool = False,
    device: str | torch.device = "cpu",
) -> Teacher:
    """The patch rows of a vision transformer of timm. Raises ConfigError without timm, or for a model that has none."""
    try:
        import timm
    # A package that was built for another torch fails in ways of its own.
    except Exception as error:
        raise ConfigError(
            f"a teacher of timm needs that package, which does not import ({error}); pip install timm"
        ) from error
    try:
        model: Any = timm.create_model(name, pretrained=pretrained)
        if checkpoint is not None:
            model.load_state_dict(read_checkpoint(checkpoint).state)
    except CheckpointError:
        raise
    except Exception as error:
        raise ConfigError(f"timm cannot make {name!r}: {error}") from error
    first = getattr(model, "num_prefix_tokens", None)
    if first is None:
        raise ConfigError(
            f"the teacher {name!r} has no rows for patches; take a vision transformer"
        )
    model = model.to(device)

    def features(images: Tensor) -> Tensor:
        rows = model.forward_features(images)[:, first:]
        return model.head(rows) if project else rows

    own = model.pretrained_cfg
    identity = f"timm {name} {project} {digest_of_tensors(model.state_dict().items())}"
    return Teacher(model, features, own["mean"], own["std"], identity)
