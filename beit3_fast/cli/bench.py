"""``beit3-fast bench``: how fast a model embeds here. bench/run.py compares with other runtimes; both use ``timing``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from beit3_fast.cli.command import Command
from beit3_fast.cli.options import (
    add_num_classes,
    add_runtime,
    check_model_name,
    make_model,
    positive,
    show,
)
from beit3_fast.errors import ConfigError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="such as beit3_base_patch16_384_retrieval"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="an official .pth, or .safetensors; without it weights are random, which take as long",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=24,
        metavar="N",
        help="of every text, its beginning and end included (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=10,
        metavar="N",
        help="the measurement goes on for this long, or three rounds (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads; default: PyTorch's choice"
    )
    add_num_classes(parser)
    add_runtime(parser)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from beit3_fast.timing import Effort, interleave, quantiles, rates, synchronizer

    check_model_name(arguments.model)
    if arguments.threads is not None:
        most = os.cpu_count() or 1
        if arguments.threads > most:
            raise ConfigError(
                f"--threads takes at most {most} on this machine, got {arguments.threads}"
            )
        torch.set_num_threads(arguments.threads)
    model = make_model(arguments)
    batch = arguments.batch_size
    effort = Effort(warmup=1, rounds=3, seconds=float(arguments.seconds))
    wait = synchronizer(torch.device(arguments.device))
    samples = interleave(_calls(model, batch, arguments.tokens), effort, synchronize=wait)
    report = [
        {
            "input": name,
            "model": arguments.model,
            "device": arguments.device,
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "batch": batch,
            "rounds": len(seconds),
            "samples_per_s": asdict(rates(seconds, batch)),
            "latency_ms": asdict(quantiles([1e3 * own for own in seconds])),
        }
        for name, seconds in samples.items()
    ]
    lines = [
        f"{arguments.model} in {arguments.dtype} on {arguments.device}, {torch.get_num_threads()} threads, "
        f"batches of {batch}"
    ]
    for row in report:
        rate, latency = row["samples_per_s"], row["latency_ms"]
        lines.append(
            f"{row['input']}: {rate['p50']:.1f} samples/s ({rate['p20']:.1f} to {rate['p80']:.1f}), "
            f"{latency['p50']:.1f} ms a batch ({row['rounds']} rounds)"
        )
    return show(arguments, report, lines)


def _calls(model: Any, batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    """One call for each kind of input, on prepared tensors: files are not read, pictures not decoded."""
    import torch

    from beit3_fast.data.tokenizer import BOS, EOS

    config = model.config
    most = config.max_text_positions - 2
    if not 2 <= tokens <= most:
        raise ConfigError(f"--tokens must be between 2 and {most} for this model, got {tokens}")
    generator = torch.Generator().manual_seed(0)
    place = next(model.parameters())
    images = torch.rand(batch, config.in_chans, *config.image_shape, generator=generator) * 2 - 1
    images = images.to(place.device, place.dtype)
    words = torch.randint(4, config.vocab_size, (batch, tokens), generator=generator)
    words[:, 0], words[:, -1] = BOS, EOS
    texts = list(words.to(place.device))
    return {
        "image": lambda: model.encode_image(images, batch_size=batch),
        "text": lambda: model.encode_text(texts, batch_size=batch),
        "pair": lambda: model.encode_pair(images, texts, batch_size=batch),
    }


BENCH = Command(
    summary="Measure how many images, texts and pairs a second a model embeds on this machine.",
    example="beit3-fast bench --model beit3_base_patch16_384_retrieval --batch-size 8",
    arguments=_arguments,
    run=_run,
)
