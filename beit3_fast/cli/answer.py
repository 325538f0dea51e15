"""``beit3-fast answer`` and ``beit3-fast reason``: questions about an image, statements about two."""

from __future__ import annotations

import argparse

from beit3_fast.cli.command import Command
from beit3_fast.cli.options import add_model, guess_lines, guesses, load_model, positive, show


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument(
        "--answers",
        required=True,
        metavar="FILE",
        help="answer2label.txt, or one answer a line in the order of the classes",
    )
    parser.add_argument(
        "--top-k", type=positive, default=5, metavar="N", help="default: %(default)s"
    )
    add_model(parser, "beit3_base_patch16_480_vqav2", tokenizer=True)


def _answer(arguments: argparse.Namespace) -> int:
    from beit3_fast.data import read_labels

    arguments.names = read_labels(arguments.answers)
    model, processor = load_model(arguments, "vqav2", "answer")
    found = model.answer(
        arguments.image,
        arguments.questions,
        arguments.top_k,
        labels=arguments.names,
        processor=processor,
        batch_size=arguments.batch_size,
    )
    pairs = list(zip(arguments.questions, found, strict=True))
    report = [
        {"image": arguments.image, "question": question, "answers": guesses(own)}
        for question, own in pairs
    ]
    lines = [line for question, own in pairs for line in (question, *guess_lines(own))]
    return show(arguments, report, lines)


def _reason_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", metavar="LEFT", help="the first image")
    parser.add_argument("right", metavar="RIGHT", help="the second image")
    parser.add_argument("sentences", nargs="+", metavar="SENTENCE", help="statements about both")
    add_model(parser, "beit3_base_patch16_224_nlvr2", tokenizer=True)


def _reason(arguments: argparse.Namespace) -> int:
    model, processor = load_model(arguments, "nlvr2", "reason")
    found = model.reason(
        arguments.left,
        arguments.right,
        arguments.sentences,
        processor=processor,
        batch_size=arguments.batch_size,
    )
    report = [
        {"sentence": sentence, "true": p > 0.5, "probability": p}
        for sentence, p in zip(arguments.sentences, found, strict=True)
    ]
    lines = [
        f"{'true ' if p > 0.5 else 'false'}  {p:.3f}  {sentence}"
        for sentence, p in zip(arguments.sentences, found, strict=True)
    ]
    return show(arguments, report, lines)


ANSWER = Command(
    summary="Answer questions about an image.",
    example='beit3-fast answer photo.jpg "What is on the table?" --answers answer2label.txt '
    "--model beit3_base_patch16_480_vqav2 --checkpoint beit3_base_patch16_480_vqa.pth --tokenizer beit3.spm",
    arguments=_answer_arguments,
    run=_answer,
)
REASON = Command(
    summary="Say whether sentences are true of two images.",
    example='beit3-fast reason left.jpg right.jpg "Both photographs show an animal." '
    "--model beit3_base_patch16_224_nlvr2 --checkpoint beit3_base_patch16_224_nlvr2.pth --tokenizer beit3.spm",
    arguments=_reason_arguments,
    run=_reason,
)
