"""Training: what is minimised, and the loop that does it."""

from beit3_fast.train.evaluation import Score, evaluate
from beit3_fast.train.finetune import FineTuning, read_finetuning
from beit3_fast.train.log import read_log
from beit3_fast.train.loop import TrainReport, train
from beit3_fast.train.objective import MaskedDataModelling
from beit3_fast.train.options import TrainOptions
from beit3_fast.train.recipe import Recipe, read_recipe

__all__ = [
    "FineTuning",
    "MaskedDataModelling",
    "Recipe",
    "Score",
    "TrainOptions",
    "TrainReport",
    "evaluate",
    "read_finetuning",
    "read_log",
    "read_recipe",
    "train",
]
