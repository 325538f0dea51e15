"""The mixed step of pretraining: as many images, pairs and texts, parts of them hidden, predicted in one call.

The same losses on both sides: this package packs all three kinds into one pass, torchscale needs a pass for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_fast.config import BEiT3Config
from beit3_fast.data import MaskedBatch, MaskedSample, masked_batch
from beit3_fast.data.masked_batch import TERMS
from beit3_fast.data.masking import Masking, mask_patches, mask_words, sample_generator
from beit3_fast.model.pretraining import masked_work
from beit3_fast.model.work import Work
from bench.inputs import SCENES, photo_batch, text_batch

CODES = 8192
_SENTENCES = 4  # of a text that stands alone


def mixed_inputs(config: BEiT3Config, samples: list[int]) -> dict[str, Tensor]:
    """An image, a pair and a text for each sample, padded; masks by the paper's shares, codes at random."""
    shares, least = Masking(), min(16, config.grid_size[0])
    mask_id = min(64001, config.vocab_size - 1)
    scenes = [SCENES[i % len(SCENES)] for i in samples]
    told = [" ".join(_told(i)) for i in samples]
    inputs = {
        "images": photo_batch(samples, config.image_shape[0]),
        "pair_images": photo_batch([i + 1 for i in samples], config.image_shape[0]),
    }
    for name, share in (("images", shares.image), ("pair_images", shares.pair_image)):
        hidden = [
            mask_patches(config.grid_size, share, sample_generator(0, i, len(name)), least)
            for i in samples
        ]
        inputs[f"{name}_hidden"] = torch.stack(hidden)
        draw = torch.Generator().manual_seed(len(name))
        inputs[f"{name}_codes"] = torch.randint(
            CODES, inputs[f"{name}_hidden"].shape, generator=draw
        )
    for name, sentences, share in (
        ("captions", [scene.caption for scene in scenes], shares.pair_text),
        ("texts", told, shares.text),
    ):
        words, padding = text_batch(sentences, config.vocab_size)
        masked = [
            mask_words(row, share, sample_generator(0, i, len(name)), mask_id)
            for i, row in zip(samples, words, strict=True)
        ]
        inputs[f"{name}_words"], inputs[f"{name}_padding"] = words, padding
        inputs[name] = torch.stack([own.tokens for own in masked])
        inputs[f"{name}_hidden"] = torch.stack([own.hidden for own in masked])
    return inputs


def batch_of(inputs: dict[str, Tensor]) -> MaskedBatch:
    """The inputs as both models take them, on the inputs' device."""
    host = {name: own.cpu() if own.dtype == torch.bool else own for name, own in inputs.items()}
    samples = []
    for sample in range(len(host["images"])):
        own = {name: tensor[sample] for name, tensor in host.items()}
        caption, text = (_text(own, name) for name in ("captions", "texts"))
        samples.append(MaskedSample(*_image(own, "images")))
        samples.append(MaskedSample(*_image(own, "pair_images"), *caption))
        samples.append(MaskedSample(None, None, None, *text))
    return masked_batch(samples)


def step_loss(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the four means."""
    return torch.stack([losses[term].float().mean() for term in TERMS]).sum()


def mixed_work(config: BEiT3Config, inputs: dict[str, Tensor]) -> Work:
    """Forward and backward; in the last layer only hidden rows, which alone reach a head."""
    return masked_work(config, batch_of(inputs), CODES)


def _told(sample: int) -> list[str]:
    return [SCENES[(sample + i) % len(SCENES)].caption for i in range(_SENTENCES)]


def _image(own: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    return own[name], own[f"{name}_hidden"], own[f"{name}_codes"]


def _text(own: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    kept = int((~own[f"{name}_padding"]).sum())
    return own[name][:kept], own[f"{name}_hidden"][:kept], own[f"{name}_words"][:kept]
