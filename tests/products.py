"""What commands and examples need: photographs on disk, a tokenizer, answers and tiny checkpoints."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from spm import train_tiny_sentencepiece

import beit3_fast

ANSWERS = ("yes", "no", "two", "a red cup", "a cat")


def photo_paths() -> list[str]:
    """Real photographs, as scikit-image and scikit-learn ship them."""
    paths = []
    for package, file in (
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/coffee.png"),
        ("sklearn", "datasets/images/china.jpg"),
    ):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            pytest.skip(f"the photographs of {package} are not installed")
        paths.append(str(Path(spec.origin).parent / file))
    return paths


class Shop:
    """A folder with a tokenizer, an answer file and one tiny checkpoint for each task that is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = str(train_tiny_sentencepiece(folder / "tiny.spm"))
        self.answers = str(folder / "answers.txt")
        Path(self.answers).write_text("\n".join(ANSWERS))
        self.photos = photo_paths()

    def name(self, task: str) -> str:
        return f"beit3_tiny_patch16_32_{task}"

    def checkpoint(self, task: str) -> str:
        path = self.folder / f"{task}.safetensors"
        if not path.exists():
            options = {"num_classes": len(ANSWERS)} if task == "vqav2" else {}
            model = beit3_fast.create_model(self.name(task), **options)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            beit3_fast.save_checkpoint(model, path)
        return str(path)

    def model(self, task: str, tokenizer: bool = True) -> list[str]:
        """The options of a command."""
        options = ["--model", self.name(task), "--checkpoint", self.checkpoint(task)]
        return [*options, "--tokenizer", self.tokenizer] if tokenizer else options


def retrieval_model() -> Any:
    """A tiny retrieval model whose images and texts differ from each other."""
    model = beit3_fast.create_model("beit3_tiny_patch16_32_retrieval")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model
