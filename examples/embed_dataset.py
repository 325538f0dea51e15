"""Embeddings of a whole dataset, in shards; call it again after a stop and it goes on.

python examples/embed_dataset.py MODEL CHECKPOINT FOLDER SOURCE...
"""

from __future__ import annotations

import sys

import beit3_fast

if len(sys.argv) <= 4:
    sys.exit(__doc__)
name, checkpoint, folder, *sources = sys.argv[1:]
model = beit3_fast.create_model(name, checkpoint, inference_only=True)
processor = beit3_fast.Processor.for_model(model)

report = beit3_fast.embed_dataset(model, sources, folder, processor=processor, progress=True)
print(f"{report.embedded} embeddings, {report.skipped} skipped, {report.resumed} done before")
index = beit3_fast.load_embeddings(folder)
nearest = index.search(index.embeddings[0], top_k=2)[0]
print(f"{index.names[0]} is most like {nearest[-1].name}")
