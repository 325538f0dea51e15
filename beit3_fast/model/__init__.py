"""The slim model: embeddings, encoder, the five released tasks, pretraining, and the names they go by."""

from beit3_fast.model.beit3 import BEiT3, Encoded
from beit3_fast.model.captioning import BEiT3ForCaptioning
from beit3_fast.model.pretraining import BEiT3ForPretraining
from beit3_fast.model.registry import create_model, list_models
from beit3_fast.model.retrieval import BEiT3ForRetrieval
from beit3_fast.model.tasks import (
    BEiT3ForImageClassification,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
)

__all__ = [
    "BEiT3",
    "BEiT3ForCaptioning",
    "BEiT3ForImageClassification",
    "BEiT3ForPretraining",
    "BEiT3ForRetrieval",
    "BEiT3ForVisualQuestionAnswering",
    "BEiT3ForVisualReasoning",
    "Encoded",
    "create_model",
    "list_models",
]
