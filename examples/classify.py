"""The likeliest classes of photographs.

python examples/classify.py MODEL CHECKPOINT IMAGE...
"""

from __future__ import annotations

import sys

import beit3_fast

if len(sys.argv) <= 3:
    sys.exit(__doc__)
name, checkpoint, *images = sys.argv[1:]
model = beit3_fast.create_model(name, checkpoint, inference_only=True)
processor = beit3_fast.Processor.for_model(model)

for image, guesses in zip(images, model.classify(images, 3, processor=processor), strict=True):
    print(image, "|", ", ".join(f"class {g.class_id} {g.score:.2f}" for g in guesses))
