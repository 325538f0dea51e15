"""Photographs found by a sentence, and how well the model finds them.

python examples/search.py MODEL CHECKPOINT TOKENIZER INDEX TEXT IMAGE...
"""

from __future__ import annotations

import sys

import beit3_fast

if len(sys.argv) <= 6:
    sys.exit(__doc__)
name, checkpoint, tokenizer, path, text, *images = sys.argv[1:]
model = beit3_fast.create_model(name, checkpoint, inference_only=True)
processor = beit3_fast.Processor.for_model(model, tokenizer)

index = beit3_fast.EmbeddingIndex.build(model, images, processor=processor)
index.save(path)
index = beit3_fast.EmbeddingIndex.load(path)
for hit in index.search_text(model, text, top_k=3, processor=processor)[0]:
    print(f"{hit.score:.2f}  {hit.name}")

captions = [[text, f"{text} again"] for _ in images]
recall = beit3_fast.evaluate_retrieval(model, images, captions, processor=processor)
print("text found:", recall.text_retrieval, "image found:", recall.image_retrieval)
