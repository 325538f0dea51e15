"""Scenes: up to four coloured shapes in the cells of a grid, over a ground; and their pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 156, 66),
    "blue": (40, 84, 204),
    "yellow": (240, 208, 48),
    "purple": (142, 60, 176),
    "white": (244, 244, 244),
}
SIZES = {"small": 0.62, "large": 0.95}
GROUNDS = {
    "sand": (208, 180, 128),
    "grass": (112, 148, 84),
    "water": (96, 152, 188),
    "night": (38, 40, 64),
    "snow": (172, 182, 194),
    "brick": (150, 92, 76),
}
GRID = 3
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "middle",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
MOST_THINGS = 4
# Share of the free room that a thing may be off the middle of its cell.
_ROOM = 0.3
# Edges are smooth because everything is drawn this many times as large.
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """A shape: ``cell`` 0 to 8 row by row; ``shift`` moves it from the centre of its cell, in shares of the room it has."""

    shape: str
    colour: str
    size: str
    cell: int
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def row(self) -> int:
        """0 at the top."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """0 at the left."""
        return self.cell % GRID

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """``things`` in the order of their cells. ``slope`` is how much lighter the ground gets from left to right and from
    top to bottom, ``grain`` the seed of its texture."""

    things: tuple[Thing, ...]
    ground: str
    slope: tuple[float, float]
    grain: int


class Rendering(NamedTuple):
    """``image`` RGB; ``masks`` bool [things, H, W]; ``boxes`` (x, y, width, height) in whole pixels around each mask."""

    image: Image.Image
    masks: np.ndarray
    boxes: list[tuple[int, int, int, int]]


def draw_scene(generator: np.random.Generator) -> Scene:
    """A scene at random: one to four things, no two in one cell, no two alike in shape and colour."""
    count = int(generator.integers(1, MOST_THINGS + 1))
    cells = sorted(int(cell) for cell in generator.permutation(GRID * GRID)[:count])
    kinds = generator.permutation(len(SHAPES) * len(COLOURS))[:count]
    things = tuple(
        Thing(
            shape=SHAPES[int(kind) % len(SHAPES)],
            colour=list(COLOURS)[int(kind) // len(SHAPES)],
            size=list(SIZES)[int(generator.integers(len(SIZES)))],
            cell=cell,
            shift=(float(generator.uniform(-1, 1)), float(generator.uniform(-1, 1))),
        )
        for cell, kind in zip(cells, kinds, strict=True)
    )
    return Scene(
        things,
        list(GROUNDS)[int(generator.integers(len(GROUNDS)))],
        (float(generator.uniform(-0.2, 0.2)), float(generator.uniform(-0.2, 0.2))),
        int(generator.integers(1 << 31)),
    )


def render(scene: Scene, pixels: int = 64) -> Rendering:
    """The picture of a scene, ``pixels`` wide and high, and where its things are."""
    from PIL import Image, ImageDraw

    canvas = _ground(scene, pixels)
    masks = np.zeros((len(scene.things), pixels, pixels), dtype=bool)
    boxes = []
    for index, thing in enumerate(scene.things):
        large = pixels * _OVERSAMPLING
        drawing = Image.new("L", (large, large))
        _draw(ImageDraw.Draw(drawing), thing, large)
        alpha = np.asarray(drawing.resize((pixels, pixels), Image.Resampling.BOX), np.float64) / 255
        canvas += alpha[:, :, None] * (np.array(COLOURS[thing.colour], np.float64) - canvas)
        masks[index] = alpha > 0.5
        rows, columns = (np.flatnonzero(masks[index].any(axis)) for axis in (1, 0))
        boxes.append(
            (
                int(columns[0]),
                int(rows[0]),
                int(columns[-1] - columns[0]) + 1,
                int(rows[-1] - rows[0]) + 1,
            )
        )
    return Rendering(Image.fromarray(np.rint(canvas).astype(np.uint8)), masks, boxes)


def _ground(scene: Scene, pixels: int) -> np.ndarray:
    """float64 [H, W, 3] in [0, 255]: the ground's colour, lighter to one side, with a grain of its own."""
    line = np.linspace(-1, 1, pixels)
    light = 1 + scene.slope[0] * line[None, :] + scene.slope[1] * line[:, None]
    grain = np.random.default_rng(scene.grain).normal(0, 3, (pixels, pixels))
    ground = np.array(GROUNDS[scene.ground], np.float64) * light[:, :, None] + grain[:, :, None]
    return ground.clip(0, 255)


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, pixels: int) -> None:
    cell = pixels / GRID
    radius = SIZES[thing.size] * cell / 2
    room = _ROOM * (cell / 2 - radius)
    x = (thing.column + 0.5) * cell + thing.shift[0] * room
    y = (thing.row + 0.5) * cell + thing.shift[1] * room
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        draw.ellipse(box, fill=255)
    elif thing.shape == "square":
        side = radius * 0.88
        draw.rectangle((x - side, y - side, x + side, y + side), fill=255)
    elif thing.shape == "triangle":
        corners = [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
        draw.polygon(corners, fill=255)
    else:
        width = math.ceil(radius * 0.62)
        draw.line((x - radius, y, x + radius, y), fill=255, width=width)
        draw.line((x, y - radius, x, y + radius), fill=255, width=width)
