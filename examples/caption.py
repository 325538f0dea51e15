"""Captions of photographs: three beams, then one image word by word.

python examples/caption.py MODEL CHECKPOINT TOKENIZER IMAGE...
"""

from __future__ import annotations

import sys

import beit3_fast

if len(sys.argv) <= 4:
    sys.exit(__doc__)
name, checkpoint, tokenizer, *images = sys.argv[1:]
model = beit3_fast.create_model(name, checkpoint, inference_only=True)
processor = beit3_fast.Processor.for_model(model, tokenizer)

captions = model.caption(images, num_beams=3, num_return_sequences=2, processor=processor)
for image, found in zip(images, captions, strict=True):
    for caption in found:
        print(f"{image}: {caption.text} ({caption.score:.2f})")

for step in model.stream_caption(images[0], processor=processor):
    print(step.text, end="", flush=True)
print()
