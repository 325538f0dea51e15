"""Training: what is minimised, and the loop that does it."""

from beit3_fast.train.log import read_log
from beit3_fast.train.loop import TrainReport, train
from beit3_fast.train.objective import MaskedDataModelling, accuracy
from beit3_fast.train.options import TrainOptions

__all__ = [
    "MaskedDataModelling",
    "TrainOptions",
    "TrainReport",
    "accuracy",
    "read_log",
    "train",
]
