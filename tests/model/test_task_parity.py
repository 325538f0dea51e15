"""The five released tasks against their heads restated on torchscale's own BEiT3, same weights and inputs."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from _compat import (
    DTYPES,
    SHAPES,
    impls,
    need_torchscale,
    official_caption_step,
    official_loss,
    official_task,
    reorder_cache,
)
from torch import Tensor

from beit3_fast.integrations.torchscale import accelerate
from beit3_fast.model import (
    BEiT3ForCaptioning,
    BEiT3ForImageClassification,
    BEiT3ForRetrieval,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
    encoder,
)
from beit3_fast.parity import Parity, assert_parity, model_parity

need_torchscale()

OURS: dict[str, Any] = {
    "imageclassification": BEiT3ForImageClassification,
    "nlvr2": BEiT3ForVisualReasoning,
    "vqav2": BEiT3ForVisualQuestionAnswering,
    "captioning": BEiT3ForCaptioning,
    "retrieval": BEiT3ForRetrieval,
}
# As released; enough classes for a steady judgement of 16-bit results.
CONFIGS = {
    task: {
        shape: config.replace(normalize_output=task not in ("imageclassification", "vqav2"))
        for shape, config in SHAPES.items()
    }
    for task in OURS
}
CLASSES = {"imageclassification": 1000, "nlvr2": 150, "vqav2": 3129}
BATCH, TEXT = 4, 8
PADDINGS = {"none": [8, 8, 8, 8], "right": [8, 3, 6, 1]}


@cache
def official(task: str, shape: str, dtype: str) -> Any:
    model = official_task(task, CONFIGS[task][shape], *_classes(task))
    return model.to(DTYPES[dtype])


@cache
def ours(task: str, shape: str, dtype: str) -> Any:
    model = OURS[task](CONFIGS[task][shape], *_classes(task)).to(DTYPES[dtype])
    model.load_state_dict(official(task, shape, dtype).state_dict(), strict=True)
    return model.eval()


def _classes(task: str) -> list[int]:
    return [CLASSES[task]] if task in CLASSES else []


@cache
def accelerated(task: str, shape: str, dtype: str, impl: str) -> Any:
    return accelerate(copy.deepcopy(official(task, shape, dtype)), impl)


def models(task: str, shape: str, dtype: str, impl: str) -> dict[str, Any]:
    slim = ours(task, shape, dtype)
    slim.beit3.impl = impl
    return {"slim": slim, "accelerated": accelerated(task, shape, dtype, impl)}


def inputs(task: str, padding: str, dtype: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    image, other = torch.randn(2, BATCH, 3, 48, 48, generator=generator).to(DTYPES[dtype])
    text = torch.randint(0, 120, (BATCH, TEXT), generator=generator)
    pad = (torch.arange(TEXT)[None] >= torch.tensor(PADDINGS[padding])[:, None]).long()
    if task == "imageclassification":
        return {"image": image}
    if task == "nlvr2":
        pair = {"image_a": image, "image_b": other}
        return {**pair, "text_description": text, "padding_mask": pad}
    if task == "vqav2":
        return {"image": image, "question": text, "padding_mask": pad}
    if task == "retrieval":
        return {"image": image, "text_description": text, "padding_mask": pad, "only_infer": True}
    masked = (torch.rand(BATCH, TEXT, generator=generator) > 0.5) & (pad == 0)
    masked[:, 0] = True
    call = {"image": image, "text_ids": text, "padding_mask": pad}
    return {**call, "language_masked_pos": masked.long()}


def judge(mine: Any, truth: Any, plain: Any, kept: Tensor | slice = slice(None)) -> list[Parity]:
    """One verdict per tensor of an output, which may be a tuple."""
    if not isinstance(mine, tuple):
        mine, truth, plain = (mine,), (truth,), (plain,)
    return [
        model_parity(m[kept], t[kept], p[kept])
        for m, t, p in zip(mine, truth, plain, strict=True)
        if t is not None
    ]


TASK_CASES = [
    (task, padding)
    for task in OURS
    for padding in PADDINGS
    if (task, padding) != ("imageclassification", "right")
]


@pytest.mark.parametrize("shape", ["base", "d88"])
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32", "bf16", "fp16"))
@pytest.mark.parametrize(("task", "padding"), TASK_CASES)
@torch.no_grad()
def test_task(task: str, padding: str, impl: str, dtype: str, shape: str) -> None:
    truth, plain = (official(task, shape, d)(**inputs(task, padding, d)) for d in ("fp32", dtype))
    for name, model in models(task, shape, dtype, impl).items():
        for parity in judge(model(**inputs(task, padding, dtype)), truth, plain):
            assert_parity(parity, f"{name} {task}")


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize(("task", "padding"), TASK_CASES)
@torch.no_grad()
def test_task_a_few_samples_at_a_time(
    task: str, padding: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_ROWS_AT_ONCE", rows)
    call = inputs(task, padding, "fp32")
    truth = official(task, "base", "fp32")(**call)
    for name, model in models(task, "base", "fp32", "auto").items():
        for parity in judge(model(**call), truth, truth):
            assert_parity(parity, f"{name} {task}")


@pytest.mark.parametrize("task", ["retrieval", "captioning"])
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32", "bf16"))
@torch.no_grad()
def test_parts_of_the_inputs(task: str, impl: str, dtype: str) -> None:
    """Retrieval with one modality; captioning logits for all tokens, compared where there is no padding."""
    call = {d: inputs(task, "right", d) for d in ("fp32", dtype)}
    kept: Tensor | slice = slice(None)
    if task == "captioning":
        kept = call[dtype]["padding_mask"] == 0
        drop = [("language_masked_pos",)]
    else:
        drop = [("image",), ("text_description", "padding_mask")]
    for names in drop:
        for d in call:
            call[d] = {**inputs(task, "right", d), **dict.fromkeys(names)}
        truth, plain = (official(task, "base", d)(**call[d]) for d in ("fp32", dtype))
        for name, model in models(task, "base", dtype, impl).items():
            for parity in judge(model(**call[dtype]), truth, plain, kept):
                assert_parity(parity, f"{name} without {names}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32"))
def test_retrieval_loss_and_its_gradients(impl: str, dtype: str, shape: str) -> None:
    call = {**inputs("retrieval", "right", dtype), "only_infer": False}
    theirs, mine = official("retrieval", shape, dtype), ours("retrieval", shape, dtype)
    mine.beit3.impl = impl
    theirs.zero_grad()
    vision, language = theirs(**{**call, "only_infer": True})
    truth = official_loss(theirs, vision, language)
    truth.backward()
    mine.zero_grad()
    loss, *embeddings = mine(**call)
    loss.backward()
    assert_parity(model_parity(loss.detach(), truth.detach()), "the loss")
    for embedding, true in zip(embeddings, (vision, language), strict=True):
        assert_parity(model_parity(embedding.detach(), true.detach()), "an embedding")
    for name, parameter in theirs.named_parameters():
        own = mine.get_parameter(name).grad
        assert (own is None) == (parameter.grad is None), name
        if own is None or ("k_proj" in name and name.endswith("bias")):
            continue
        assert_parity(model_parity(own, parameter.grad, gradient=True), name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), impls("fp32", "bf16", "fp16"))
@torch.no_grad()
def test_caption_decoded_step_by_step(impl: str, dtype: str, shape: str) -> None:
    """Seven words by the released beam search's calls, beams reordered between them."""
    truth = decode(official("captioning", shape, "fp32"), "fp32")
    plain = decode(official("captioning", shape, dtype), dtype)
    for name, model in models("captioning", shape, dtype, impl).items():
        mine = decode(model, dtype)
        assert len(mine) == 7
        for step, outputs in enumerate(zip(mine, truth, plain, strict=True)):
            assert_parity(model_parity(*outputs), f"{name}, step {step}")


def decode(model: Any, dtype: str) -> list[Tensor]:
    """Logits [B, 2, V] of each step."""
    image = inputs("captioning", "none", dtype)["image"]
    words = torch.randint(0, 120, (BATCH, 7), generator=torch.Generator().manual_seed(2))
    state: dict[int, dict[str, Tensor]] = {}
    logits = []
    for step in range(words.shape[1]):
        text = torch.stack([words[:, step], torch.full((BATCH,), 101)], dim=1)
        shown = image if step == 0 else None
        if isinstance(model, BEiT3ForCaptioning):
            pad = torch.zeros_like(text)
            out, state = model(shown, text, pad, None, step + 2, state)
        else:
            out = official_caption_step(model, shown, text, state, step + 2)
        logits.append(out)
        reorder_cache(state, torch.tensor([[1, 0, 3, 3], [0, 1, 2, 3], [2, 2, 1, 0]][step % 3]))
    return logits


@torch.no_grad()
def test_decoding_in_one_pass_gives_the_same_logits() -> None:
    """The mask token's logits after a whole caption, with and without the cache."""
    model = ours("captioning", "base", "fp32")
    model.beit3.impl = "auto"
    image = inputs("captioning", "none", "fp32")["image"]
    words = torch.randint(0, 120, (BATCH, 5), generator=torch.Generator().manual_seed(4))
    words[:, -1] = 101
    whole, _ = model(image, words, None, None)
    state: dict[int, dict[str, Tensor]] = {}
    for step in range(4):
        shown = image if step == 0 else None
        stepwise, state = model(shown, words[:, [step, 4]], None, None, step + 2, state)
        reorder_cache(state, torch.arange(BATCH))
    assert_parity(model_parity(stepwise[:, 1], whole[:, 4]), "the last step")
