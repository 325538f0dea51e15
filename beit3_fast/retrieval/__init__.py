"""What a retrieval model is used for: zero-shot classes, an index to search, recall."""

from beit3_fast.retrieval.evaluation import Recall, evaluate_retrieval, recall
from beit3_fast.retrieval.index import EmbeddingIndex, Hit
from beit3_fast.retrieval.zero_shot import ZeroShotClassifier, zero_shot_classifier

__all__ = [
    "EmbeddingIndex",
    "Hit",
    "Recall",
    "ZeroShotClassifier",
    "evaluate_retrieval",
    "recall",
    "zero_shot_classifier",
]
