"""Captions and retrieval, from images to the last number, beside the released procedures on torchscale.

    python -m bench.products caption --pixels 480 --batch 8
    python -m bench.products retrieval --pixels 384 --images 200

Both sides get the same weights and the same normalised images; the results are compared first, and no speed is printed
where they differ. Then both run in turn, and the ratio is the median of neighbouring samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import beit3_fast
from beit3_fast.config import SIZES
from beit3_fast.model.registry import for_inference
from beit3_fast.retrieval import Recall, recall
from beit3_fast.timing import Effort, interleave, quantiles, speed_ups
from bench.baselines import fill
from bench.inputs import SCENES, photo_batch, text_batch, words_to_ids
from bench.official_captioning import official_captions
from bench.torchscale_heads import MODELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CAPTIONS_AN_IMAGE = 5


@dataclass(frozen=True)
class Product:
    """Two calls that should give the same, and what says that they do not (empty: they agree)."""

    name: str
    ours: Callable[[], Any]
    official: Callable[[], Any]
    difference: Callable[[Any, Any], str]


def models(task: str, size: str, pixels: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """(ours, torchscale's) with the same weights."""
    config = SIZES[size].replace(img_size=pixels)
    official: nn.Module = MODELS[task](config)
    with torch.no_grad():
        fill(official)
        if task == "captioning":
            # The end is never chosen, so that both sides decode every step.
            official.get_parameter("mlm_head.bias")[2] = -1e4
    official.eval().to(dtype)
    shipped = {"base": 224, "large": 224, "tiny": 32}[size]
    name = f"beit3_{size}_patch{config.patch_size}_{shipped}_{task}"
    ours = beit3_fast.create_model(name, dtype=dtype, img_size=pixels)
    ours.load_state_dict(official.state_dict())
    return for_inference(ours), official


def captioning(arguments: argparse.Namespace) -> Product:
    """Beam search over a batch of photographs."""
    dtype = DTYPES[arguments.dtype]
    ours, official = models("captioning", arguments.size, arguments.pixels, dtype)
    images = photo_batch(list(range(arguments.batch)), arguments.pixels).to(dtype)
    mask = ours.config.vocab_size - 9
    length = arguments.tokens + 2

    def difference(mine: Any, theirs: Any) -> str:
        wrong = [
            i
            for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
            if a[0].tokens != b[0].tokens and abs(a[0].score - b[0].score) > 1e-3 * abs(b[0].score)
        ]
        return f"captions {wrong} differ" if wrong else ""

    return Product(
        f"caption/{arguments.size}/{arguments.pixels}, batch {arguments.batch}, "
        f"{arguments.beams} beams, {arguments.tokens} tokens, {arguments.dtype}",
        lambda: ours.caption(
            images, arguments.beams, length, mask_id=mask, compat=True, batch_size=arguments.batch
        ),
        lambda: official_captions(official, images, mask, arguments.beams, length),
        difference,
    )


def retrieval(arguments: argparse.Namespace) -> Product:
    """Recall on photographs with five captions each."""
    dtype = DTYPES[arguments.dtype]
    ours, official = models("retrieval", arguments.size, arguments.pixels, dtype)
    images = photo_batch(list(range(arguments.images)), arguments.pixels).to(dtype)
    texts = [
        f"{SCENES[image % len(SCENES)].caption} {number}"
        for image in range(arguments.images)
        for number in range(CAPTIONS_AN_IMAGE)
    ]
    owner = [image for image in range(arguments.images) for _ in range(CAPTIONS_AN_IMAGE)]
    ids = [torch.tensor(words_to_ids(text, ours.config.vocab_size)) for text in texts]

    def mine() -> Recall:
        return recall(ours.encode_image(images), ours.encode_text(ids), owner)

    return Product(
        f"retrieval/{arguments.size}/{arguments.pixels}, {arguments.images} images with "
        f"{CAPTIONS_AN_IMAGE} captions each, {arguments.dtype}",
        mine,
        lambda: official_recall(official, images, texts, owner, arguments.batch),
        lambda a, b: "" if abs(a.mean - b.mean) < 0.01 else f"recall {a} and {b}",
    )


@torch.no_grad()
def official_recall(
    model: Any, images: Tensor, texts: list[str], owner: list[int], batch: int
) -> Recall:
    """The released evaluation: every caption comes with its image, which is encoded with each of them."""
    vocabulary = model.beit3.text_embed.weight.shape[0]
    vision: dict[int, Tensor] = {}
    language: list[Tensor] = []
    for start in range(0, len(texts), batch):
        own = owner[start : start + batch]
        ids, padding = text_batch(texts[start : start + batch], vocabulary)
        embedded, _ = model(image=images[own])
        vision |= dict(zip(own, embedded, strict=True))
        language.append(model(text_description=ids, padding_mask=padding)[1])
    rows = torch.stack([vision[image] for image in range(len(images))])
    return recall(rows, torch.cat(language), owner)


PRODUCTS = {"caption": captioning, "retrieval": retrieval}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, time, print; 1 where the results differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("product", choices=PRODUCTS)
    parser.add_argument("--size", default="base", choices=("tiny", "base", "large"))
    parser.add_argument("--pixels", type=int, default=480)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    product = PRODUCTS[arguments.product](arguments)
    difference = product.difference(product.ours(), product.official())
    if difference:
        print(f"{product.name}: {difference}; no speed is reported", file=sys.stderr)
        return 1
    effort = Effort(warmup=0, rounds=arguments.rounds, seconds=0.0)
    samples = interleave({"ours": product.ours, "official": product.official}, effort)
    ratio = speed_ups(samples["ours"], samples["official"])
    report = {
        "product": product.name,
        "threads": torch.get_num_threads(),
        "seconds": {name: asdict(quantiles(own)) for name, own in samples.items()},
        "speed_up": asdict(ratio),
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        ours, official = (quantiles(samples[name]).p50 for name in ("ours", "official"))
        print(f"{product.name}: {ratio.p50:.2f}x as fast ({ours:.2f} s against {official:.2f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
