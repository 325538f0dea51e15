"""One small dataset in the forms that embed_dataset takes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch

CAPTIONS = ("a red cup", "two", "a cat and a dog on the table", "yes", "no", "a tower")


class Data:
    """One dataset in three forms: a folder, a tar and an index; six images with a caption each, and one bad image."""

    def __init__(self, root: Path) -> None:
        from PIL import Image

        self.folder = root / "photos"
        self.folder.mkdir()
        self.index = root / "coco_retrieval.test.jsonl"
        self.tar = root / "photos-000000.tar"
        generator = torch.Generator().manual_seed(1)
        entries = []
        for number, caption in enumerate(CAPTIONS):
            pixels = torch.randint(0, 256, (40, 30 + number, 3), generator=generator)
            path = self.folder / f"{number}.png"
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
            path.with_suffix(".txt").write_text(caption)
            entries += [
                {"image_path": f"photos/{path.name}", "text_segment": ids, "image_id": number}
                for ids in ([5 + number, 7], [9] * (number + 1))
            ]
        (self.folder / "bad.png").write_bytes(b"no image")
        (self.folder / "bad.txt").write_text("a bad one")
        self.index.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        with tarfile.open(self.tar, "w") as tar:
            for path in sorted(self.folder.iterdir()):
                member = tarfile.TarInfo(f"part/{path.name}")
                data = path.read_bytes()
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
