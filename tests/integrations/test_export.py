"""The image tower through torch.export and AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import images, task_model
from torch import Tensor

import beit3_fast
from beit3_fast.errors import ConfigError
from beit3_fast.integrations.export import ImageTower
from beit3_fast.ops import library
from beit3_fast.parity import assert_parity, model_parity

OUTPUTS = ("pooled", "cls", "tokens")


def exported(tower: ImageTower) -> Any:
    batch = torch.export.Dim("batch")
    return torch.export.export(tower, (images(3),), dynamic_shapes=({0: batch},))


def encoded(model: Any, batch: Tensor, output: str) -> Tensor:
    found = model.encode_image(batch, output)
    return found if isinstance(found, Tensor) else torch.stack(found)


@pytest.mark.parametrize("task", ["retrieval", "imageclassification"])
@pytest.mark.parametrize("output", OUTPUTS)
@torch.no_grad()
def test_the_tower_is_encode_image(task: str, output: str) -> None:
    model = task_model(task)
    ours = ImageTower(model, output)(images(4))
    torch.testing.assert_close(ours, encoded(model, images(4), output), rtol=1e-5, atol=1e-6)


@pytest.mark.full  # in the gate, test_examples.py exports a tower for 2 images and calls it with 5
@pytest.mark.parametrize("output", OUTPUTS)
@torch.no_grad()
def test_export_with_any_batch_size(output: str) -> None:
    model = task_model("retrieval", num_layers=1)
    program = exported(ImageTower(model, output)).module()
    for batch in (1, 2, 7):
        expected = encoded(model, images(batch), output)
        assert_parity(model_parity(program(images(batch)), expected), f"{output} of {batch}")


@pytest.mark.full
@pytest.mark.timeout(600)
@torch.no_grad()
def test_aot_inductor(tmp_path: Path) -> None:
    model = task_model("retrieval", num_layers=1)
    path = str(tmp_path / "tower.pt2")
    torch._inductor.aoti_compile_and_package(exported(ImageTower(model)), package_path=path)
    tower = torch._inductor.aoti_load_package(path)
    for batch in (1, 2, 7):
        expected = model.encode_image(images(batch))
        torch.testing.assert_close(tower(images(batch)), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported() -> None:
    model = task_model("retrieval")
    with pytest.raises(ConfigError, match=r"one of \['pooled', 'cls', 'tokens'\], got 'mean'"):
        ImageTower(model, "mean")
    with pytest.raises(ConfigError, match="with a vision branch, got Linear"):
        ImageTower(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="with a vision branch, got BEiT3"):
        ImageTower(beit3_fast.create_model("beit3_tiny_patch16_32", modalities=("text",)))
    if library.available() and library.cpu_isa() != "portable":
        inference = beit3_fast.create_model("beit3_tiny_patch16_32", inference_only=True)
        with pytest.raises(ConfigError, match="without inference_only=True"):
            ImageTower(inference)
