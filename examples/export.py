"""The image tower as a file that other programs run: torch.export, and with --compile a library of machine code.

python examples/export.py MODEL CHECKPOINT FILE.pt2 [--compile]
"""

from __future__ import annotations

import sys

import torch

import beit3_fast
from beit3_fast.integrations.export import ImageTower

if len(sys.argv) <= 3:
    sys.exit(__doc__)
name, checkpoint, path, *options = sys.argv[1:]
model = beit3_fast.create_model(name, checkpoint)
image = torch.randn(2, 3, *model.config.image_shape)
shapes = ({0: torch.export.Dim("batch")},)
with torch.no_grad():
    program = torch.export.export(ImageTower(model), (image,), dynamic_shapes=shapes)
    if "--compile" in options:
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        tower = torch._inductor.aoti_load_package(path)
    else:
        torch.export.save(program, path)
        tower = torch.export.load(path).module()
    images = torch.randn(5, *image.shape[1:])
    error = (tower(images) - model.encode_image(images)).abs().max()
print(
    f"{path}: {len(images)} images in, {list(tower(images).shape)} out, largest difference {error:.1e}"
)
