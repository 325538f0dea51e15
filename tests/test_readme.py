"""Every Python snippet of the README runs, on tiny models and small files under the names that it uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from spm import train_tiny_sentencepiece

import beit3_fast

HERE = Path(__file__).parent
README = (HERE.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
# A snippet names models and sizes that a person would use; these stand in for them.
TINY = {
    '"beit3_base_patch16_480_vqav2"': '"beit3_tiny_patch16_32_vqav2"',
    "img_size=224, patch_size=16, vocab_size=64010,": (
        "img_size=32, patch_size=16, vocab_size=100, encoder_layers=1,"
    ),
}


def test_the_readme_has_a_snippet_for_each_kind_of_user() -> None:
    assert len(SNIPPETS) == 3
    for text in TINY:
        assert sum(text in snippet for snippet in SNIPPETS) == 1, text


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skimage_data = pytest.importorskip("skimage.data")
    from PIL import Image

    code = SNIPPETS[number]
    if "torchscale" in code:
        from _compat import import_torchscale, need_torchscale

        need_torchscale()
        import_torchscale()
    for written, tiny in TINY.items():
        code = code.replace(written, tiny)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(skimage_data.astronaut()).save("photo.jpg")
    train_tiny_sentencepiece("beit3.spm")
    torch.manual_seed(0)
    official = beit3_fast.create_model("beit3_tiny_patch16_32_vqav2")
    beit3_fast.save_checkpoint(official, "beit3_base_patch16_480_vqa.pth")
    exec(compile(code, f"README snippet {number}", "exec"), {})
