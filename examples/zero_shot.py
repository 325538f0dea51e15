"""Classes that nobody trained: the names are the classifier.

python examples/zero_shot.py MODEL CHECKPOINT TOKENIZER IMAGE LABEL...
"""

from __future__ import annotations

import sys

import beit3_fast

if len(sys.argv) <= 5:
    sys.exit(__doc__)
name, checkpoint, tokenizer, image, *labels = sys.argv[1:]
model = beit3_fast.create_model(name, checkpoint, inference_only=True)
processor = beit3_fast.Processor.for_model(model, tokenizer)

classify = beit3_fast.zero_shot_classifier(
    model, labels, ("a photo of a {}.", "the {}"), processor=processor
)
for guess in classify(image)[0]:
    print(f"{guess.score:.2f}  {guess.label}")
