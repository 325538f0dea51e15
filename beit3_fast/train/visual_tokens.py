"""Codes of images for masked data modelling: by a visual tokenizer, or from a file that ``tokenize_images`` wrote."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_fast.checkpoint import read_checkpoint, save_checkpoint
from beit3_fast.data import Processor
from beit3_fast.data.image_files import state_of_file
from beit3_fast.data.presets import PRESETS, ImagePreset
from beit3_fast.errors import CheckpointError, ConfigError, InputError
from beit3_fast.model.visual_tokenizer import VisualTokenizer, create_visual_tokenizer

_FORMAT = "beit3_fast codes 1"
_FACTS = ("num_codes", "grid_size", "preset", "tokenizer", "job")
_MEND = "make it anew with beit3-fast tokenize-images"


class VisualTokens:
    """A frozen tokenizer as ``MixedData`` takes it: images [B, 3, H, W] in [-1, 1] -> codes int64 [B, patches].

    Raises CheckpointError for a tokenizer without a codebook, or with weights that are not finite; ConfigError for another object.
    """

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        if not isinstance(tokenizer, VisualTokenizer):
            raise ConfigError(
                f"expected a VisualTokenizer, got {type(tokenizer).__name__}; create_visual_tokenizer makes one"
            )
        tokenizer.check_codes()
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


@dataclass(frozen=True, eq=False)
class CodeFile:
    """Codes of image files, one safetensors file: ``codes`` int16 or int32 [N, patches] of the N ``images``, whose paths count from
    its own folder. It knows the codes of files, not of what is cut from them.

    ``sizes``: of the files in bytes, int64 [N]; ``num_codes``, ``grid_size`` and ``preset`` (of images) are the tokenizer's,
    ``tokenizer`` is its identity; ``job``: a digest of the images that were asked for, of which some may not have been readable.
    """

    path: Path
    codes: Tensor
    images: list[str]
    sizes: Tensor
    num_codes: int
    grid_size: tuple[int, int]
    preset: str
    tokenizer: str
    job: str

    @property
    def identity(self) -> str:
        """The tokenizer's: with the same codes a run may go on."""
        return self.tokenizer

    def of_file(self, image: str) -> Tensor:
        """int64 [patches]. Raises InputError for an image that the file does not have, or that has another size by now."""
        row = self._rows.get(os.path.abspath(image))
        if row is None:
            raise InputError(
                f"{self.path} has no codes of {image!r}; run beit3-fast tokenize-images for it"
            )
        size, bytes_now = int(self.sizes[row]), state_of_file(image)[0]
        if bytes_now != size:
            raise InputError(
                f"{image!r} had {size} bytes when {self.path} was made, now it has {bytes_now}; run beit3-fast tokenize-images for "
                "the new images, into another file"
            )
        return self.codes[row].long()

    def save(self) -> None:
        """Write the file, whole or not at all. Raises CheckpointError."""
        names = json.dumps(self.images, ensure_ascii=False).encode("utf-8", "surrogatepass")
        state = {
            "codes": self.codes,
            "images": torch.frombuffer(bytearray(names), dtype=torch.uint8),
            "sizes": self.sizes,
        }
        facts = json.dumps({name: getattr(self, name) for name in _FACTS})
        save_checkpoint(state, self.path, metadata={"content": _FORMAT, "facts": facts})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CodeFile:
        """Read what ``save`` wrote. Raises CheckpointError for another or a damaged file."""
        read = read_checkpoint(path)
        if read.metadata.get("content") != _FORMAT:
            raise CheckpointError(f"{path}: holds no codes; beit3-fast tokenize-images makes them")
        try:
            facts = json.loads(read.metadata["facts"])
            facts["grid_size"] = tuple(facts["grid_size"])
            names = read.state["images"].numpy().tobytes().decode("utf-8", "surrogatepass")
            made = cls(
                Path(path),
                read.state["codes"],
                json.loads(names),
                read.state["sizes"],
                **{name: facts[name] for name in _FACTS},
            )
        except KeyError as error:
            raise CheckpointError(f"{path}: it lacks {error}; {_MEND}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: its tables cannot be read ({error}); {_MEND}"
            ) from error
        problem = made._problem()
        if problem is not None:
            raise CheckpointError(f"{path}: {problem}; {_MEND}")
        return made

    def _problem(self) -> str | None:
        """What keeps the codes from being used, where anything does."""
        if not _is_count(self.num_codes):
            return f"num_codes must be a positive integer, got {self.num_codes!r}"
        grid = self.grid_size
        if len(grid) != 2 or not all(map(_is_count, grid)):
            return f"grid_size must be two positive integers, got {list(grid)}"
        if self.preset not in list(PRESETS):
            return f"preset must be one of {list(PRESETS)}, got {self.preset!r}"
        for name in ("tokenizer", "job"):
            if not isinstance(getattr(self, name), str):
                return f"{name} must be a digest, got {getattr(self, name)!r}"
        names = self.images
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            return f"images must be names, at least one, got {names!r:.80}"
        return self._problem_of_tensors(len(names), grid[0] * grid[1])

    def _problem_of_tensors(self, count: int, patches: int) -> str | None:
        for name, dtypes, shape in (
            ("codes", (torch.int16, torch.int32), (count, patches)),
            ("sizes", (torch.int64,), (count,)),
        ):
            own = getattr(self, name)
            if own.dtype not in dtypes or tuple(own.shape) != shape:
                kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                came = f"{own.dtype} of shape {list(own.shape)}"
                return f"{name} must be {kinds} of shape {list(shape)}, got {came}"
        least, most = (int(end) for end in self.codes.aminmax())
        if least < 0 or most >= self.num_codes:
            return f"codes must be from 0 to {self.num_codes - 1}, got {least} to {most}"
        return None

    @cached_property
    def _rows(self) -> dict[str, int]:
        folder = self.path.parent
        return {os.path.abspath(folder / name): row for row, name in enumerate(self.images)}


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


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
