"""A fine-tuning run as a TOML file: model, data, loss and training, every field by its Python name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from beit3_fast.checkpoint import LoadReport, load_checkpoint
from beit3_fast.checkpoint.keys import HEADS
from beit3_fast.data import Augment, Processor, Tokenizer, read_labels
from beit3_fast.data.index_files import check_ids
from beit3_fast.data.paired import PairedData, PairedRow, read_paired
from beit3_fast.errors import ConfigError
from beit3_fast.model import create_model
from beit3_fast.model.registry import TASKS
from beit3_fast.train.downstream import DOWNSTREAM, Downstream
from beit3_fast.train.initial import Initial, start_of
from beit3_fast.train.options import TrainOptions
from beit3_fast.train.recipe import embeddings_for
from beit3_fast.train.recipe_file import (
    check_apart,
    check_count,
    check_name,
    names_of,
    read_sections,
    read_tables,
)


@dataclass(frozen=True)
class TaskSources:
    """``[data]``: official index files of the task, paths counted from the recipe's folder.

    ``tokenizer`` is a SentencePiece file, ``max_length`` the most tokens of a text, ``batch_size`` the samples of a
    micro-batch. ``keep_images``: so many decoded images stay in memory, for small data without ``[augment]``.
    ``answers``: the official answer2label.txt, where the model has classes; their number is then the default
    of ``[model] num_classes``. ``epochs`` and ``warmup_epochs``, counted in samples, take the place of ``[train]`` steps and
    warmup_steps. Raises ConfigError for values that make no sense.
    """

    index: str | Sequence[str] = ()
    tokenizer: str | None = None
    max_length: int = 64
    batch_size: int = 32
    keep_images: int = 0
    answers: str | None = None
    epochs: float | None = None
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        _check_index(self.index)
        check_count("max_length", self.max_length, 3)
        check_count("keep_images", self.keep_images, 0)
        check_name("tokenizer", self.tokenizer)
        check_name("answers", self.answers)
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ConfigError(f"batch_size must be a positive integer, got {self.batch_size!r}")
        for name in ("epochs", "warmup_epochs"):
            value = getattr(self, name)
            known = isinstance(value, (int, float)) and 0 <= value < math.inf
            if not known and (name, value) != ("epochs", None):
                raise ConfigError(f"{name} must be a number of at least 0, got {value!r}")
        if self.epochs == 0:
            raise ConfigError("epochs must be above 0, got 0; leave it out to count [train] steps")
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs must be below epochs, {self.epochs}, got {self.warmup_epochs}"
            )


@dataclass(frozen=True)
class HeldOut:
    """``[held_out]``: index files that are never trained on; ``images``: of these only the rows of the first so many images,
    which is what retrieval chooses among. None takes all."""

    index: str | Sequence[str] = ()
    images: int | None = None

    def __post_init__(self) -> None:
        _check_index(self.index)
        if self.images is not None and (type(self.images) is not int or self.images < 1):
            raise ConfigError(f"images must be a positive integer, got {self.images!r}")


@dataclass(frozen=True)
class FineTuning:
    """What a file says. ``model`` has the entrypoint's ``name``, whose last part names the task (``downstream.DOWNSTREAM``),
    fields of BEiT3Config, ``num_classes``, ``impl``, ``device`` and ``checkpoint``: the weights to begin with, a pretraining
    run's or an official file, whose heads may be missing or of another size."""

    folder: Path
    model: dict[str, Any]
    loss: Any
    data: TaskSources = field(default_factory=TaskSources)
    held_out: HeldOut | None = None
    augment: Augment = field(default_factory=Augment)
    initial: Initial = field(default_factory=Initial)
    train: TrainOptions = field(default_factory=TrainOptions)

    @property
    def task(self) -> Downstream:
        """The entry of the table."""
        return DOWNSTREAM[_task_name(self.model)]

    def from_scratch(self) -> FineTuning:
        """The same run without weights to begin with."""
        own = {key: value for key, value in self.model.items() if key != "checkpoint"}
        return dataclasses.replace(self, model=own)

    def make_model(self) -> tuple[Any, LoadReport | None]:
        """The model, and what was taken from its checkpoint, where there is one; other weights are drawn with ``train.seed``.

        Raises ConfigError and CheckpointError.
        """
        options = dict(self.model)
        name, checkpoint = options.pop("name"), options.pop("checkpoint", None)
        tokenizer = self._tokenizer()
        if tokenizer is not None:
            options.setdefault("vocab_size", embeddings_for(tokenizer))
        if self.data.answers is not None:
            self._set_classes(options)
        torch.manual_seed(self.train.seed)
        model = create_model(name, **options)
        self.initial.draw(model)
        if checkpoint is None:
            return model, None
        source = self.folder / checkpoint
        return model, load_checkpoint(model, source, allow_missing=HEADS, allow_mismatched=HEADS)

    def start(self) -> dict[str, str]:
        """What the first weights are made of, for ``train``."""
        checkpoint = self.model.get("checkpoint")
        return start_of(None if checkpoint is None else self.folder / checkpoint, self.initial)

    def make_data(self, model: Any) -> PairedData[Any]:
        """The run's micro-batches. Raises ConfigError and InputError."""
        rows = self._rows(self.data.index)
        return self._paired(model, rows, self.augment)

    def make_held_out(self, model: Any) -> PairedData[Any] | None:
        """What is never trained on, where the recipe names any. Raises ConfigError for images that are."""
        if self.held_out is None:
            return None
        rows = self._rows(self.held_out.index)
        trained_on = self._rows(self.data.index)
        check_apart((row.image for row in rows), (row.image for row in trained_on))
        images = dict.fromkeys(row.image for row in rows)
        kept = set(list(images)[: self.held_out.images])
        return self._paired(model, [row for row in rows if row.image in kept], None)

    def options(self, data: PairedData[Any]) -> TrainOptions:
        """``[train]``, with steps and warm-up counted in epochs of the data where the recipe says so."""
        sources, train = self.data, self.train
        if sources.epochs is None:
            return train
        epoch = len(data.rows) / (sources.batch_size * train.accumulation)
        return dataclasses.replace(
            train,
            steps=max(1, round(sources.epochs * epoch)),
            warmup_steps=round(sources.warmup_epochs * epoch),
        )

    def labels(self) -> tuple[str, ...] | None:
        """The answers by number, where the recipe names their file."""
        name = self.data.answers
        return None if name is None else read_labels(self.folder / name)

    def _set_classes(self, options: dict[str, Any]) -> None:
        """As many as there are answers. Raises ConfigError where the recipe says otherwise."""
        name, count = self.data.answers, len(self.labels() or ())
        if not TASKS[_task_name(self.model)].has_classes:
            raise ConfigError(
                f"[data] answers is for models with classes, which {self.model['name']!r} has not; leave it out"
            )
        classes = options.setdefault("num_classes", count)
        if type(classes) is not int or classes != count:
            raise ConfigError(
                f"[model] num_classes is {classes!r}, but {name} names {count} answers; leave num_classes out, or name the "
                "file that belongs to it"
            )

    def _rows(self, index: str | Sequence[str]) -> list[PairedRow]:
        names = names_of(index, "index", "an index file")
        return [row for name in names for row in read_paired(self.folder / name, self.task.target)]

    def _paired(
        self, model: Any, rows: list[PairedRow], augment: Augment | None
    ) -> PairedData[Any]:
        check_ids((row.text for row in rows), model.config.vocab_size)
        self.task.check(model, [row.target for row in rows])
        processor = Processor.for_model(model, self._tokenizer(), max_length=self.data.max_length)
        collate = self.task.collate(model)
        keep = 0 if augment is None else self.data.keep_images
        size, seed = self.data.batch_size, self.train.seed
        return PairedData(rows, size, processor, collate, seed, augment, keep)

    def _tokenizer(self) -> Tokenizer | None:
        name = self.data.tokenizer
        return None if name is None else Tokenizer(self.folder / name)


SECTIONS: dict[str, Any] = {
    "data": TaskSources,
    "held_out": HeldOut,
    "augment": Augment,
    "initial": Initial,
    "train": TrainOptions,
}
"""What a file may have beside ``[model]`` and the ``[loss]`` of its task."""


def read_finetuning(path: str | PathLike[str]) -> FineTuning:
    """A fine-tuning run from a TOML file. Raises ConfigError for what cannot be read or is not known, with what is."""
    path = Path(path)
    tables = read_tables(path)
    example = "beit3_base_patch16_480_vqav2"
    model = tables.get("model")
    task = _task_name(model) if isinstance(model, dict) else None
    if task not in DOWNSTREAM:
        known = ", ".join(f"_{name}" for name in DOWNSTREAM)
        raise ConfigError(
            f'{path}: [model] needs a name that ends in {known}, such as "{example}"; got {(model or {}).get("name")!r}'
        )
    loss = DOWNSTREAM[task].objective
    made = read_sections(path, tables, {**SECTIONS, "loss": loss}, example)
    return FineTuning(path.parent, **{"loss": loss(), **made})


def _task_name(model: dict[str, Any]) -> str:
    return str(model.get("name", "")).rpartition("_")[2]


def _check_index(index: Any) -> None:
    if not names_of(index, "index", "an index file"):
        raise ConfigError("index must name an official index file, got none")
