"""The training of a visual tokenizer as a TOML file: tokenizer, teacher, images, loss and training, every field by its Python name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from beit3_fast.checkpoint import load_checkpoint
from beit3_fast.data import Augment
from beit3_fast.data.image_data import ImageData
from beit3_fast.data.image_files import list_images
from beit3_fast.errors import ConfigError
from beit3_fast.model.visual_tokenizer import (
    VisualTokenizer,
    create_visual_tokenizer,
    visual_tokenizer_config,
)
from beit3_fast.train.distillation import VisualTokenizerDistillation
from beit3_fast.train.initial import start_of
from beit3_fast.train.options import TrainOptions
from beit3_fast.train.recipe_file import (
    check_apart,
    check_count,
    names_of,
    read_sections,
    read_tables,
)
from beit3_fast.train.teachers import Teacher, TeacherOptions


@dataclass(frozen=True)
class Images:
    """``[data]`` and ``[held_out]``: files, folders or index files, paths counted from the recipe's folder.

    ``batch_size``: images of a micro-batch; ``batches``: how many of ``[held_out]`` are looked at in the end.
    """

    images: str | Sequence[str] = ()
    batch_size: int = 64
    batches: int = 8

    def __post_init__(self) -> None:
        check_count("batches", self.batches, 1)

    def under(self, folder: Path) -> list[str]:
        """Paths of the images. Raises ConfigError for what is no list of names, InputError where there are none."""
        names = names_of(self.images, "images", "a file, a folder")
        return list_images([folder / name for name in names])


@dataclass(frozen=True)
class Loss:
    """``[loss]``: see ``train.distillation``."""

    commitment: float = 1.0


@dataclass(frozen=True)
class TokenizerRecipe:
    """What a file says. ``model`` has the ``name`` of a visual tokenizer, fields of VisualTokenizerConfig, ``impl``, ``device`` and
    ``checkpoint`` (weights to begin with); the width of the teacher's features need not be said."""

    folder: Path
    model: dict[str, Any]
    teacher: TeacherOptions
    data: Images = field(default_factory=Images)
    held_out: Images | None = None
    augment: Augment = field(default_factory=Augment)
    loss: Loss = field(default_factory=Loss)
    train: TrainOptions = field(default_factory=TrainOptions)

    def make_teacher(self) -> Teacher:
        """Raises ConfigError and CheckpointError."""
        return self.teacher.make(self.folder, self.model.get("device", "cpu"))

    def make_tokenizer(self, teacher: Teacher) -> VisualTokenizer:
        """The tokenizer, its weights drawn with ``train.seed`` or read. Raises ConfigError and CheckpointError."""
        options = dict(self.model)
        checkpoint, device = options.pop("checkpoint", None), options.pop("device", "cpu")
        name, impl = options.pop("name"), options.pop("impl", "auto")
        pixels = visual_tokenizer_config(name, **options).img_size
        options["teacher_dim"] = teacher(torch.zeros(1, 3, pixels, pixels, device=device)).shape[-1]
        torch.manual_seed(self.train.seed)
        tokenizer = create_visual_tokenizer(name, device=device, impl=impl, **options)
        if checkpoint is not None:
            load_checkpoint(tokenizer, self.folder / checkpoint)
        return tokenizer

    def start(self) -> dict[str, str]:
        """What the first weights are made of, for ``train``."""
        checkpoint = self.model.get("checkpoint")
        return start_of(None if checkpoint is None else self.folder / checkpoint)

    def make_data(self, tokenizer: VisualTokenizer) -> ImageData:
        """The run's micro-batches."""
        return self._images(tokenizer, self.data, self.train.seed, self.augment)

    def make_held_out(self, tokenizer: VisualTokenizer) -> ImageData | None:
        """Batches that are never trained on, where the recipe names any. Raises ConfigError for images that are."""
        if self.held_out is None:
            return None
        check_apart(self.held_out.under(self.folder), self.data.under(self.folder))
        return self._images(tokenizer, self.held_out, self.train.seed + 1, None)

    def make_objective(self, teacher: Teacher) -> VisualTokenizerDistillation:
        """What is minimised."""
        return VisualTokenizerDistillation(teacher, self.loss.commitment)

    def _images(
        self, tokenizer: VisualTokenizer, own: Images, seed: int, augment: Augment | None
    ) -> ImageData:
        pixels, paths = tokenizer.config.img_size, own.under(self.folder)
        return ImageData(paths, own.batch_size, pixels, tokenizer.preset, seed, augment)


SECTIONS: dict[str, Any] = {
    "teacher": TeacherOptions,
    "data": Images,
    "held_out": Images,
    "augment": Augment,
    "loss": Loss,
    "train": TrainOptions,
}


def read_tokenizer_recipe(path: str | PathLike[str]) -> TokenizerRecipe:
    """A recipe from a TOML file. Raises ConfigError for what cannot be read or is not known, with what is."""
    path = Path(path)
    made = read_sections(
        path, read_tables(path), SECTIONS, "vqkd_encoder_base_decoder_3x768x12_clip"
    )
    if "teacher" not in made:
        raise ConfigError(f"{path}: a tokenizer learns from a teacher; add a section [teacher]")
    return TokenizerRecipe(path.parent, **made)
