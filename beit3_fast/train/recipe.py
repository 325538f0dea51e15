"""A pretraining run as a TOML file: model, data, mix, masking, loss and training, every field by its Python name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from beit3_fast.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from beit3_fast.checkpoint.lock import make_folder
from beit3_fast.config import BEiT3Config
from beit3_fast.data import Augment, Masking, Processor, Tokenizer, preprocess_image
from beit3_fast.data.digest import digest_of
from beit3_fast.data.index_files import KINDS, check_ids, names_of_images, read_index
from beit3_fast.data.mixed import Mix, MixedData
from beit3_fast.data.patch_codes import PatchCodes
from beit3_fast.errors import ConfigError
from beit3_fast.model import BEiT3ForPretraining, create_model
from beit3_fast.train.initial import Initial, start_of
from beit3_fast.train.objective import MaskedDataModelling
from beit3_fast.train.options import TrainOptions
from beit3_fast.train.recipe_file import (
    check_apart,
    check_count,
    check_name,
    names_of,
    read_sections,
    read_tables,
)
from beit3_fast.train.visual_tokens import visual_tokens_for

# Ids of the official tokenizer, whose models have a few embeddings more.
_OFFICIAL_IDS = 64002


@dataclass(frozen=True)
class Sources:
    """``[data]`` and ``[held_out]``: official index files by kind, paths counted from the recipe's folder.

    ``tokenizer`` is a SentencePiece file and ``max_length`` the most tokens of a text; ``[held_out]`` needs neither. ``keep_images``: so
    many decoded images stay in memory, for small data without ``[augment]``.
    ``batches``: how many of ``[held_out]`` are predicted at the end.
    """

    image: Sequence[str] = ()
    text: Sequence[str] = ()
    pair: Sequence[str] = ()
    tokenizer: str | None = None
    max_length: int = 64
    keep_images: int = 0
    batches: int = 8

    def __post_init__(self) -> None:
        for name, least in (("max_length", 3), ("keep_images", 0), ("batches", 1)):
            check_count(name, getattr(self, name), least)
        check_name("tokenizer", self.tokenizer)

    def under(self, folder: Path) -> dict[str, list[Path]]:
        """The index files by kind. Raises ConfigError for what is no list of names."""
        own = {kind: names_of(getattr(self, kind), kind, "an index file") for kind in KINDS}
        return {kind: [folder / name for name in names] for kind, names in own.items()}


@dataclass(frozen=True)
class Codes:
    """``[codes]``: visual tokens by k-means over the patches of ``images`` images, see ``data.patch_codes``; or by ``tokenizer``, the
    file of a visual tokenizer; or from ``cache``, a file of ``tokenize-images``, which is the fastest. Files count from the recipe's
    folder. With both the codes must be that tokenizer's."""

    images: int = 300
    tokenizer: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        check_count("images", self.images, 1)
        check_name("tokenizer", self.tokenizer)
        check_name("cache", self.cache)


@dataclass(frozen=True)
class Recipe:
    """What a file says. ``model`` has the entrypoint's ``name``, fields of BEiT3Config, ``num_classes`` (the visual tokens),
    ``impl``, ``device`` and ``checkpoint`` (weights to begin with, such as an official file)."""

    folder: Path
    model: dict[str, Any] = field(default_factory=dict)
    data: Sources = field(default_factory=Sources)
    held_out: Sources | None = None
    mix: Mix = field(default_factory=lambda: Mix(16, 16, 16))
    codes: Codes = field(default_factory=Codes)
    masking: Masking = field(default_factory=Masking)
    augment: Augment = field(default_factory=Augment)
    loss: MaskedDataModelling = field(default_factory=MaskedDataModelling)
    initial: Initial = field(default_factory=Initial)
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        if self.codes.cache is not None and self.augment != Augment():
            raise ConfigError(
                "[codes] cache has codes of whole images, not of those that [augment] changes; leave augment out, or name "
                "a tokenizer, which then makes the codes"
            )

    def make_model(self) -> BEiT3ForPretraining:
        """The model, its weights drawn with ``train.seed`` or read. Raises ConfigError and CheckpointError."""
        options = dict(self.model)
        name, checkpoint = options.pop("name", None), options.pop("checkpoint", None)
        tokenizer = self._tokenizer()
        if tokenizer is not None:
            options.setdefault("vocab_size", embeddings_for(tokenizer))
        torch.manual_seed(self.train.seed)
        model: Any = create_model(name, **options)
        if not isinstance(model, BEiT3ForPretraining):
            raise ConfigError(f"[model] name must end in _pretraining, got {name!r}")
        self.initial.draw(model)
        if checkpoint is not None:
            load_checkpoint(model, self.folder / checkpoint, allow_missing=("mim_head", "mlm_head"))
        return model

    def start(self) -> dict[str, str]:
        """What the first weights are made of, for ``train``."""
        checkpoint = self.model.get("checkpoint")
        return start_of(None if checkpoint is None else self.folder / checkpoint, self.initial)

    def make_data(self, model: BEiT3ForPretraining, out: Path) -> MixedData:
        """The run's micro-batches; the codes of patches are kept in ``out``/codes.safetensors.

        Raises ConfigError, InputError and CheckpointError.
        """
        _check_modalities(self.mix, model.config.modalities)
        sources = self.data.under(self.folder)
        codes = None
        if self.mix.image or self.mix.pair:
            codes = self._codes(model, sources, out)
        return self._mixed(model, sources, codes, self.train.seed, self.augment)

    def make_held_out(self, model: BEiT3ForPretraining, data: MixedData) -> MixedData | None:
        """Batches of images that are never trained on, where the recipe names any, with the codes of ``data``.

        Raises ConfigError for images that are trained on.
        """
        if self.held_out is None:
            return None
        sources = self.held_out.under(self.folder)
        held_out = self._mixed(model, sources, data.visual_tokens, self.train.seed + 1, None)
        check_apart(_image_files(held_out), _image_files(data))
        return held_out

    def _mixed(
        self, model: Any, sources: Any, codes: Any, seed: int, augment: Augment | None
    ) -> MixedData:
        processor = self._processor(model)
        patch = model.config.patch_size
        data = MixedData(
            sources,
            self.mix,
            processor,
            codes,
            patch,
            self.masking,
            seed,
            augment,
            self.data.keep_images if augment else 0,
        )
        for rows in data.rows.values():
            check_ids((row.text for row in rows), model.config.vocab_size)
        return data

    def _processor(self, model: Any) -> Processor:
        return Processor.for_model(model, self._tokenizer(), max_length=self.data.max_length)

    def _tokenizer(self) -> Tokenizer | None:
        name = self.data.tokenizer
        return None if name is None else Tokenizer(self.folder / name)

    def _codes(self, model: Any, sources: dict[str, list[Path]], out: Path) -> Any:
        if self.codes.tokenizer is not None or self.codes.cache is not None:
            return visual_tokens_for(
                model, self._processor(model), self.folder, self.codes.tokenizer, self.codes.cache
            )
        kept, patch = out / "codes.safetensors", model.config.patch_size
        kind = "image" if self.mix.image else "pair"
        rows = [row for path in sources[kind] for row in read_index(path, kind)]
        names = [row.image for row in rows[: self.codes.images] if row.image is not None]
        processor, number, seed = (
            self._processor(model),
            model.mim_head.out_features,
            self.train.seed,
        )
        how = (processor.image_size, processor.preset, number, patch, seed)
        made_of = digest_of(repr((names_of_images(names), how)))
        if kept.exists():
            return _kept_codes(kept, made_of, patch)
        images = [preprocess_image(name, processor.image_size, processor.preset) for name in names]
        codes = PatchCodes.fit(images, number, patch, seed)
        make_folder(out)
        save_checkpoint({"centres": codes.centres}, kept, metadata={"made_of": made_of})
        return codes


def _check_modalities(mix: Mix, modalities: tuple[str, ...]) -> None:
    """Raises ConfigError for samples of which the model cannot take a part."""
    for modality, part, kinds in (
        ("vision", "images", ("image", "pair")),
        ("text", "texts", ("text", "pair")),
    ):
        named = [kind for kind in kinds if getattr(mix, kind)]
        if named and modality not in modalities:
            raise ConfigError(
                f"a model of modalities {json.dumps(modalities)} takes no {part}, but [mix] has samples of {', '.join(named)}; "
                "leave them out of [mix], or modalities out of [model]"
            )


def _kept_codes(kept: Path, made_of: str, patch: int) -> PatchCodes:
    """Those of an earlier call. Raises ConfigError where they are of other images, or of another number, size or seed."""
    read = read_checkpoint(kept)
    if read.metadata.get("made_of") != made_of:
        raise ConfigError(
            f"{kept} has codes of another recipe: of other images, or of another number, size of patches or seed; "
            "give another folder, or remove the file if no run in this one needs it"
        )
    return PatchCodes(read.state["centres"], patch)


def embeddings_for(tokenizer: Tokenizer) -> int:
    """Rows of the text embedding: a tokenizer's ids, and the few unused ones of the official models."""
    ids = tokenizer.vocab_size
    return BEiT3Config().vocab_size if ids == _OFFICIAL_IDS else ids


SECTIONS: dict[str, Any] = {
    "data": Sources,
    "held_out": Sources,
    "mix": Mix,
    "codes": Codes,
    "masking": Masking,
    "augment": Augment,
    "loss": MaskedDataModelling,
    "initial": Initial,
    "train": TrainOptions,
}


def _image_files(data: MixedData) -> list[str]:
    return [row.image for rows in data.rows.values() for row in rows if row.image is not None]


def read_recipe(path: str | PathLike[str]) -> Recipe:
    """A recipe from a TOML file. Raises ConfigError for what cannot be read or is not known, with what is."""
    path = Path(path)
    example = "beit3_base_patch16_224_pretraining"
    return Recipe(path.parent, **read_sections(path, read_tables(path), SECTIONS, example))
