"""A small world to learn in: rendered scenes, and everything that can be said and asked about them.

Scenes, pixels, sentences, questions, boxes and masks follow from a seed and a number. ``write_world`` lays them out as
the official tasks have their files.
"""

from beit3_fast.data.world.digits import write_digits
from beit3_fast.data.world.files import WorldSize, write_world
from beit3_fast.data.world.language import Question, Statement, caption, question, region, statement
from beit3_fast.data.world.scene import Rendering, Scene, Thing, draw_scene, render

__all__ = [
    "Question",
    "Rendering",
    "Scene",
    "Statement",
    "Thing",
    "WorldSize",
    "caption",
    "draw_scene",
    "question",
    "region",
    "render",
    "statement",
    "write_digits",
    "write_world",
]
