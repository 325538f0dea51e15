"""What can be said and asked about scenes; what is true of them is looked up, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from beit3_fast.data.world.scene import COLOURS, GROUNDS, MOST_THINGS, SHAPES, Scene, Thing

T = TypeVar("T")

NUMBERS = ("no", "one", "two", "three", "four")
ANSWERS = (*COLOURS, *SHAPES, *GROUNDS, "zero", *NUMBERS[1:], "yes", "no")
"""Every answer that a question of this world may have, without repetition."""


class Question(NamedTuple):
    """A question about one scene and its only answer, one of ``ANSWERS``."""

    text: str
    answer: str


class Statement(NamedTuple):
    """A sentence about two scenes, and whether it holds."""

    text: str
    is_true: bool


def caption(scene: Scene, generator: np.random.Generator) -> str:
    """One of the ways to describe a scene; all things are named."""
    things = [scene.things[int(index)] for index in generator.permutation(len(scene.things))]
    manner = int(generator.integers(3))
    if manner == 0:
        parts = [f"a {t.size} {t.colour} {t.shape} at the {t.place}" for t in things]
        return f"{_listed(parts)} on {scene.ground}"
    if manner == 1:
        parts = [f"a {t.colour} {t.shape} which is {t.size}" for t in things]
        return f"on {scene.ground} there is {_listed(parts)}"
    parts = [f"the {t.place} has a {t.size} {t.colour} {t.shape}" for t in things]
    return f"{NUMBERS[len(things)]} on {scene.ground}: {_listed(parts)}"


def relation(scene: Scene, generator: np.random.Generator) -> str:
    """A true sentence about where two things are to each other, or about the only one."""
    if len(scene.things) < 2:
        only = scene.things[0]
        return f"the {only.colour} {only.shape} is alone on {scene.ground}"
    a, b = (scene.things[int(i)] for i in generator.permutation(len(scene.things))[:2])
    return f"the {_named(a)} is {_side(a, b)} the {_named(b)}"


def region(scene: Scene, generator: np.random.Generator) -> str:
    """One thing of a scene in a few words, as descriptions of regions are: shape, colour and place say which, so that few
    other scenes have it."""
    thing = _any(scene.things, generator)
    manner = int(generator.integers(3))
    if manner == 0:
        return f"{_named(thing)} at {thing.place}"
    if manner == 1:
        return f"{thing.place}: {_named(thing)}"
    return f"{thing.size} {_named(thing)} at {thing.place} on {scene.ground}"


def question(scene: Scene, generator: np.random.Generator) -> Question:
    """A question at random; yes and no are equally likely where they are the answers."""
    kind = int(generator.integers(5))
    thing = _any(scene.things, generator)
    if kind == 0 and sum(other.shape == thing.shape for other in scene.things) == 1:
        return Question(f"what colour is the {thing.shape}?", thing.colour)
    if kind <= 1:
        return Question(f"what shape is at the {thing.place}?", thing.shape)
    if kind == 2:
        _, what, count = _counted(scene, generator)
        return Question(f"how many {what} are there?", "zero" if count == 0 else NUMBERS[count])
    if kind == 3:
        return Question("what is the ground?", scene.ground)
    yes = generator.random() < 0.5
    if len(scene.things) > 1 and generator.random() < 0.5:
        a, b = (scene.things[int(i)] for i in generator.permutation(len(scene.things))[:2])
        side = _side(a, b) if yes else _side(b, a)
        return Question(f"is the {_named(a)} {side} the {_named(b)}?", "yes" if yes else "no")
    there = {(t.colour, t.shape) for t in scene.things}
    colour, shape = (thing.colour, thing.shape) if yes else _absent(there, generator)
    return Question(f"is there a {colour} {shape}?", "yes" if yes else "no")


def statement(left: Scene, right: Scene, generator: np.random.Generator) -> Statement:
    """A sentence about two scenes, true or false with equal chances where the scenes allow both."""
    wanted = bool(generator.random() < 0.5)
    makers: tuple[Callable[[Scene, Scene, np.random.Generator], Statement], ...] = (
        _more,
        _exactly,
        _both,
    )
    said = Statement("", not wanted)
    for _ in range(20):
        said = makers[int(generator.integers(len(makers)))](left, right, generator)
        if said.is_true is wanted:
            break
    return said


def _counted(scene: Scene, generator: np.random.Generator) -> tuple[str, str, int]:
    """A shape or a colour as one thing and as many, and how many there are of it."""
    by_shape = generator.random() < 0.5
    word = _any(SHAPES if by_shape else tuple(COLOURS), generator)
    count = sum(word == (t.shape if by_shape else t.colour) for t in scene.things)
    if by_shape:
        return word, _plural(word), count
    return f"{word} shape", f"{word} shapes", count


def _more(left: Scene, right: Scene, generator: np.random.Generator) -> Statement:
    shape = _any(SHAPES, generator)
    counts = [sum(t.shape == shape for t in scene.things) for scene in (left, right)]
    if generator.random() < 0.5:
        return Statement(
            f"there are more {_plural(shape)} in the left image than in the right image",
            counts[0] > counts[1],
        )
    return Statement(
        f"there are more {_plural(shape)} in the right image than in the left image",
        counts[1] > counts[0],
    )


def _exactly(left: Scene, right: Scene, generator: np.random.Generator) -> Statement:
    side, scene = (("left", left), ("right", right))[int(generator.integers(2))]
    count = int(generator.integers(1, MOST_THINGS + 1))
    plural = "s" if count > 1 else ""
    return Statement(
        f"the {side} image has exactly {NUMBERS[count]} shape{plural}", len(scene.things) == count
    )


def _both(left: Scene, right: Scene, generator: np.random.Generator) -> Statement:
    colour = _any(tuple(COLOURS), generator)
    shown = all(any(t.colour == colour for t in scene.things) for scene in (left, right))
    return Statement(f"both images show something {colour}", shown)


def _side(a: Thing, b: Thing) -> str:
    """Where a is to b: above or below where the rows differ, else left or right."""
    if a.row != b.row:
        return "above" if a.row < b.row else "below"
    return "left of" if a.column < b.column else "right of"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _named(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _any(choices: tuple[T, ...], generator: np.random.Generator) -> T:
    return choices[int(generator.integers(len(choices)))]


def _absent(there: set[tuple[str, str]], generator: np.random.Generator) -> tuple[str, str]:
    """A colour and a shape that are not there together; one of them is, so that neither gives the answer away."""
    near = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if (colour, shape) not in there and any(colour == c or shape == s for c, s in there)
    ]
    return near[int(generator.integers(len(near)))]
