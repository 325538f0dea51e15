"""The kinds of work that are measured: one entry of TASKS each.

All runtimes get the same tensors through the official forward signatures, text padded to the longest of
the batch (the best case of a runtime that computes padding; the official recipes pad to 64).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.model.work import Work, embedding_work, encoder_work, linear_work, training_work
from bench import pretraining
from bench.inputs import EOS, SCENES, photo_batch, text_batch

Inputs = dict[str, Tensor]


class Output(NamedTuple):
    """One tensor that parity is judged on."""

    value: Tensor
    gradient: bool = False


def _call(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs)


@dataclass(frozen=True)
class Task:
    """One kind of work.

    about: one line for --help and the report.
    model: "backbone", or the head's name as in the official entrypoints.
    inputs: (configuration, sample indices) -> arguments of the forward; floating-point ones are fp32.
    outputs: (raw output, inputs) -> the tensors to compare, real rows only.
    work: (configuration, inputs) -> the operations that the answer needs.
    values: numbers in the output of one sample. With few, parity is judged over several batches: the ratio of
        two errors of a handful of numbers says nothing.
    run: the step that is timed.
    train: whether the step computes gradients.
    """

    about: str
    model: str
    inputs: Callable[[BEiT3Config, list[int]], Inputs]
    outputs: Callable[[Any, Inputs], dict[str, Output]]
    work: Callable[[BEiT3Config, Inputs], Work]
    values: int = 512
    run: Callable[[nn.Module, Inputs], Any] = field(default=_call)
    train: bool = False


def _captions(config: BEiT3Config, samples: list[int]) -> tuple[Tensor, Tensor]:
    return text_batch([SCENES[i % len(SCENES)].caption for i in samples], config.vocab_size)


def _images(config: BEiT3Config, samples: list[int]) -> Tensor:
    return photo_batch(samples, config.image_shape[0])


def _lengths(padding: Tensor) -> list[int]:
    lengths: list[int] = (~padding.bool()).sum(1).tolist()
    return lengths


def _patch_work(config: BEiT3Config, images: Tensor) -> Work:
    return embedding_work(config, len(images))


# image: the plain backbone on images, every row compared


def _image_inputs(config: BEiT3Config, samples: list[int]) -> Inputs:
    return {"visual_tokens": _images(config, samples)}


def _image_outputs(raw: Any, inputs: Inputs) -> dict[str, Output]:
    return {"encoder_out": Output(raw["encoder_out"])}


def _image_work(config: BEiT3Config, inputs: Inputs) -> Work:
    images = inputs["visual_tokens"]
    texts = [0] * len(images)
    return _patch_work(config, images) + encoder_work(config, config.num_vision_tokens, texts)


# pair: the plain backbone on an image and a caption each, every real row compared


def _pair_inputs(config: BEiT3Config, samples: list[int]) -> Inputs:
    ids, padding = _captions(config, samples)
    return {
        "visual_tokens": _images(config, samples),
        "textual_tokens": ids,
        "text_padding_position": padding,
    }


def _pair_outputs(raw: Any, inputs: Inputs) -> dict[str, Output]:
    states, padding = raw["encoder_out"], inputs["text_padding_position"]
    vision = states.shape[1] - padding.shape[1]
    text = states[:, vision:][~padding]
    return {"vision rows": Output(states[:, :vision].flatten(0, 1)), "text rows": Output(text)}


def _pair_work(config: BEiT3Config, inputs: Inputs) -> Work:
    lengths = _lengths(inputs["text_padding_position"])
    return _patch_work(config, inputs["visual_tokens"]) + encoder_work(
        config, config.num_vision_tokens, lengths
    )


# vqa: question answering; the head reads the image's CLS row


def _vqa_inputs(config: BEiT3Config, samples: list[int]) -> Inputs:
    questions = [SCENES[i % len(SCENES)].question for i in samples]
    ids, padding = text_batch(questions, config.vocab_size)
    return {"image": _images(config, samples), "question": ids, "padding_mask": padding}


def _logits(raw: Any, inputs: Inputs) -> dict[str, Output]:
    return {"logits": Output(raw)}


def _vqa_work(config: BEiT3Config, inputs: Inputs) -> Work:
    lengths, width = _lengths(inputs["padding_mask"]), config.embed_dim
    batch = len(lengths)
    return (
        _patch_work(config, inputs["image"])
        + encoder_work(config, config.num_vision_tokens, lengths, read=[1] * batch)
        + linear_work(batch, width, width)
        + linear_work(batch, width, 2 * width, 3129)
    )


# nlvr2: a sentence about two images; the head reads CLS and BOS of both passes


def _nlvr2_inputs(config: BEiT3Config, samples: list[int]) -> Inputs:
    statements = [SCENES[i % len(SCENES)].statement for i in samples]
    ids, padding = text_batch(statements, config.vocab_size)
    return {
        "image_a": _images(config, samples),
        "image_b": _images(config, [i + 1 for i in samples]),
        "text_description": ids,
        "padding_mask": padding,
    }


def _nlvr2_work(config: BEiT3Config, inputs: Inputs) -> Work:
    lengths, width = _lengths(inputs["padding_mask"]) * 2, config.embed_dim
    return (
        embedding_work(config, 2 * len(inputs["image_a"]))
        + encoder_work(config, config.num_vision_tokens, lengths, read=[2] * len(lengths))
        + linear_work(len(lengths) // 2, 4 * width, 2 * width, 2)
    )


# retrieval-text: the text tower of retrieval; the head reads BOS


def _retrieval_text_inputs(config: BEiT3Config, samples: list[int]) -> Inputs:
    ids, padding = _captions(config, samples)
    return {"text_description": ids, "padding_mask": padding}


def _run_retrieval_text(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs, only_infer=True)


def _retrieval_text_outputs(raw: Any, inputs: Inputs) -> dict[str, Output]:
    return {"language_cls": Output(raw[1])}


def _retrieval_text_work(config: BEiT3Config, inputs: Inputs) -> Work:
    lengths = _lengths(inputs["padding_mask"])
    return encoder_work(config, 0, lengths, read=[1] * len(lengths)) + linear_work(
        len(lengths), config.embed_dim, config.embed_dim
    )


# caption: one teacher-forced forward; every second word is to be predicted


def _caption_inputs(config: BEiT3Config, samples: list[int]) -> Inputs:
    ids, padding = _captions(config, samples)
    hidden = (torch.arange(ids.shape[1]) % 2 == 1) & ~padding & (ids != EOS)
    mask_id = min(64001, config.vocab_size - 1)
    return {
        "image": _images(config, samples),
        "text_ids": ids.masked_fill(hidden, mask_id),
        "padding_mask": padding,
        "language_masked_pos": hidden,
    }


def _caption_outputs(raw: Any, inputs: Inputs) -> dict[str, Output]:
    return {"logits": Output(raw[0])}


def _caption_work(config: BEiT3Config, inputs: Inputs) -> Work:
    hidden = inputs["language_masked_pos"]
    read: list[int] = hidden.sum(1).tolist()
    return (
        _patch_work(config, inputs["image"])
        + encoder_work(
            config,
            config.num_vision_tokens,
            _lengths(inputs["padding_mask"]),
            read=read,
            seq2seq=True,
        )
        + linear_work(sum(read), config.embed_dim, config.vocab_size)
    )


# train: one forward and backward of image classification


def _train_inputs(config: BEiT3Config, samples: list[int]) -> Inputs:
    labels = torch.tensor([(37 * i + 11) % 1000 for i in samples])
    return {"image": _images(config, samples), "labels": labels}


def _run_train(model: nn.Module, inputs: Inputs) -> Any:
    model.zero_grad(set_to_none=True)
    logits = model(inputs["image"])
    F.cross_entropy(logits.float(), inputs["labels"]).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def _train_outputs(raw: Any, inputs: Inputs) -> dict[str, Output]:
    logits, gradients = raw
    return {"logits": Output(logits), **_gradients(gradients)}


def _gradients(gradients: Inputs) -> dict[str, Output]:
    return {
        f"gradient of {name}": Output(gradient.clone(), gradient=True)
        for name, gradient in gradients.items()
        # Softmax does not see a constant added to all keys: this gradient is zero but for rounding.
        if not name.endswith(("k_proj.A.bias", "k_proj.B.bias"))
    }


def _train_work(config: BEiT3Config, inputs: Inputs) -> Work:
    images = inputs["image"]
    tokens = config.num_vision_tokens
    read = [tokens - 1] * len(images)
    forward = encoder_work(config, tokens, [0] * len(images), read=read)
    forward += linear_work(len(images), config.embed_dim, 1000)
    return training_work(_patch_work(config, images), forward)


# train-vqa: one forward and backward of question answering; two answers of each question count, one of them half


def _train_vqa_inputs(config: BEiT3Config, samples: list[int]) -> Inputs:
    targets = torch.zeros(len(samples), 3129)
    for row, i in enumerate(samples):
        targets[row, (37 * i + 11) % 3129] = 1.0
        targets[row, (53 * i + 7) % 3129] = 0.5
    return {**_vqa_inputs(config, samples), "targets": targets}


def _run_train_vqa(model: nn.Module, inputs: Inputs) -> Any:
    model.zero_grad(set_to_none=True)
    own = {name: inputs[name] for name in ("image", "question", "padding_mask")}
    logits = model(**own)
    targets = inputs["targets"].float()
    F.binary_cross_entropy_with_logits(logits.float(), targets).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def _train_vqa_outputs(raw: Any, inputs: Inputs) -> dict[str, Output]:
    # No answer depends on the last layer's text rows: torchscale has gradients of zeros where others have none.
    logits, gradients = raw
    return _train_outputs((logits, {n: g for n, g in gradients.items() if bool(g.any())}), inputs)


def _train_vqa_work(config: BEiT3Config, inputs: Inputs) -> Work:
    patches = _patch_work(config, inputs["image"])
    whole = _vqa_work(config, inputs)
    forward = replace(whole, products=whole.products[len(patches.products) :])
    return training_work(patches, forward)


# pretrain: the mixed step of masked data modelling


def _run_pretrain(model: nn.Module, inputs: Inputs) -> Any:
    model.zero_grad(set_to_none=True)
    losses = model(pretraining.batch_of(inputs))
    pretraining.step_loss(losses).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # Losses are of higher precision than the model; what is judged is the model's.
    dtype = inputs["images"].dtype
    return {term: own.detach().to(dtype) for term, own in losses.items()}, gradients


def _pretrain_outputs(raw: Any, inputs: Inputs) -> dict[str, Output]:
    losses, gradients = raw
    terms = {f"losses of {term}": Output(own) for term, own in losses.items()}
    return {**terms, **_gradients(gradients)}


TASKS: Mapping[str, Task] = {
    "image": Task(
        "plain backbone on photographs, all rows",
        "backbone",
        _image_inputs,
        _image_outputs,
        _image_work,
    ),
    "pair": Task(
        "plain backbone on photographs with captions of 8 to 32 tokens, all real rows",
        "backbone",
        _pair_inputs,
        _pair_outputs,
        _pair_work,
    ),
    "vqa": Task(
        "visual question answering, 3129 answers", "vqav2", _vqa_inputs, _logits, _vqa_work
    ),
    "nlvr2": Task(
        "visual reasoning over two photographs",
        "nlvr2",
        _nlvr2_inputs,
        _logits,
        _nlvr2_work,
        values=2,
    ),
    "retrieval-text": Task(
        "text embeddings for retrieval",
        "retrieval",
        _retrieval_text_inputs,
        _retrieval_text_outputs,
        _retrieval_text_work,
        run=_run_retrieval_text,
    ),
    "caption": Task(
        "captioning, one teacher-forced forward, every second word masked",
        "captioning",
        _caption_inputs,
        _caption_outputs,
        _caption_work,
    ),
    "train": Task(
        "image classification, one forward and backward, 1000 classes",
        "imageclassification",
        _train_inputs,
        _train_outputs,
        _train_work,
        run=_run_train,
        train=True,
    ),
    "train-vqa": Task(
        "visual question answering, one forward and backward, 3129 answers",
        "vqav2",
        _train_vqa_inputs,
        _train_vqa_outputs,
        _train_vqa_work,
        run=_run_train_vqa,
        train=True,
    ),
    "pretrain": Task(
        "masked data modelling, one forward and backward of an image, a pair and a text for each of the batch",
        "pretraining",
        pretraining.mixed_inputs,
        _pretrain_outputs,
        pretraining.mixed_work,
        run=_run_pretrain,
        train=True,
    ),
}
