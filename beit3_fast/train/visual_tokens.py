"""Codes of images for masked data modelling: by a visual tokenizer, or from a file that ``tokenize_images`` wrote."""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_fast.checkpoint import safetensors_file
from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.data import Processor
from beit3_fast.data.presets import ImagePreset
from beit3_fast.errors import CheckpointError, ConfigError, InputError
from beit3_fast.model.visual_tokenizer import VisualTokenizer, create_visual_tokenizer

_FORMAT = "beit3_fast codes 1"


class VisualTokens:
    """A frozen tokenizer as ``MixedData`` takes it: images [B, 3, H, W] in [-1, 1] -> codes int64 [B, patches]."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.num_codes = tokenizer.config.num_codes
        self.grid_size = tokenizer.config.grid_size
        self.preset = tokenizer.preset
        # Asked for at every checkpoint, and a digest of a large model takes its time.
        self.identity = tokenizer.identity()

    def __call__(self, images: Tensor) -> Tensor:
        """Raises ShapeError for images of another size than the tokenizer's."""
        device = next(self.tokenizer.parameters()).device
        return self.tokenizer.tokenize(images.to(device)).to(images.device)


class CodeFile:
    """Codes of image files, one safetensors file: ``codes`` int16 or int32 [N, patches], and the N paths as counted from its
    own folder. It knows the codes of files, not of what is cut from them. ``tokenizer`` is its identity, ``job`` a digest of the
    images that were asked for, of which some may not have been readable."""

    def __init__(
        self,
        path: str | PathLike[str],
        codes: Tensor,
        images: list[str],
        num_codes: int,
        grid_size: tuple[int, int],
        preset: str,
        tokenizer: str,
        job: str,
    ) -> None:
        self.path = Path(path)
        self.codes, self.images = codes, images
        self.num_codes, self.grid_size, self.preset = num_codes, grid_size, preset
        self.tokenizer, self.job = tokenizer, job
        self._rows = {self._place(name): row for row, name in enumerate(images)}

    @property
    def identity(self) -> str:
        """The tokenizer's: with the same codes a run may go on."""
        return self.tokenizer

    def of_file(self, image: str) -> Tensor:
        """int64 [patches]. Raises InputError for an image that the file does not have."""
        row = self._rows.get(os.path.abspath(image))
        if row is None:
            raise InputError(
                f"{self.path} has no codes of {image!r}; run beit3-fast tokenize-images for it"
            )
        return self.codes[row].long()

    def __call__(self, images: Tensor) -> Tensor:
        """Raises InputError: pixels do not tell which file they are of."""
        raise InputError(f"{self.path} has codes of files, not of pixels")

    def save(self) -> None:
        """Write the file, whole or not at all. Raises CheckpointError."""
        facts = {
            "num_codes": self.num_codes,
            "grid_size": self.grid_size,
            "preset": self.preset,
            "tokenizer": self.tokenizer,
            "job": self.job,
        }
        names = json.dumps(self.images, ensure_ascii=False).encode("utf-8", "surrogatepass")
        state = {
            "codes": self.codes,
            "images": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        }
        metadata = {"format": "pt", "content": _FORMAT, "facts": json.dumps(facts)}
        try:
            with replacing(self.path) as file:
                safetensors_file.write(file, state, metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CodeFile:
        """Read what ``save`` wrote. Raises CheckpointError for another or a damaged file."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size < 8:
                    raise CheckpointError("it is too short to hold codes")
                state, metadata = safetensors_file.read(file, size, verify=True)
            if metadata.get("content") != _FORMAT or set(state) != {"codes", "images"}:
                raise CheckpointError("it holds no codes; beit3-fast tokenize-images makes them")
            images = json.loads(state["images"].numpy().tobytes().decode("utf-8", "surrogatepass"))
            facts = json.loads(metadata["facts"])
            facts["grid_size"] = tuple(facts["grid_size"])
            return cls(path, state["codes"], images, **facts)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror or error}; beit3-fast tokenize-images makes such a file"
            ) from error
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _place(self, name: str) -> str:
        return os.path.abspath(self.path.parent / name)


def visual_tokens_for(
    model: Any, processor: Processor, folder: Path, tokenizer: str | None, cache: str | None
) -> VisualTokens | CodeFile:
    """The codes that a recipe names, ``cache`` before ``tokenizer``; files count from ``folder``.

    Raises ConfigError where they are not those of the model's patches or classes, of another image preset, or of another tokenizer.
    """
    tokens: VisualTokens | CodeFile | None = None
    if tokenizer is not None:
        tokens = VisualTokens(create_visual_tokenizer(None, folder / tokenizer))
    if cache is not None:
        own = CodeFile.load(folder / cache)
        if tokens is not None and tokens.identity != own.tokenizer:
            raise ConfigError(f"the codes of {cache} are not those of {tokenizer}; make them anew")
        tokens = own
    if tokens is None:
        raise ConfigError("codes need a tokenizer or a cache")
    classes = model.mim_head.out_features
    preset = ImagePreset.get(tokens.preset)
    for what, theirs, ours in (
        ("codes", tokens.num_codes, classes),
        ("grid of patches", tokens.grid_size, model.grid_size),
        ("image preset", preset, processor.preset),
    ):
        if theirs != ours:
            raise ConfigError(
                f"the visual tokens and the model differ in their {what}: {theirs} and {ours}; fit num_classes, img_size and "
                "patch_size of [model]"
            )
    return tokens
