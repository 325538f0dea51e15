"""The image tower as a module of one tensor, which torch.export, AOTInductor and ONNX take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from beit3_fast.errors import ConfigError
from beit3_fast.model import BEiT3
from beit3_fast.model.embeddings import OUTPUTS
from beit3_fast.model.task import BEiT3Task
from beit3_fast.ops.packed_weight import PackedWeight


class ImageTower(nn.Module):
    """What ``model.encode_image(images, output)`` computes: image [B, 3, H, W] -> [B, C], "tokens": [B, Nv, C].

    For a model made without ``inference_only`` or int8: an exported program holds plain weights. Raises ConfigError for
    another one. With a dynamic batch size and its own compiled library:

        program = torch.export.export(ImageTower(model), (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch._inductor.aoti_compile_and_package(program, package_path="tower.pt2")
        torch._inductor.aoti_load_package("tower.pt2")(image)

    The example batch must have at least 2 images. A ``.pt2`` file is code: load none that you do not trust.
    """

    def __init__(self, model: Any, output: str = "pooled") -> None:
        super().__init__()
        if not isinstance(model, (BEiT3, BEiT3Task)) or "vision" not in model.config.modalities:
            raise ConfigError(
                f"expected a beit3_fast model with a vision branch, got {type(model).__name__}"
            )
        if output not in OUTPUTS:
            raise ConfigError(f"output must be one of {list(OUTPUTS)}, got {output!r}")
        if any(isinstance(parameter, PackedWeight) for parameter in model.parameters()):
            raise ConfigError(
                "an exported program holds plain weights; create the model without inference_only=True and in a dtype of 16 or 32 bits"
            )
        self.model, self.output = model, output

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W], normalised, in the model's dtype."""
        head = self.model._pooling_head("image") if self.output == "pooled" else None
        first = self.output == "cls" or head is not None
        encoded = self.model.backbone.encode(image, read_vision="first" if first else "all")
        if first:
            rows = encoded.vision()
            return rows if head is None else head(rows)
        tokens = encoded.rows.view(image.shape[0], encoded.layout.longest, encoded.rows.shape[1])
        return tokens if self.output == "tokens" else tokens.mean(1)
