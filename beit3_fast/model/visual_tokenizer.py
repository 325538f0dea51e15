"""The visual tokenizer of BEiT v2 (VQ-KD, arXiv 2208.06366): patches become codes that stand for a teacher's features.

An encoder, a codebook, and a decoder that must tell from the codes alone what the teacher saw. Names and shapes of the
parameters are the published ones, so the published files load as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_fast.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from beit3_fast.data.digest import digest_of_tensors
from beit3_fast.data.image_data import ImageBatch
from beit3_fast.errors import CheckpointError, ConfigError, InputError
from beit3_fast.model.codebook import Codebook
from beit3_fast.model.device import device_of
from beit3_fast.model.vision_transformer import VisionTransformer
from beit3_fast.model.work import Work, linear_work, training_work

_HEAD_DIM = 64
_STD = 0.02


@dataclass(frozen=True)
class VisualTokenizerConfig:
    """Shapes of a visual tokenizer, and how its codebook learns (``Codebook``).

    ``embed_dim``, ``num_heads``: of encoder and decoder, which have ``depth`` and ``decoder_depth`` blocks; ``teacher_dim``:
    width of the features to predict. Raises ConfigError for what makes no sense.
    """

    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    num_heads: int = 12
    depth: int = 12
    decoder_depth: int = 3
    num_codes: int = 8192
    code_dim: int = 32
    teacher_dim: int = 512
    decay: float = 0.99
    revive_below: float = 0.01

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ConfigError(f"{field.name} must be a positive integer, got {value!r}")
            if field.type == "float" and not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise ConfigError(f"{field.name} must be a number in [0, 1), got {value!r}")
        for whole, part in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"{whole} must be a multiple of {part}, got {getattr(self, whole)} and {getattr(self, part)}"
                )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.img_size // self.patch_size
        return side, side

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)


VISUAL_TOKENIZERS = {
    "vqkd_encoder_base_decoder_1x768x12_clip": VisualTokenizerConfig(decoder_depth=1),
    "vqkd_encoder_base_decoder_3x768x12_clip": VisualTokenizerConfig(),
    "vqkd_encoder_base_decoder_1x768x12_dino": VisualTokenizerConfig(
        decoder_depth=1, teacher_dim=768
    ),
    "vqkd_tiny": VisualTokenizerConfig(
        img_size=64,
        patch_size=8,
        embed_dim=64,
        num_heads=4,
        depth=2,
        decoder_depth=1,
        num_codes=64,
        code_dim=16,
        teacher_dim=64,
    ),
}
"""The three published ones, and one for tests and small worlds."""


class Distilled(NamedTuple):
    """``features`` [B, patches, teacher_dim], predicted from the codes; ``codes`` int64 [B, patches], of ``num_codes``;
    ``commitment``: the mean squared distance between the encoder's outputs and their codes."""

    features: Tensor
    codes: Tensor
    commitment: Tensor
    num_codes: int


class VisualTokenizer(nn.Module):
    """images [B, 3, img_size, img_size], scaled to [-1, 1] as the "square" preset has them -> codes of their patches."""

    preset = "square"

    def __init__(self, config: VisualTokenizerConfig, impl: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.name: str | None = None
        width, dim, side = config.embed_dim, config.code_dim, config.grid_size[0]
        rest = (width, config.num_heads)
        self.encoder = VisionTransformer(
            config.img_size, config.patch_size, 3, *rest, config.depth, impl
        )
        self.decoder = VisionTransformer(side, 1, dim, *rest, config.decoder_depth, impl)
        self.quantize = Codebook(config.num_codes, dim, config.decay, config.revive_below)
        self.encode_task_layer = _head(width, dim)
        self.decode_task_layer = _head(width, config.teacher_dim)

    def forward(self, images: Tensor) -> Distilled:
        """What the teacher's features should be, by the codes alone. In training mode the codebook learns, too."""
        rows = self._encode(images)
        batch, patches, dim = rows.shape
        side = self.config.grid_size[0]
        quantized = self.quantize(rows.flatten(0, 1))
        grid = quantized.rows.view(batch, side, side, dim).permute(0, 3, 1, 2)
        features = self.decode_task_layer(self.decoder(grid.to(images.dtype)))
        codes = quantized.codes.view(batch, patches)
        return Distilled(features, codes, quantized.loss, self.config.num_codes)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """The codes int64 [B, patches], row by row of patches. Raises ShapeError for images of another size, InputError for an image
        whose patches are not finite behind the encoder."""
        rows = self._encode(images)
        good = rows.isfinite().flatten(1).all(1)
        if not bool(good.all()):
            raise InputError(
                f"image {int(good.logical_not().nonzero()[0])} of {len(images)} has patches that are not finite behind the "
                "encoder; give finite images in [-1, 1], and float32 where half precision overflows"
            )
        return self.quantize.nearest(rows.flatten(0, 1)).view(rows.shape[:2])

    def work(self, batch: ImageBatch) -> Work:
        """What a training step on the batch needs, without what the teacher does."""
        config, images = self.config, batch.num_samples
        rows, width = images * math.prod(config.grid_size), config.embed_dim
        pixels, encoder = self.encoder.work(images)
        codes, decoder = self.decoder.work(images)
        heads = linear_work(rows, width, width, config.code_dim)
        heads += linear_work(rows, width, width, config.teacher_dim)
        # The choice of a code has no gradient.
        choice = linear_work(rows, config.code_dim, config.num_codes)
        return training_work(pixels, encoder + codes + decoder + heads) + choice

    def no_weight_decay(self) -> set[str]:
        """Names that the published optimizer exempts from weight decay."""
        parts = ("cls_token", "pos_embed")
        return {f"{side}.{part}" for side in ("encoder", "decoder") for part in parts}

    def identity(self) -> str:
        """A digest of all that codes depend on."""
        # The weights do not tell how many heads share their width.
        return digest_of_tensors(self._of_codes(), f"{self.config.num_heads} heads")

    def check_codes(self) -> None:
        """Raises CheckpointError for weights that name nothing: a codebook that was never filled, or numbers that are not finite."""
        own = self.quantize.embedding
        if not bool(own.initted) or not bool(own.weight.any()):
            raise CheckpointError(
                "the visual tokenizer's codebook was never filled (initted is 0, or all codes are), so every patch would have one "
                "code; train it with beit3-fast train-tokenizer, or load the weights of a trained one"
            )
        spoiled = [name for name, tensor in self._of_codes() if not bool(tensor.isfinite().all())]
        if spoiled:
            raise CheckpointError(
                f"the visual tokenizer must have finite weights, those of {', '.join(spoiled[:5])} are not "
                f"({len(spoiled)} in all); load an earlier checkpoint"
            )

    def _of_codes(self) -> list[tuple[str, Tensor]]:
        """The part of the state that codes depend on."""
        parts = ("encoder.", "encode_task_layer.", "quantize.embedding.weight")
        return [item for item in self.state_dict().items() if item[0].startswith(parts)]

    def _encode(self, images: Tensor) -> Tensor:
        """Rows [B, patches, code_dim] in the head's dtype, also under autocast: near a border a rounding is another code."""
        rows = self.encoder(images)
        dtype = next(self.encode_task_layer.parameters()).dtype
        with torch.autocast(images.device.type, enabled=False):
            return self.encode_task_layer(rows.to(dtype))


def create_visual_tokenizer(
    name_or_config: str | VisualTokenizerConfig | Mapping[str, Any] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    **overrides: Any,
) -> VisualTokenizer:
    """A tokenizer by its published name or its configuration, in evaluation mode.

    ``checkpoint``: a published ``.pth`` or a file of ours, loaded strictly; without a name the file says what it is, by its
    metadata or by its shapes. ``overrides`` are fields of VisualTokenizerConfig. Raises ConfigError for an unknown name, field or
    device, CheckpointError for a file that does not fit.
    """
    place = device_of(device)
    source = None if checkpoint is None else read_checkpoint(checkpoint)
    config = visual_tokenizer_config(name_or_config, source, **overrides)
    tokenizer = VisualTokenizer(config, impl)
    tokenizer.name = name_or_config if isinstance(name_or_config, str) else None
    if source is not None:
        load_checkpoint(tokenizer, source)
        tokenizer.name = tokenizer.name or source.name
    return tokenizer.to(place).eval()


def visual_tokenizer_config(
    name_or_config: str | VisualTokenizerConfig | Mapping[str, Any] | None = None,
    source: Checkpoint | None = None,
    **overrides: Any,
) -> VisualTokenizerConfig:
    """What ``create_visual_tokenizer`` would build. Raises as it does."""
    config = _config(name_or_config, source)
    known = [field.name for field in fields(config)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ConfigError(f"unknown fields {unknown} of a visual tokenizer; known are {known}")
    return replace(config, **overrides)


def _config(
    given: str | VisualTokenizerConfig | Mapping[str, Any] | None, source: Checkpoint | None
) -> VisualTokenizerConfig:
    if isinstance(given, VisualTokenizerConfig):
        return given
    if isinstance(given, str):
        if given not in VISUAL_TOKENIZERS:
            raise ConfigError(
                f"unknown visual tokenizer {given!r}; known are {list(VISUAL_TOKENIZERS)}"
            )
        return VISUAL_TOKENIZERS[given]
    values = given
    if values is None:
        if source is None:
            raise ConfigError(
                f"a visual tokenizer needs a name, one of {list(VISUAL_TOKENIZERS)}, or a checkpoint"
            )
        values = source.config
        if values is None:
            return _by_shapes(source)
    try:
        return VisualTokenizerConfig(**values)
    except TypeError as error:
        whose = "" if source is None else f"{source}: "
        raise ConfigError(f"{whose}no configuration of a visual tokenizer ({error})") from error


def _by_shapes(source: Checkpoint) -> VisualTokenizerConfig:
    """The configuration of a published file, which does not state it; heads are 64 wide. Raises CheckpointError."""
    state = {name.removeprefix("module."): tensor for name, tensor in source.state.items()}
    try:
        width, _, patch, _ = state["encoder.patch_embed.proj.weight"].shape
        patches = state["encoder.pos_embed"].shape[1] - 1
        num_codes, code_dim = state["quantize.embedding.weight"].shape
        teacher_dim = len(state["decode_task_layer.2.weight"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source}: is no visual tokenizer, it lacks {error}; tokenizers are named vqkd_..."
        ) from error
    depth, decoder_depth = (
        len({found[1] for name in state if (found := re.match(rf"{part}\.blocks\.(\d+)\.", name))})
        for part in ("encoder", "decoder")
    )
    return VisualTokenizerConfig(
        img_size=round(patches**0.5) * patch,
        patch_size=patch,
        embed_dim=width,
        num_heads=max(1, width // _HEAD_DIM),
        depth=depth,
        decoder_depth=decoder_depth,
        num_codes=num_codes,
        code_dim=code_dim,
        teacher_dim=teacher_dim,
    )


def _head(width: int, out: int) -> nn.Sequential:
    first, last = nn.Linear(width, width), nn.Linear(width, out)
    for linear in (first, last):
        nn.init.trunc_normal_(linear.weight, std=_STD)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.Tanh(), last)
