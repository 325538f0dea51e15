"""Checkpoint files: read, checked, fitted to a model, saved. Knows tensors and names, and no model."""

from beit3_fast.checkpoint.convert import Conversion, convert_checkpoint
from beit3_fast.checkpoint.keys import HEADS
from beit3_fast.checkpoint.load import check_checkpoint, load_checkpoint
from beit3_fast.checkpoint.positions import interpolate_positions
from beit3_fast.checkpoint.read import Checkpoint, read_checkpoint
from beit3_fast.checkpoint.report import CheckpointMismatch, LoadReport
from beit3_fast.checkpoint.save import save_checkpoint

__all__ = [
    "HEADS",
    "Checkpoint",
    "CheckpointMismatch",
    "Conversion",
    "LoadReport",
    "check_checkpoint",
    "convert_checkpoint",
    "interpolate_positions",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
