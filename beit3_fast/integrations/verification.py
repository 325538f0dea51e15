"""A checkpoint under this runtime held against torchscale, which runs the same weights on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from beit3_fast.config import BEiT3Config
from beit3_fast.data.tokenizer import BOS, EOS, PAD
from beit3_fast.errors import ConfigError
from beit3_fast.integrations.torchscale_models import MODELS, import_torchscale
from beit3_fast.model.registry import DTYPES, create_model
from beit3_fast.parity import Parity, model_limits, model_parity

_DTYPES = ("float32", "bfloat16", "float16")
_WORDS = (3, 24)
# The last rows of the vocabulary are unused, and one before them is the mask.
_UNUSED = 10
# Where a sample has two scores: the ratio of two errors of a handful of numbers says nothing.
_LEAST_SAMPLES_OF_TWO_SCORES = 16


@dataclass(frozen=True)
class Comparison:
    """One output: how far it is from torchscale's in float32, and how far it may be. ``rms_limit``: None in float32."""

    output: str
    parity: Parity
    max_limit: float
    rms_limit: float | None


@dataclass(frozen=True)
class Verification:
    """What ``verify_checkpoint`` found.

    ``weights`` of the file were compared with those in use, bit for bit in their dtype; ``changed`` names those that
    differ (none, unless loading is wrong), ``interpolated`` those that were made for another image size.
    """

    model: str
    torchscale: str
    weights: int
    changed: tuple[str, ...]
    interpolated: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every weight is the file's and every output within its limit."""
        return not self.changed and all(own.parity.passed for own in self.comparisons)


def verify_checkpoint(
    checkpoint: str | PathLike[str],
    name: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    impl: str = "auto",
    *,
    num_classes: int | None = None,
    samples: int = 4,
) -> Verification:
    """Run a checkpoint here and on torchscale, and compare by the rule of ``beit3_fast.parity``.

    ``name`` is the model's; files written by this package hold it. ``samples`` images of a photograph's spectrum and
    texts of 3 to 24 tokens, from a fixed seed, go through both. torchscale runs in float32, and for a 16-bit ``dtype``
    in that as well, since its own error there is what ours is held against. Raises ConfigError without torchscale, for a
    dtype that it does not have, a name that is missing and what ``create_model`` refuses; CheckpointError for
    a file that does not fit.
    """
    if dtype not in _DTYPES:
        raise ConfigError(
            f"dtype must be one of {list(_DTYPES)}, which torchscale has, got {dtype!r}"
        )
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")
    file = read_checkpoint(checkpoint)
    import_torchscale()
    name = name or file.name
    if name is None:
        raise ConfigError(
            f"{file} does not say which model it is of; name the model (--model NAME, or convert it with --name)"
        )
    if name.endswith("_pretraining"):
        raise ConfigError(
            f"torchscale has no pretraining to compare {name} with; verify its layers by the plain model's name, "
            f"{name.removesuffix('_pretraining')}"
        )
    source: Any = file
    ours = create_model(
        name, source, device, dtype, impl, num_classes=num_classes, inference_only=True
    )
    config: BEiT3Config = ours.config
    task = name.rpartition("_")[2] if name.rpartition("_")[2] in MODELS else "backbone"
    if config.attention != "decoupled" or config.vl_expert_layers:
        raise ConfigError(f"torchscale cannot run {name}: it has no shared attention")
    classes = () if num_classes is None else (num_classes,)
    theirs = MODELS[task](config, *classes).eval().to(device)
    report = load_checkpoint(theirs, file)
    weights, changed = _compare_weights(ours, file, report.interpolated)
    if task == "nlvr2":
        samples = max(samples, _LEAST_SAMPLES_OF_TWO_SCORES)
    inputs = _inputs(config, samples, device)

    reference = _outputs(task, theirs, inputs)
    baseline: Mapping[str, Tensor] = reference
    if dtype != "float32":
        low = DTYPES[dtype]
        baseline = _outputs(task, theirs.to(low), inputs.to(low))
    found = _outputs(task, ours, inputs.to(DTYPES[dtype]))
    comparisons = tuple(
        _compare(key, found[key], reference[key], baseline[key]) for key in reference
    )
    interpolated = tuple(report.interpolated)
    return Verification(name, _version(), weights, changed, interpolated, comparisons)


class _Inputs(NamedTuple):
    images: Tensor
    others: Tensor
    words: Tensor
    padding: Tensor

    def to(self, dtype: torch.dtype) -> _Inputs:
        return self._replace(images=self.images.to(dtype), others=self.others.to(dtype))


def _inputs(config: BEiT3Config, samples: int, device: str) -> _Inputs:
    generator = torch.Generator().manual_seed(0)
    images, others = (_images(samples, config, generator) for _ in range(2))
    least, most = _WORDS
    most = min(most, config.max_text_positions - 2)
    spread = max(1, samples - 1)
    lengths = torch.tensor([most - (most - least) * i // spread for i in range(samples)])
    words = torch.randint(
        4, max(5, config.vocab_size - _UNUSED), (samples, most), generator=generator
    )
    places = torch.arange(most)[None, :]
    words[:, 0] = BOS
    words[places == lengths[:, None] - 1] = EOS
    padding = places >= lengths[:, None]
    words[padding] = PAD
    return _Inputs(*(tensor.to(device) for tensor in (images, others, words, padding)))


def _images(samples: int, config: BEiT3Config, generator: torch.Generator) -> Tensor:
    """fp32 [samples, 3, H, W] in [-1, 1]: amplitudes fall with frequency, as in photographs."""
    height, width = config.image_shape
    noise = torch.randn(samples, config.in_chans, height, width, generator=generator)
    frequency = (
        torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None, :] ** 2
    ).sqrt()
    spectrum = torch.fft.rfft2(noise) / frequency.clamp_min(1 / max(height, width))
    images = torch.fft.irfft2(spectrum, s=(height, width))
    return images / images.abs().amax(dim=(2, 3), keepdim=True)


@torch.no_grad()
def _outputs(task: str, model: Any, x: _Inputs) -> dict[str, Tensor]:
    """What the task gives, without the rows of padding; one call of the official forward for each kind of input."""
    real = ~x.padding
    if task == "imageclassification":
        return {"logits": model(x.images)}
    if task == "vqav2":
        return {"logits": model(x.images, x.words, x.padding)}
    if task == "nlvr2":
        return {"logits": model(x.images, x.others, x.words, x.padding)}
    if task == "captioning":
        return {"logits": model(x.images, x.words, x.padding, None)[0][real]}
    if task == "retrieval":
        vision, _ = model(image=x.images, only_infer=True)
        _, language = model(text_description=x.words, padding_mask=x.padding, only_infer=True)
        return {"image embeddings": vision, "text embeddings": language}
    image = model(visual_tokens=x.images)["encoder_out"]
    text = model(textual_tokens=x.words, text_padding_position=x.padding)["encoder_out"]
    pair = model(x.words, x.images, x.padding)["encoder_out"]
    vision = image.shape[1]
    return {
        "rows of an image": image.flatten(0, 1),
        "rows of a text": text[real],
        "image rows of a pair": pair[:, :vision].flatten(0, 1),
        "text rows of a pair": pair[:, vision:][real],
    }


def _compare(name: str, ours: Tensor, reference: Tensor, baseline: Tensor) -> Comparison:
    ours, reference, baseline = ours.cpu(), reference.cpu(), baseline.cpu()
    if not bool(reference.isfinite().all() & baseline.isfinite().all()):
        nan = math.nan
        reason = f"torchscale's own {name} are not finite and can judge nothing"
        return Comparison(name, Parity(nan, nan, nan, False, reason), nan, None)
    own = baseline if baseline.dtype == ours.dtype else None
    parity = model_parity(ours, reference, own)
    return Comparison(name, parity, *model_limits(ours.dtype, reference, own))


def _compare_weights(
    model: Any, file: Checkpoint, interpolated: Mapping[str, Any]
) -> tuple[int, tuple[str, ...]]:
    """How many tensors of the file are in the model under their own name, and which of them are others there."""
    state = model.state_dict()
    shared = [name for name in file.state if name in state and name not in interpolated]
    changed = [
        name
        for name in shared
        if not torch.equal(state[name].cpu(), file.state[name].to(state[name].dtype))
    ]
    return len(shared), tuple(changed)


def _version() -> str:
    try:
        return version("torchscale")
    except PackageNotFoundError:
        return "of an unknown version"
