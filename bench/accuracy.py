"""How far a lower dtype moves a model's outputs: cosine of every token, error and first answer, against fp32.

    python bench/accuracy.py                     # int8, 1,000 pairs of a photograph's piece and a question
    python bench/accuracy.py --dtypes int8 float8 bfloat16 --samples 100

Weights are random in the official layout, which is harder on the first answer than trained ones are: nothing was
learned, so no answer stands out. Cosines and errors are of the same kind as with trained weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

import beit3_fast
from beit3_fast.model.registry import for_inference, to_float8, to_int8
from beit3_fast.ops import library
from bench.baselines import fill
from bench.environment import environment
from bench.inputs import SCENES, photo_pieces, text_batch

MODEL = "beit3_base_patch16_480_vqav2"
PIXELS = 224
DTYPES = ("int8", "float8", "bfloat16")
ROUNDED = {"int8": to_int8, "float8": to_float8}


def model_in(dtype: str) -> Any:
    """The model with the benchmark's random weights."""
    model = beit3_fast.create_model(MODEL, img_size=PIXELS, device="meta").to_empty(device="cpu")
    fill(model)
    if dtype in ROUNDED:
        return ROUNDED[dtype](model)
    return for_inference(model.to(getattr(torch, dtype)))


def samples(first: int, count: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of photographs [B, 3, P, P] and questions about all of them [B, N], with their padding."""
    numbers = range(first, first + count)
    questions = [SCENES[i * 5 % len(SCENES)].question for i in numbers]
    return photo_pieces(numbers, PIXELS), *text_batch(questions, vocabulary)


@torch.inference_mode()
def outputs(model: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states of every real token [R, C] and scores [B, answers], in fp32."""
    image, text, padding = inputs
    image = image.to(next(model.parameters()).dtype)
    hidden = model.beit3(text, image, text_padding_position=padding)["encoder_out"]
    seen = torch.cat([padding.new_zeros(len(image), hidden.shape[1] - text.shape[1]), padding], 1)
    return hidden[~seen].float(), model(image, text, padding.long()).float()


def compare(dtype: str, count: int, batch: int) -> dict[str, float]:
    """Figures of ``count`` samples in ``dtype`` against fp32."""
    reference, other = model_in("float32"), model_in(dtype)
    vocabulary = reference.beit3.config.vocab_size
    cosines: list[Tensor] = []
    square_error = square = 0.0
    first = within = 0
    begin = time.monotonic()
    for start in range(0, count, batch):
        inputs = samples(start, min(batch, count - start), vocabulary)
        (hidden, scores), (found, found_scores) = outputs(reference, inputs), outputs(other, inputs)
        cosines.append(torch.cosine_similarity(found, hidden, dim=1))
        square_error += float((found_scores - scores).double().square().sum())
        square += float(scores.double().square().sum())
        best = found_scores.argmax(1, keepdim=True)
        first += int((best == scores.argmax(1, keepdim=True)).sum())
        within += int((scores.topk(5).indices == best).any(1).sum())
        print(
            f"\r{dtype}: {start + len(scores)} of {count}, {time.monotonic() - begin:.0f} s", end=""
        )
    print()
    cosine = torch.cat(cosines).sort().values
    return {
        "mean cosine": cosine.mean().item(),
        "1 % of tokens below": cosine[len(cosine) // 100].item(),
        "lowest cosine": cosine[0].item(),
        "error of the scores": (square_error / square) ** 0.5,
        "same first answer": first / count,
        "first answer in fp32's first five": within / count,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table. Returns the exit code."""
    about, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["int8"])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.samples < 1 or options.batch < 1:
        parser.error("--samples and --batch must be at least 1")
    figures = {d: compare(d, options.samples, options.batch) for d in options.dtypes}
    machine = environment(torch.get_num_threads(), torch.device("cpu"))
    print(
        f"{machine['date']}, {MODEL} at {PIXELS} pixels, {options.samples} samples, "
        f"{library.cpu_isa()} kernels, {machine['cpu']}"
    )
    print(f"\n| against float32 | {' | '.join(figures)} |\n|---|{'---:|' * len(figures)}")
    for name in next(iter(figures.values())):
        print(f"| {name} | {' | '.join(f'{column[name]:.4f}' for column in figures.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
