"""The one tree of exceptions; every message says what was expected, what came and how to mend it."""

from __future__ import annotations


class Beit3FastError(Exception):
    """Base of every error that beit3_fast raises on purpose."""


class CheckpointError(Beit3FastError, ValueError):
    """A checkpoint file is damaged, unsafe or does not fit the model."""


class ShapeError(Beit3FastError, ValueError):
    """A tensor has the wrong shape, dtype or device."""


class KernelUnavailable(Beit3FastError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class ConfigError(Beit3FastError, ValueError):
    """A model name, option or configuration value is unknown or contradictory."""


class InputError(Beit3FastError, ValueError):
    """An image, a text or a tokenizer file cannot be used."""


class TrainingError(Beit3FastError, RuntimeError):
    """Training cannot go on: the loss is not a number, again and again, or another process of the run is gone."""
