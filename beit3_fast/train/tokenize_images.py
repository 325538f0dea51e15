"""Codes of many images into one file; a job that was stopped goes on where it was."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from beit3_fast.checkpoint.atomic import mend, replacing
from beit3_fast.checkpoint.lock import held
from beit3_fast.data.digest import digest_of
from beit3_fast.data.image_files import list_images, state_of_file
from beit3_fast.data.images import preprocess_image
from beit3_fast.data.presets import ImagePreset
from beit3_fast.errors import CheckpointError, ConfigError, InputError
from beit3_fast.model.visual_tokenizer import VisualTokenizer
from beit3_fast.progress import Progress
from beit3_fast.train.recipe_file import check_count
from beit3_fast.train.visual_tokens import CodeFile, VisualTokens

logger = logging.getLogger("beit3_fast")

_JOB, _CODES = "job.json", "codes.bin"
_SKIPPED = -1
_OTHER_IMAGES = "other images, or of images changed since (name, size and time of the last change of each are compared)"


@dataclass(frozen=True)
class TokenizeReport:
    """``images`` with codes; ``skipped``: images that could not be used; ``resumed``: of both together, those that an earlier
    call had done; ``used``: how many different codes there are among them."""

    images: int
    skipped: int
    resumed: int
    used: int


def tokenize_images(
    tokenizer: VisualTokenizer,
    sources: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = True,
) -> TokenizeReport:
    """Write a ``CodeFile`` of the images that ``sources`` name (files, folders, index files) to ``out``.

    Codes lie in a folder beside ``out`` until all are there; the same call goes on with them, after a kill as well. Images that
    cannot be read are skipped with a warning. ``workers``: processes that decode. Raises ConfigError where ``out`` holds, or was
    begun with, codes of another tokenizer, of other images or of images that changed: names, sizes and times of the last change
    are compared, content is not read. InputError where no image can be used; CheckpointError for files that cannot be
    read or written, and for a tokenizer that was never trained or has weights that are not finite.
    """
    check_count("batch_size", batch_size, 1)
    check_count("workers", workers, 0)
    if not isinstance(out, (str, PathLike)):
        raise ConfigError(f"expected a path to write codes to, got {out!r}")
    if Path(out).suffix.lower() != ".safetensors":
        raise ConfigError(f"codes are written to a .safetensors file, got {os.fspath(out)!r}")
    job = _Job(VisualTokens(tokenizer), list_images(sources), Path(out))
    if job.out.exists():
        report = job.done_before()
        shutil.rmtree(job.folder, ignore_errors=True)
        return report
    with held(job.folder):
        resumed = job.begin()
        bar = Progress(len(job.paths), resumed, progress)
        try:
            for codes in job.codes(resumed, batch_size, workers):
                job.add(codes)
                bar.add(len(codes), int((codes[:, 0] == _SKIPPED).sum()))
        finally:
            bar.close()
        report = job.finish(resumed)
    shutil.rmtree(job.folder, ignore_errors=True)
    return report


class _Images:
    """``images[n]``: pixels [3, H, W], or why there are none."""

    def __init__(self, paths: Sequence[str], pixels: int, preset: str) -> None:
        self.paths, self.pixels, self.preset = paths, pixels, ImagePreset.get(preset)

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return preprocess_image(self.paths[number], self.pixels, self.preset)
        except InputError as error:
            return str(error)


class _Job:
    def __init__(self, tokens: VisualTokens, paths: list[str], out: Path) -> None:
        self.tokens, self.paths, self.out = tokens, paths, out
        if not paths:
            raise InputError("expected at least one image, got none")
        self.folder = out.with_name(f".{out.name}.partial")
        self.patches = tokens.grid_size[0] * tokens.grid_size[1]
        self.dtype = np.dtype(np.int16 if tokens.num_codes <= np.iinfo(np.int16).max else np.int32)
        self.names = [os.path.relpath(path, out.absolute().parent) for path in paths]
        states = [state_of_file(path) for path in paths]
        self.sizes = [size for size, _ in states]
        self.digest = digest_of(repr([*zip(self.names, states, strict=True)]))

    @property
    def facts(self) -> dict[str, str]:
        """What a continuation must share, for JSON."""
        return {"tokenizer": self.tokens.identity, "images": self.digest}

    def done_before(self) -> TokenizeReport:
        """The report of a file that is there already. Raises ConfigError where it is of another job."""
        there = CodeFile.load(self.out)
        for what, own, theirs in (
            ("another tokenizer", self.tokens.identity, there.tokenizer),
            (_OTHER_IMAGES, self.digest, there.job),
        ):
            if own != theirs:
                raise ConfigError(
                    f"{self.out} holds codes of {what}; give another file, or remove it"
                )
        count, skipped = len(there.images), len(self.names) - len(there.images)
        return TokenizeReport(count, skipped, len(self.names), there.codes.unique().numel())

    def begin(self) -> int:
        """How many images an earlier call had done. Raises ConfigError where it did another job."""
        facts, codes = self.folder / _JOB, self.folder / _CODES
        row = self.patches * self.dtype.itemsize
        try:
            was = json.loads(facts.read_text()) if facts.exists() else None
            if was is None:
                codes.write_bytes(b"")
                with replacing(facts) as file:
                    file.write(json.dumps(self.facts).encode())
            done = codes.stat().st_size // row
            os.truncate(codes, done * row)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder} cannot be continued ({error}); remove it to begin anew"
            ) from error
        if was is not None and was != self.facts:
            raise ConfigError(
                f"{self.folder} holds the beginning of another job, with another tokenizer or {_OTHER_IMAGES}; give another "
                "file, or remove it"
            )
        if done > len(self.paths):
            raise CheckpointError(
                f"{self.folder} has codes of {done} images, expected at most {len(self.paths)}; remove it to begin anew"
            )
        return done

    def codes(self, first: int, batch_size: int, workers: int) -> Iterator[np.ndarray]:
        """Codes [B, patches] of the images from ``first`` on, -1 for those without."""
        images = _Images(self.paths, self.tokens.tokenizer.config.img_size, self.tokens.preset)
        loader: DataLoader[Any] = DataLoader(
            images,  # type: ignore[arg-type]
            batch_sampler=_batches(range(first, len(self.paths)), batch_size),
            num_workers=workers,
            collate_fn=list,
        )
        place = first
        for batch in loader:
            rows = np.full((len(batch), self.patches), _SKIPPED, dtype=self.dtype)
            good = [n for n, image in enumerate(batch) if isinstance(image, Tensor)]
            for number, image in enumerate(batch):
                if isinstance(image, str):
                    logger.warning("skipped %s: %s", self.paths[place + number], image)
            if good:
                rows[good] = self.tokens(torch.stack([batch[n] for n in good])).numpy()
            place += len(batch)
            yield rows

    def add(self, codes: np.ndarray) -> None:
        """Bring codes to the disk. Raises CheckpointError."""
        try:
            with (self.folder / _CODES).open("ab") as file:
                file.write(codes.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot be written: {error.strerror or error}{mend(error)}; the same call goes on"
            ) from error

    def finish(self, resumed: int) -> TokenizeReport:
        """Write ``out``. Raises InputError where no image had codes."""
        codes = np.fromfile(self.folder / _CODES, dtype=self.dtype).reshape(-1, self.patches)
        good = codes[:, 0] != _SKIPPED
        if not good.any():
            # Else they would keep the next call from other images.
            shutil.rmtree(self.folder, ignore_errors=True)
            raise InputError(
                f"none of the {len(codes)} images can be used, the first is {self.paths[0]!r}"
            )
        made = CodeFile(
            path=self.out,
            codes=torch.from_numpy(codes[good]),
            images=[name for name, is_good in zip(self.names, good, strict=True) if is_good],
            sizes=torch.tensor(self.sizes)[torch.from_numpy(good)],
            num_codes=self.tokens.num_codes,
            grid_size=self.tokens.grid_size,
            preset=self.tokens.preset,
            tokenizer=self.tokens.identity,
            job=self.digest,
        )
        made.save()
        skipped = len(self.names) - len(made.images)
        return TokenizeReport(len(made.images), skipped, resumed, made.codes.unique().numel())


def _batches(numbers: range, size: int) -> list[list[int]]:
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]
