"""Groups, rates and averages, by the official rules written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from train_cases import OPTIONS, config, model

from beit3_fast.errors import ConfigError
from beit3_fast.model import BEiT3ForVisualQuestionAnswering
from beit3_fast.train import TrainOptions
from beit3_fast.train.average import Average
from beit3_fast.train.optimizer import Optimizer, parameter_groups


def test_rates_and_decay_of_every_parameter(world: Any) -> None:
    own = model(world)
    groups = parameter_groups(own, TrainOptions(layer_decay=0.5, weight_decay=0.1))
    found = {n: (g["lr_scale"], g["weight_decay"]) for g in groups for n in g["names"]}
    assert found.keys() == {name for name, _ in own.named_parameters()}
    expected = {
        "beit3.text_embed.weight": (0.125, 0.1),
        "beit3.vision_embed.cls_token": (0.125, 0.0),
        "beit3.vision_embed.mask_token": (0.125, 0.1),
        "beit3.vision_embed.proj.weight": (0.125, 0.1),
        "beit3.vision_embed.proj.bias": (0.125, 0.0),
        "beit3.encoder.embed_positions.A.weight": (0.125, 0.0),
        "beit3.encoder.embed_positions.B.weight": (0.125, 0.1),
        "beit3.encoder.layers.0.ffn.A.fc1.weight": (0.25, 0.1),
        "beit3.encoder.layers.0.ffn.A.fc1.bias": (0.25, 0.0),
        "beit3.encoder.layers.1.self_attn.q_proj.B.weight": (0.5, 0.1),
        "beit3.encoder.layers.1.self_attn.inner_attn_ln.B.weight": (0.5, 0.0),
        "beit3.encoder.layer_norm.A.weight": (1.0, 0.0),
        "mlm_head.weight": (1.0, 0.1),
        "mim_head.bias": (1.0, 0.0),
    }
    assert {name: found[name] for name in expected} == expected


def test_frozen_parameters_are_left_out(world: Any) -> None:
    own = model(world)
    own.beit3.requires_grad_(False)
    names = [n for g in parameter_groups(own, OPTIONS) for n in g["names"]]
    assert sorted(names) == ["mim_head.bias", "mim_head.weight", "mlm_head.bias", "mlm_head.weight"]
    own.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameters to train"):
        parameter_groups(own, OPTIONS)
    with pytest.raises(ConfigError, match="layer_decay needs a model with get_num_layers"):
        parameter_groups(nn.Linear(2, 2), OPTIONS)


def test_the_rate_climbs_and_falls() -> None:
    options = TrainOptions(steps=110, lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [options.rate(step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.1)
    assert options.rate(500) == pytest.approx(0.1)


def test_a_step_is_adamw_s(world: Any) -> None:
    """State that exists from the start changes nothing: the same steps with plain AdamW give the same weights."""
    ours, plain = model(world), model(world)
    options = TrainOptions(steps=9, lr=0.01, warmup_steps=2, weight_decay=0.1)
    optimizer = Optimizer(ours, options)
    decayed = [g["params"] for g in parameter_groups(plain, options)]
    reference = torch.optim.AdamW(
        [{"params": p, "weight_decay": 0.1 if p[0].dim() > 1 else 0.0} for p in decayed],
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )
    exempt = {plain.beit3.vision_embed.cls_token, plain.beit3.encoder.embed_positions.A.weight}
    for group in reference.param_groups:
        if exempt & set(group["params"]):
            group["weight_decay"] = 0.0
    for step in range(4):
        for own in (ours, plain):
            draw = torch.Generator().manual_seed(step)
            for parameter in own.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
        rate = optimizer.step(step)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_average_follows_slowly() -> None:
    own = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(own.weight)
    average = Average(own, 0.9)
    nn.init.ones_(own.weight)
    for step in range(1, 4):
        average.update(own)
        assert average.state()["weight"].tolist() == [pytest.approx([1 - 0.9**step] * 2)]
    assert own.weight.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be an integer of at least 1, got 0"),
        ("steps", 1.5, "steps must be an integer"),
        ("warmup_steps", -1, "warmup_steps must be an integer of at least 0"),
        ("lr", float("nan"), "lr must be a number"),
        ("layer_decay", "0.9", "layer_decay must be a number"),
        ("betas", (0.9, 1.0), "betas must be two numbers"),
        ("clip_grad", 0.0, "clip_grad must be None or a positive"),
        ("ema_decay", 1.0, "ema_decay must be below 1"),
        ("precision", "float16", "precision must be one of"),
        ("parallel", "fsdp", "parallel must be one of"),
        ("checkpoint_activations", 0, "checkpoint_activations must be one of .* or an integer"),
        ("checkpoint_activations", True, "checkpoint_activations must be one of .* or an integer"),
    ],
)
def test_options_that_make_no_sense(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**{field: value})


def test_heads_may_learn_faster(world: Any) -> None:
    own = BEiT3ForVisualQuestionAnswering(config(world, normalize_output=False), 5)
    groups = parameter_groups(own, TrainOptions(layer_decay=0.5, head_lr_scale=20.0))
    found = {n: g["lr_scale"] for g in groups for n in g["names"]}
    assert found["head.0.weight"] == found["head.3.bias"] == 20.0
    assert found["pooler.dense.weight"] == 1.0, "as in the official recipe"
    assert found["beit3.encoder.layers.1.ffn.A.fc1.weight"] == 0.5
