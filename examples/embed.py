"""Embeddings of photographs, of sentences, and of both together.

python examples/embed.py MODEL CHECKPOINT TOKENIZER IMAGE TEXT
"""

from __future__ import annotations

import sys

import beit3_fast

if len(sys.argv) != 6:
    sys.exit(__doc__)
name, checkpoint, tokenizer, image, text = sys.argv[1:]
model = beit3_fast.create_model(name, checkpoint, inference_only=True)
processor = beit3_fast.Processor.for_model(model, tokenizer)

vision = model.encode_image(image, processor=processor)
language = model.encode_text(text, processor=processor)
print("cosine:", float(vision @ language.T))
print("class token:", list(model.encode_image(image, "cls", processor=processor).shape))
(rows,) = model.encode_pair(image, text, "tokens", processor=processor)
print("rows of the pair:", list(rows.shape))
