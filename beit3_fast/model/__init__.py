"""The slim model: embeddings, encoder, the five released tasks, pretraining and its visual tokenizer, and their names."""

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
from beit3_fast.model.visual_tokenizer import (
    VISUAL_TOKENIZERS,
    VisualTokenizer,
    VisualTokenizerConfig,
    create_visual_tokenizer,
)

__all__ = [
    "VISUAL_TOKENIZERS",
    "BEiT3",
    "BEiT3ForCaptioning",
    "BEiT3ForImageClassification",
    "BEiT3ForPretraining",
    "BEiT3ForRetrieval",
    "BEiT3ForVisualQuestionAnswering",
    "BEiT3ForVisualReasoning",
    "Encoded",
    "VisualTokenizer",
    "VisualTokenizerConfig",
    "create_model",
    "create_visual_tokenizer",
    "list_models",
]
