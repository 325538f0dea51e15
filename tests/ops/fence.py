"""Tensors beside pages that nobody may touch: an access past an end ends the process. Linux alone."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


class Fence:
    """Copies tensors so that they end (or begin) at a page that nobody may touch."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.areas: list[tuple[int, int, mmap.mmap]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        page = mmap.PAGESIZE
        size = tensor.numel() * tensor.element_size()
        inside = -(-size // page) * page
        area = mmap.mmap(-1, inside + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for start in (base, base + page + inside):
            assert self.libc.mprotect(ctypes.c_void_p(start), page, 0) == 0
            self.areas.append((start, page, area))
        offset = page + (inside - size if self.at_end else 0)
        flat = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.view(tensor.shape).copy_(tensor)

    def open(self) -> None:
        for start, size, _ in self.areas:
            self.libc.mprotect(ctypes.c_void_p(start), size, mmap.PROT_READ | mmap.PROT_WRITE)
