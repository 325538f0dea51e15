"""Answers to questions about a photograph.

python examples/answer.py MODEL CHECKPOINT TOKENIZER ANSWERS IMAGE QUESTION...
"""

from __future__ import annotations

import sys

import beit3_fast
from beit3_fast.data import read_labels

if len(sys.argv) <= 6:
    sys.exit(__doc__)
name, checkpoint, tokenizer, answers, image, *questions = sys.argv[1:]
labels = read_labels(answers)
model = beit3_fast.create_model(name, checkpoint, num_classes=len(labels), inference_only=True)
processor = beit3_fast.Processor.for_model(model, tokenizer)

found = model.answer(image, questions, top_k=3, labels=labels, processor=processor)
for question, guesses in zip(questions, found, strict=True):
    print(question, "|", ", ".join(f"{guess.label} {guess.score:.2f}" for guess in guesses))
