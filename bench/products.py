"""Captions, retrieval and embeddings of files as products, beside what they are measured by.

    python -m bench.products caption --batch 8        beam search, from images to the last word
    python -m bench.products retrieval                recall on 200 images with 5 captions each
    python -m bench.products embed                    embed_dataset on 500 JPEG files

The first two run beside the released procedures on torchscale, with the same weights and the same normalised images; the
third beside the model alone on prepared batches, which is what bench/run.py times. Both sides run in turn, and the ratio
is the median of neighbouring samples. Results are compared, and no speed is printed where they differ. --quick takes a
minute or two and says little.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import beit3_fast
from beit3_fast.config import SIZES
from beit3_fast.model.registry import for_inference
from beit3_fast.retrieval import Recall, recall
from beit3_fast.timing import Effort, interleave, quantiles, speed_ups
from bench.baselines import fill, our_entrypoint
from bench.conversion import load
from bench.decode_step import measure_decode_step
from bench.inputs import SCENES, photo_batch, photo_files, text_batch, words_to_ids
from bench.official_captioning import official_captions, official_score
from bench.torchscale_heads import MODELS
from bench.workloads import Workload, move, step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CAPTIONS_AN_IMAGE = 5


@dataclass(frozen=True)
class Product:
    """Two calls that should give the same, and what says that they do not (empty: they agree)."""

    name: str
    ours: Callable[[], Any]
    official: Callable[[], Any]
    difference: Callable[[Any, Any], str]
    against: str = "the released procedure"
    details: Callable[[], dict[str, float]] = dict


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
    cpu = torch.device("cpu")
    ours = load(
        lambda: beit3_fast.create_model(name, device=torch.empty(0).device, img_size=pixels),
        official.state_dict(),
        dtype,
        cpu,
    )
    return for_inference(ours), official


def captioning(arguments: argparse.Namespace) -> Product:
    """Beam search over a batch of photographs."""
    dtype = DTYPES[arguments.dtype]
    ours, official = models("captioning", arguments.size, arguments.pixels, dtype)
    images = photo_batch(list(range(arguments.batch)), arguments.pixels).to(dtype)
    mask = ours.config.vocab_size - 9
    length = arguments.tokens + 2

    def difference(mine: Any, theirs: Any) -> str:
        pairs = [(a[0], b[0]) for a, b in zip(mine, theirs, strict=True)]
        if all(tuple(a.tokens) == b.tokens for a, b in pairs):
            return ""
        return worse_captions(official, images, mask, pairs)

    return Product(
        f"caption/{arguments.size}/{arguments.pixels}, batch {arguments.batch}, "
        f"{arguments.beams} beams, {arguments.tokens} tokens, {arguments.dtype}",
        lambda: ours.caption(
            images, arguments.beams, length, mask_id=mask, compat=True, batch_size=arguments.batch
        ),
        lambda: official_captions(official, images, mask, arguments.beams, length),
        difference,
        details=lambda: measure_decode_step(ours, images, arguments.beams, arguments.tokens, mask),
    )


def worse_captions(
    official: nn.Module, images: Tensor, mask: int, pairs: Sequence[tuple[Any, Any]]
) -> str:
    """What is wrong with (our caption, the released one) of each image, where rounding may choose other words.

    Both are judged by the score that their words have in a wider dtype: ours may be worse, and its own score further
    from it, by twice what rounding does to the released scores.
    """
    wide = torch.float32 if images.dtype == torch.bfloat16 else torch.float64
    truth = copy.deepcopy(official).to(wide)
    scores = [
        tuple(official_score(truth, image[None].to(wide), mask, own.tokens) for own in pair)
        for image, pair in zip(images, pairs, strict=True)
    ]
    limit = 2 * max(abs(b.score - own) for (_, b), (_, own) in zip(pairs, scores, strict=True))
    wrong = [
        i
        for i, ((a, _), (mine, theirs)) in enumerate(zip(pairs, scores, strict=True))
        if mine < theirs - limit or abs(a.score - mine) > limit
    ]
    return f"captions {wrong} are worse than the released ones" if wrong else ""


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


def embedding(arguments: argparse.Namespace) -> Product:
    """embed_dataset on JPEG files; the model alone gets as many images in the same batches, already decoded."""
    dtype = DTYPES[arguments.dtype]
    workload = Workload("image", arguments.size, arguments.pixels)
    ours = beit3_fast.create_model(our_entrypoint(workload), dtype=dtype, img_size=arguments.pixels)
    fill(ours)
    ours = for_inference(ours)
    processor = beit3_fast.Processor.for_model(ours)
    folder = tempfile.TemporaryDirectory(prefix="bench-products-")
    files = Path(folder.name, "photos")
    photo_files(files, arguments.images)
    inputs = move(workload.inputs(arguments.batch), dtype, torch.device("cpu"))
    runs = itertools.count()

    def embed() -> Any:
        # the folder lives as long as this function, and every call has a job of its own
        out = Path(folder.name, f"out{next(runs)}")
        return beit3_fast.embed_dataset(
            ours,
            files,
            out,
            processor=processor,
            batch_size=arguments.batch,
            workers=arguments.workers,
        )

    def alone() -> None:
        for start in range(0, arguments.images, arguments.batch):
            count = min(arguments.batch, arguments.images - start)
            step(ours, workload, {name: tensor[:count] for name, tensor in inputs.items()})

    def difference(report: Any, _: Any) -> str:
        index = beit3_fast.EmbeddingIndex.load(report.shards[0], "torch")
        expected = ours.encode_image(index.names[:4], processor=processor).float()
        found = index.embeddings[:4]
        if report.embedded != arguments.images or len(report.shards) != 1:
            return f"{report.embedded} of {arguments.images} files were embedded"
        error = float((found - expected).norm() / expected.norm())
        return "" if error < 0.02 else f"embeddings differ by {error:.3f}"

    return Product(
        f"embed/{arguments.size}/{arguments.pixels}, {arguments.images} JPEG files, batch {arguments.batch}, "
        f"{arguments.dtype}",
        embed,
        alone,
        difference,
        "the model alone",
    )


PRODUCTS = {"caption": captioning, "retrieval": retrieval, "embed": embedding}
PIXELS = {"caption": 480, "retrieval": 384, "embed": 384}
IMAGES = {"caption": 0, "retrieval": 200, "embed": 500}
# Of --quick.
QUICK_PIXELS, QUICK_IMAGES, QUICK_BATCH, QUICK_TOKENS = 224, 16, 2, 8


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, time, print; 1 where the results differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("product", choices=PRODUCTS)
    parser.add_argument("--size", default="base", choices=("tiny", "base", "large"))
    parser.add_argument("--pixels", type=int, help="480 for captions, 384 for the others")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--images", type=int, help="200 for retrieval, 500 for embed")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="decoding processes of embed")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round with few small images, whatever the options say",
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.pixels = arguments.pixels or PIXELS[arguments.product]
    arguments.images = arguments.images or IMAGES[arguments.product]
    if arguments.quick:
        arguments.rounds = 1
        arguments.pixels = min(arguments.pixels, QUICK_PIXELS)
        arguments.images = min(arguments.images, QUICK_IMAGES)
        arguments.batch = min(arguments.batch, QUICK_BATCH)
        arguments.tokens = min(arguments.tokens, QUICK_TOKENS)
    product = PRODUCTS[arguments.product](arguments)
    results: dict[str, Any] = {}

    def keep(name: str, call: Callable[[], Any]) -> None:
        results[name] = call()

    calls = {
        "ours": partial(keep, "ours", product.ours),
        "official": partial(keep, "official", product.official),
    }
    samples = interleave(calls, Effort(warmup=0, rounds=arguments.rounds, seconds=0.0))
    difference = product.difference(results["ours"], results["official"])
    if difference:
        print(f"{product.name}: {difference}; no speed is reported", file=sys.stderr)
        return 1
    ratio = speed_ups(samples["ours"], samples["official"])
    report = {
        "product": product.name,
        "against": product.against,
        "threads": torch.get_num_threads(),
        "seconds": {name: asdict(quantiles(own)) for name, own in samples.items()},
        "speed_up": asdict(ratio),
        **product.details(),
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        ours, official = (quantiles(samples[name]).p50 for name in ("ours", "official"))
        print(
            f"{product.name}: {ratio.p50:.2f}x as fast as {product.against} ({ours:.2f} s against {official:.2f} s)"
        )
        if "of_floor" in report:
            print(
                f"a step: {report['step_ms']} ms, {report['of_floor']} times its memory floor of {report['floor_ms']} ms "
                f"(reading at {report['read_gbps']} GB/s)"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
