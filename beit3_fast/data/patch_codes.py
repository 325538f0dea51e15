"""Visual tokens without a trained tokenizer: the nearest of a few typical patches.

A stand-in for BEiT v2's VQ-KD where images are simple: k-means on the pixels of patches. Its tokens tell colours and edges
apart and know nothing of meaning; a model learns from them where things go on behind a mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.errors import ConfigError, ShapeError

_ITERATIONS = 12
_MOST_PATCHES = 20_000


class PatchCodes:
    """images [B, 3, H, W] -> int64 [B, patches], row by row; ``centres`` float32 [codes, 3 * patch_size ** 2]."""

    def __init__(self, centres: Tensor, patch_size: int) -> None:
        if centres.dim() != 2 or centres.shape[1] != 3 * patch_size**2 or not len(centres):
            raise ShapeError(
                f"centres must be [codes, 3 * patch_size ** 2] = [codes, {3 * patch_size**2}], got {list(centres.shape)}"
            )
        self.centres = centres.float()
        self.patch_size = patch_size

    @classmethod
    def fit(
        cls, images: Sequence[Tensor], num_codes: int, patch_size: int, seed: int = 0
    ) -> PatchCodes:
        """Typical patches of images [3, H, W], the same for the same images and seed.

        Raises ConfigError where the images have fewer different patches than ``num_codes``.
        """
        patches = torch.cat([_patches(image[None].float(), patch_size)[0] for image in images])
        generator = torch.Generator().manual_seed(seed)
        patches = patches[torch.randperm(len(patches), generator=generator)[:_MOST_PATCHES]]
        different = patches.unique(dim=0)
        if len(different) < num_codes:
            raise ConfigError(
                f"num_codes must be at most {len(different)}, the different patches of these images, got {num_codes}"
            )
        centres = _spread(different, num_codes, generator)
        for _ in range(_ITERATIONS):
            distances, own = torch.cdist(patches, centres).min(dim=1)
            counts = own.bincount(minlength=num_codes)
            sums = torch.zeros_like(centres).index_add_(0, own, patches)
            centres = sums / counts.clamp(min=1)[:, None]
            # A centre that nobody is near begins again at the patches that fit worst.
            unused = (counts == 0).nonzero().flatten()
            centres[unused] = patches[distances.topk(num_codes).indices[: len(unused)]]
        return cls(centres, patch_size)

    @property
    def num_codes(self) -> int:
        """Visual tokens in all."""
        return len(self.centres)

    @property
    def identity(self) -> str:
        """A digest of the centres."""
        return hashlib.sha256(self.centres.numpy().tobytes()).hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        """The code of each patch. Raises ShapeError for images that are not [B, 3, H, W] in whole patches."""
        patches = _patches(images.float(), self.patch_size)
        # As one matrix: in batches torch.cdist takes seven times as long.
        distances = torch.cdist(patches.flatten(0, 1), self.centres.to(images.device))
        return distances.argmin(dim=1).view(patches.shape[:2])


def _spread(patches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of the patches, far from each other more often than not (k-means++)."""
    chosen = [int(torch.randint(len(patches), (), generator=generator))]
    distances = torch.full((len(patches),), torch.inf)
    for _ in range(count - 1):
        distances = torch.minimum(distances, (patches - patches[chosen[-1]]).square().sum(1))
        chosen.append(int(torch.multinomial(distances, 1, generator=generator)))
    return patches[chosen].clone()


def _patches(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, patches, 3 * patch_size ** 2]."""
    if images.dim() != 4 or images.shape[1] != 3 or any(n % patch_size for n in images.shape[2:]):
        raise ShapeError(
            f"images must be [B, 3, H, W] with H and W multiples of {patch_size}, got {list(images.shape)}"
        )
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)
