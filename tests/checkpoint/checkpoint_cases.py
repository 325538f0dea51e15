"""Names and shapes of the official files, written down from what was released and not from our models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    ffn: int
    vocab: int = 64010
    text_rows: int = 1024
    codes: int = 8192
    patch: int = 16


BASE = Size(12, 768, 3072)
LARGE = Size(24, 1024, 4096)
SMALL_BASE = Size(2, 8, 16, vocab=20, text_rows=12, codes=10, patch=2)
SMALL_LARGE = Size(3, 12, 24, vocab=20, text_rows=12, codes=10, patch=2)
CLASSES = {"imageclassification": 1000, "nlvr2": 2, "vqav2": 3129}
TASKS = ("imageclassification", "nlvr2", "vqav2", "captioning", "retrieval")

# file -> (what it holds, size, image size); the 29 files of the release
OFFICIAL: dict[str, tuple[str, str, int]] = {
    **{
        f"beit3_{size}{domain}_patch16_224.pth": ("pretrain", size, 224)
        for size in ("base", "large")
        for domain in ("", "_indomain")
    },
    **{f"beit3_{size}_itc_patch16_224.pth": ("itc", size, 224) for size in ("base", "large")},
    **{
        f"beit3_{size}{domain}_patch16_{pixels}_{suffix}.pth": (task, size, pixels)
        for task, suffix, pixels in (
            ("imageclassification", "in1k", 224),
            ("vqav2", "vqa", 480),
            ("nlvr2", "nlvr2", 224),
        )
        for size in ("base", "large")
        for domain in ("", "_indomain")
    },
    "beit3_large_indomain_patch16_768_vgqaaug_vqa.pth": ("vqav2", "large", 768),
    **{
        f"beit3_{name}_patch16_480_{data}.pth": ("captioning", name.split("_")[0], 480)
        for name in ("base", "base_indomain", "large")
        for data in ("coco_captioning", "nocaps")
    },
    **{
        f"beit3_{size}_patch16_384_{data}_retrieval.pth": ("retrieval", size, 384)
        for size in ("base", "large")
        for data in ("coco", "f30k")
    },
}


def layout(kind: str, size: Size, grid: tuple[int, int], classes: int | None = None) -> Shapes:
    """Names and shapes of a file or model: a task, or "pretrain", "itc", "backbone"."""
    d, f = size.width, size.ffn
    shapes: Shapes = {
        "text_embed.weight": (size.vocab, d),
        "vision_embed.cls_token": (1, 1, d),
        "vision_embed.mask_token": (1, 1, d),
        "vision_embed.proj.weight": (d, 3, size.patch, size.patch),
        "vision_embed.proj.bias": (d,),
        "encoder.embed_positions.A.weight": (grid[0] * grid[1] + 3, d),
        "encoder.embed_positions.B.weight": (size.text_rows, d),
    }

    def pair(name: str, out: int, inner: int | None = None) -> None:
        shapes[f"{name}.weight"] = (out,) if inner is None else (out, inner)
        shapes[f"{name}.bias"] = (out,)

    for layer in range(size.layers):
        for branch in "AB":
            at = f"encoder.layers.{layer}"
            for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
                pair(f"{at}.self_attn.{projection}.{branch}", d, d)
            pair(f"{at}.self_attn.inner_attn_ln.{branch}", d)
            pair(f"{at}.self_attn_layer_norm.{branch}", d)
            pair(f"{at}.ffn.{branch}.fc1", f, d)
            pair(f"{at}.ffn.{branch}.fc2", d, f)
            pair(f"{at}.ffn.{branch}.ffn_layernorm", f)
            pair(f"{at}.final_layer_norm.{branch}", d)
    if kind not in ("imageclassification", "vqav2"):
        for branch in "AB":
            pair(f"encoder.layer_norm.{branch}", d)
    shapes = {f"beit3.{name}": shape for name, shape in shapes.items()}

    classes = CLASSES.get(kind, 0) if classes is None else classes
    if kind == "imageclassification":
        pair("fc_norm", d)
        pair("head", classes, d)
    elif kind == "nlvr2":
        pair("head.norm1", 4 * d)
        pair("head.dense1", 2 * d, 4 * d)
        pair("head.norm2", 2 * d)
        pair("head.dense2", classes, 2 * d)
    elif kind == "vqav2":
        pair("pooler.norm", d)
        pair("pooler.dense", d, d)
        pair("head.0", 2 * d, d)
        pair("head.1", 2 * d)
        pair("head.3", classes, 2 * d)
    elif kind in ("retrieval", "itc"):
        shapes["vision_head.weight"] = shapes["language_head.weight"] = (d, d)
        shapes["logit_scale"] = ()
    elif kind in ("captioning", "pretrain"):
        pair("mlm_head", size.vocab, d)
    if kind == "pretrain":
        pair("mim_head", size.codes, d)
    return shapes


def branch_of(shapes: Shapes, branch: str) -> Shapes:
    """The backbone that has one branch only, without the prefix of the task models."""
    gone = re.compile(
        r"\.B\.|\.B$|text_embed" if branch == "vision" else r"\.A\.|\.A$|vision_embed"
    )
    return {
        name.removeprefix("beit3."): shape
        for name, shape in shapes.items()
        if name.startswith("beit3.") and not gone.search(name)
    }


def weights(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


class Standin(nn.Module):
    """A module that has parameters of the given names and shapes, and nothing else."""

    def __init__(
        self,
        shapes: Shapes,
        seed: int = 99,
        grid_size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        for name, tensor in weights(shapes, seed, dtype).items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            owner.register_parameter(last, nn.Parameter(tensor))


def snapshot(model: nn.Module) -> dict[str, tuple[int, bytes]]:
    """Identity and bits of every parameter."""
    return {n: (id(p), bits(p)) for n, p in model.named_parameters()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Same names and, for each, the same dtype, shape and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bits(a[n]) == bits(b[n])
        for n in a
    )


def torch_file(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


SHAPES = layout("retrieval", SMALL_BASE, (2, 2))
"""Of a small model for the tests of loading."""


def model() -> Standin:
    return Standin(SHAPES)
