"""beit3_fast: a fast runtime for BEiT-3, Microsoft's multimodal foundation model.

Names are resolved on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit3_fast.checkpoint import load_checkpoint, save_checkpoint
    from beit3_fast.config import BEiT3Config
    from beit3_fast.data import Processor, Tokenizer
    from beit3_fast.derived import forget as refresh
    from beit3_fast.embed import embed_dataset, load_embeddings
    from beit3_fast.explanation import explain
    from beit3_fast.integrations.torchscale import accelerate, restore
    from beit3_fast.layout import TokenLayout
    from beit3_fast.model import create_model, list_models
    from beit3_fast.retrieval import EmbeddingIndex, evaluate_retrieval, zero_shot_classifier

_HOMES = {
    "BEiT3Config": ("beit3_fast.config", "BEiT3Config"),
    "EmbeddingIndex": ("beit3_fast.retrieval", "EmbeddingIndex"),
    "Processor": ("beit3_fast.data", "Processor"),
    "TokenLayout": ("beit3_fast.layout", "TokenLayout"),
    "Tokenizer": ("beit3_fast.data", "Tokenizer"),
    "accelerate": ("beit3_fast.integrations.torchscale", "accelerate"),
    "create_model": ("beit3_fast.model", "create_model"),
    "embed_dataset": ("beit3_fast.embed", "embed_dataset"),
    "evaluate_retrieval": ("beit3_fast.retrieval", "evaluate_retrieval"),
    "explain": ("beit3_fast.explanation", "explain"),
    "list_models": ("beit3_fast.model", "list_models"),
    "load_embeddings": ("beit3_fast.embed", "load_embeddings"),
    "load_checkpoint": ("beit3_fast.checkpoint", "load_checkpoint"),
    "refresh": ("beit3_fast.derived", "forget"),
    "restore": ("beit3_fast.integrations.torchscale", "restore"),
    "save_checkpoint": ("beit3_fast.checkpoint", "save_checkpoint"),
    "zero_shot_classifier": ("beit3_fast.retrieval", "zero_shot_classifier"),
}

__all__ = [
    "BEiT3Config",
    "EmbeddingIndex",
    "Processor",
    "TokenLayout",
    "Tokenizer",
    "accelerate",
    "create_model",
    "embed_dataset",
    "evaluate_retrieval",
    "explain",
    "list_models",
    "load_checkpoint",
    "load_embeddings",
    "refresh",
    "restore",
    "save_checkpoint",
    "zero_shot_classifier",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("beit3-fast")
        except PackageNotFoundError:
            return "0+unknown"
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'beit3_fast' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(home[0]), home[1])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
