"""How well a visual tokenizer names what its teacher sees, and how much of its codebook it needs for it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from beit3_fast.data.image_data import ImageData
from beit3_fast.model.visual_tokenizer import VisualTokenizer
from beit3_fast.train.recipe_file import check_count
from beit3_fast.train.teachers import Teacher


class TokenizerScore(NamedTuple):
    """``cosine`` between the features told from the codes and the teacher's, and ``mean_cosine``, what their mean over all patches
    would get; ``used``: the share of the codes that came up; ``perplexity``: of the codes, at most as many as there are."""

    cosine: float
    mean_cosine: float
    used: float
    perplexity: float


@torch.no_grad()
def score_tokenizer(
    tokenizer: VisualTokenizer, teacher: Teacher, data: ImageData, batches: int
) -> TokenizerScore:
    """Over micro-batches 0 to ``batches`` - 1; the tokenizer is left in evaluation mode. Raises ConfigError for no batches."""
    check_count("batches", batches, 1)
    tokenizer.eval()
    device = next(tokenizer.parameters()).device
    cosines, codes, targets = [], [], []
    for number in range(batches):
        images = data[number].to(device).images
        made, target = tokenizer(images), teacher(images)
        cosines.append(F.cosine_similarity(made.features, target, dim=-1).mean())
        codes.append(made.codes.flatten())
        targets.append(F.normalize(target.flatten(0, 1), dim=-1))
    directions = torch.cat(targets)
    counts = torch.cat(codes).bincount(minlength=tokenizer.config.num_codes).double()
    shares = counts / counts.sum()
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    return TokenizerScore(
        cosine=float(torch.stack(cosines).mean()),
        mean_cosine=float((directions @ F.normalize(directions.mean(0), dim=0)).mean()),
        used=float((counts > 0).double().mean()),
        perplexity=math.exp(entropy),
    )
