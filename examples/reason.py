"""Is a sentence true of two photographs?

python examples/reason.py MODEL CHECKPOINT TOKENIZER LEFT RIGHT SENTENCE...
"""

from __future__ import annotations

import sys

import beit3_fast

if len(sys.argv) <= 6:
    sys.exit(__doc__)
name, checkpoint, tokenizer, left, right, *sentences = sys.argv[1:]
model = beit3_fast.create_model(name, checkpoint, inference_only=True)
processor = beit3_fast.Processor.for_model(model, tokenizer)

found = model.reason(left, right, sentences, processor=processor)
for sentence, probability in zip(sentences, found, strict=True):
    print(f"{probability:.2f}  {sentence}")
