"""Position tables for other image sizes: the official arithmetic, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import (
    SMALL_BASE,
    Standin,
    layout,
    same,
    snapshot,
    torch_file,
    weights,
)
from torch import Tensor

from beit3_fast.checkpoint import (
    CheckpointMismatch,
    interpolate_positions,
    load_checkpoint,
    save_checkpoint,
)
from beit3_fast.errors import CheckpointError

TABLE = "beit3.encoder.embed_positions.A.weight"


def official(table: Tensor, num_patches: int) -> Tensor:
    """The formula of the official loader, restated: square grids, two unused rows and the class token kept."""
    extra = 3
    old = int((table.shape[-2] - extra) ** 0.5)
    new = int(num_patches**0.5)
    if old == new:
        return table
    kept, grid = table[:extra].unsqueeze(0), table[extra:]
    grid = grid.reshape(-1, old, old, table.shape[-1]).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(new, new), mode="bicubic", align_corners=False
    )
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat((kept, grid), dim=1).squeeze(0)


def bicubic(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Cubic convolution with a = -0.75 and clamped edges on [h, w, C], from its definition, in fp64."""

    def weight(x: np.ndarray) -> np.ndarray:
        x, a = np.abs(x), -0.75
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    def matrix(old: int, new: int) -> np.ndarray:
        out = np.zeros((new, old))
        for i in range(new):
            centre = (i + 0.5) * old / new - 0.5
            for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                out[i, min(max(tap, 0), old - 1)] += weight(np.array(centre - tap))
        return out

    vertical, horizontal = matrix(grid.shape[0], rows), matrix(grid.shape[1], columns)
    return np.einsum("ih,jw,hwc->ijc", vertical, horizontal, grid.astype(np.float64))


@pytest.mark.parametrize(
    ("old", "new"), [(224, 384), (224, 480), (224, 768), (480, 224), (384, 400)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_square_grids_are_the_official_result_bit_for_bit(
    old: int, new: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = weights(layout("nlvr2", SMALL_BASE, (old // 16, old // 16)), dtype=dtype)
    path = torch_file(tmp_path / "x.pth", {"model": state})
    model = Standin(layout("nlvr2", SMALL_BASE, (new // 16, new // 16)))
    report = load_checkpoint(model, path)
    expected = official(state[TABLE].float(), (new // 16) ** 2)
    assert torch.equal(model.state_dict()[TABLE], expected)
    assert report.interpolated == {TABLE: ((old // 16, old // 16), (new // 16, new // 16))}
    others = {n: t.float() for n, t in state.items() if n != TABLE}
    assert same({n: model.state_dict()[n] for n in others}, others)


@pytest.mark.parametrize("grid", [(7, 28), (28, 7), (1, 30), (31, 1), (3, 5), (14, 15)])
def test_other_grids_are_bicubic(grid: tuple[int, int]) -> None:
    table = torch.randn(199, 6)
    found = interpolate_positions(table, (14, 14), grid)
    expected = bicubic(table[3:].reshape(14, 14, 6).numpy(), *grid).reshape(-1, 6)
    assert torch.equal(found[:3], table[:3])
    # fp32 places a sample at up to 14 with an error of half a unit there; cubics of N(0, 1) have slopes below 8
    np.testing.assert_allclose(found[3:].numpy(), expected, rtol=0, atol=14 * 2**-23 * 8)


@pytest.mark.parametrize("stated", [False, True])
def test_a_stated_grid_of_as_many_patches_is_another_grid(
    stated: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """7 x 28 patches are as many as 14 x 14: who does not say which they are is taken at his word, with a warning."""
    shapes = layout("nlvr2", SMALL_BASE, (14, 14))
    state, model = weights(shapes), Standin(shapes, grid_size=(7, 28))
    path, config = tmp_path / "x.safetensors", {"img_size": 224, "patch_size": 16}
    save_checkpoint(state, path, config=config if stated else None)
    with caplog.at_level(logging.WARNING, "beit3_fast"):
        report = load_checkpoint(model, path)
    grids = {TABLE: ((14, 14), (7, 28))}
    assert report.interpolated == (grids if stated else {})
    assert report.assumed == ({} if stated else {TABLE: ((7, 28), (14, 14))})
    assert ("for 7x28 patches" in caplog.text) is not stated
    expected = interpolate_positions(state[TABLE], (14, 14), (7, 28)) if stated else state[TABLE]
    assert torch.equal(model.state_dict()[TABLE], expected)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 4), (7, 28), (4, 4), (3, 5)])
@pytest.mark.parametrize("form", ["memory", "pth", "safetensors", "plain pth", "plain safetensors"])
def test_a_model_takes_its_own_weights_as_they_are(
    grid: tuple[int, int], form: str, tmp_path: Path
) -> None:
    shapes = layout("nlvr2", SMALL_BASE, grid)
    state, model = weights(shapes), Standin(shapes, grid_size=grid)
    source: Any = state
    if form != "memory":
        config = {"img_size": [grid[0] * 16, grid[1] * 16], "patch_size": 16}
        path = tmp_path / f"x.{form.removeprefix('plain ')}"
        source = save_checkpoint(state, path, config=None if "plain" in form else config)
    assert not load_checkpoint(model, source).interpolated
    assert same(model.state_dict(), state)


def test_the_same_grid_keeps_every_bit() -> None:
    table = torch.randn(199, 4).bfloat16()
    assert interpolate_positions(table, (14, 14), (14, 14)) is table


def test_gradients_flow_to_the_table() -> None:
    table = torch.randn(4 + 3, 2, dtype=torch.float64, requires_grad=True)
    interpolate_positions(table, (2, 2), (3, 5)).sum().backward()
    assert table.grad is not None
    # every output patch is a weighted mean of input patches, so the weights add up to the number of outputs
    assert (table.grad[3:].sum(0) - 15).abs().max() < 15 * 2**-20
    assert torch.equal(table.grad[:3], torch.ones(3, 2, dtype=torch.float64))


def test_a_file_that_states_its_grid_needs_no_square(tmp_path: Path) -> None:
    shapes = layout("nlvr2", SMALL_BASE, (4, 6))
    state = weights(shapes)
    for name in ("x.safetensors", "x.pth"):
        path = save_checkpoint(
            state, tmp_path / name, config={"img_size": [64, 96], "patch_size": 16}
        )
        model = Standin(layout("nlvr2", SMALL_BASE, (5, 5)))
        report = load_checkpoint(model, path)
        assert report.interpolated == {TABLE: ((4, 6), (5, 5))}
        expected = interpolate_positions(state[TABLE], (4, 6), (5, 5))
        assert torch.equal(model.state_dict()[TABLE], expected)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_stated_grid_comes_before_the_square_of_as_many_patches(
    name: str, tmp_path: Path
) -> None:
    state = weights(layout("nlvr2", SMALL_BASE, (2, 8)))
    config = {"img_size": [32, 128], "patch_size": 16}
    path = save_checkpoint(state, tmp_path / name, config=config)
    for grid in ((4, 4), (8, 2), (3, 5)):
        model = Standin(layout("nlvr2", SMALL_BASE, grid), grid_size=grid)
        assert load_checkpoint(model, path).interpolated == {TABLE: ((2, 8), grid)}
        expected = interpolate_positions(state[TABLE], (2, 8), grid)
        assert torch.equal(model.state_dict()[TABLE], expected)


def test_numbers_too_large_to_interpolate() -> None:
    state = weights(layout("nlvr2", SMALL_BASE, (4, 4)))
    state[TABLE].view(-1)[5 * SMALL_BASE.width :: 3] = 3e38
    same_size = Standin(layout("nlvr2", SMALL_BASE, (4, 4)))
    load_checkpoint(same_size, state)
    model = Standin(layout("nlvr2", SMALL_BASE, (5, 5)))
    before = snapshot(model)
    with pytest.raises(CheckpointMismatch, match=r"up to 3e\+38, .* when they are interpolated"):
        load_checkpoint(model, state)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("rows", "grid", "message"),
    [
        (3 + 15, (4, 4), r"18 rows in the file: 3 and 15 patches"),
        (2, (4, 4), r"2 rows in the file"),
        (3, (4, 4), r"3 rows in the file: 3 and 0 patches"),
        (0, (4, 4), r"0 rows in the file"),
        (3 + 16, (3, 5), r"18 rows in the model"),
    ],
)
def test_tables_that_are_no_grid_are_refused(
    rows: int, grid: tuple[int, int], message: str
) -> None:
    state = weights(layout("nlvr2", SMALL_BASE, (4, 4)))
    state[TABLE] = torch.randn(rows, SMALL_BASE.width)
    model = Standin(layout("nlvr2", SMALL_BASE, grid))
    before = snapshot(model)
    with pytest.raises(CheckpointMismatch, match=message):
        load_checkpoint(model, state)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("table", "source", "message"),
    [
        (torch.randn(199), (14, 14), "two dimensions"),
        (torch.ones(199, 4, dtype=torch.int32), (14, 14), "floating"),
        (torch.randn(198, 4), (14, 14), "has 199 rows, this one has 198"),
    ],
)
def test_interpolation_names_what_is_wrong(
    table: Tensor, source: tuple[int, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        interpolate_positions(table, source, (2, 2))
