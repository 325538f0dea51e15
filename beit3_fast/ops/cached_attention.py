"""cached_attention: the softmax of shared_attention for decoding, a few new rows against keys that are kept.

    o = softmax(scale q K^T) V      K, V: the keys and values that a row sees of its sequence's cache

Keys that no step changes, an image's, can lie packed in front of the others: the CPU kernels then read them as they are
stored, where otherwise every call would bring them into that order anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.composite.cached_attention import cached_attention as composite_impl
from beit3_fast.errors import KernelUnavailable, ShapeError
from beit3_fast.ops import cuda_decoding, cuda_kernels, dispatch, library
from beit3_fast.ops.operands import Measured
from beit3_fast.ops.shared_attention import check_numbers
from beit3_fast.reference.cached_attention import cached_attention as reference_impl


class PackedKeys(NamedTuple):
    """Keys and values of B samples in the order in which the CPU kernels read them."""

    packed: Tensor  # [B, H, L] in the dtype of the keys
    num_keys: int  # of a sample


class NewKeys(NamedTuple):
    """Keys and values [S, m, C] of sequences that take the places of a cache from ``place`` on.

    ``place``: an integer, or int64 [1] on their device, where a CUDA graph is to find it.
    """

    k: Tensor
    v: Tensor
    place: int | Tensor


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    num_heads: int,
    samples: Sequence[int] | None = None,
    scale: float | None = None,
    impl: str = "auto",
    prefix: PackedKeys | None = None,
    front: int = 0,
    new: NewKeys | None = None,
) -> Tensor:
    """Attend from the new rows of S sequences to cached keys: beams of a caption are rows of one sequence.

    q [S, n, C]; k and v [B, N, C], views of a longer cache are fine; every row sees the first ``front`` keys, and of the
    others those that ``seen`` bool [S, n, N - front] names; sequence s reads cache sample ``samples[s]`` (default: s, with S = B), so that finished sequences leave
    without their cache being copied. ``scale`` defaults to D ** -0.5. Returns [S, n, C]; a row that sees no key gives
    zeros. ``prefix``: keys in front of those, which every row sees, from ``pack_keys``; only "cpu" reads them. ``new``:
    keys and values that are first written into k and v, no two sequences having one sample then.

    "reference", "composite", "cpu" and "cuda" compute it. Differentiable in q, k and v but for the last two. Raises ShapeError for
    operands that do not fit, ConfigError and KernelUnavailable for ``impl``.
    """
    own: dict[str, Any] = {"num_heads": num_heads, "samples": samples, "scale": scale}
    own |= {"impl": impl, "prefix": prefix, "front": front, "new": new}
    return measured_cached_attention(q, k, v, seen, **own).rows.view(q.shape)


def measured_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    num_heads: int,
    samples: Sequence[int] | None = None,
    scale: float | None = None,
    impl: str = "auto",
    prefix: PackedKeys | None = None,
    front: int = 0,
    new: NewKeys | None = None,
) -> Measured:
    """As ``cached_attention``, rows [S * n, C]; they have their statistics where the CUDA kernel was taken."""
    _check(q, k, v, seen, samples, num_heads, scale, front)
    if prefix is not None:
        _check_prefix(prefix, q, k, num_heads)
    if new is not None:
        _check_new(new, q, k)
    if scale is None:
        scale = (q.shape[2] // num_heads) ** -0.5
    misfit = cuda_kernels.attention_misfit(q.shape[2] // num_heads)
    at = dispatch.situation("cached_attention", [q, k, v], mask_tensor=True, misfit=misfit)
    choice = dispatch.choose(at, impl)
    own = range(len(k)) if samples is None else samples
    lower = dispatch.autocast_dtype(q) or q.dtype
    if choice.impl == "cuda" and prefix is None:
        return _on_cuda(q, k, v, seen, own, new, front, num_heads, scale, lower)
    if new is not None:
        for cache, rows in ((k, new.k), (v, new.v)):
            _write(cache, rows, new.place, own)
    if front:
        seen = F.pad(seen, (front, 0), value=True)
    if choice.impl == "cpu":
        q, k, v = (dispatch.rows_in_memory(t.to(lower)) for t in (q, k, v))
        chosen = torch.tensor(own, dtype=torch.int64)
        packed = (None, 0) if prefix is None else prefix
        tail = (seen.contiguous(), chosen, num_heads, scale, *packed)
        y: Tensor = _ops().cached_attention(q.contiguous(), k, v, *tail)
        return Measured(y.flatten(0, 1))
    if prefix is not None:
        raise KernelUnavailable(
            f"cached_attention: only impl='cpu' reads packed keys, and {choice.impl!r} was taken: 'cpu' "
            f"{dict(choice.rejected).get('cpu')}. Ask reads_packed_keys before packing."
        )
    run = reference_impl if choice.impl == "reference" else composite_impl
    return Measured(run(q, k, v, seen, own, num_heads, scale).flatten(0, 1))


def _on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    own: Sequence[int],
    new: NewKeys | None,
    front: int,
    num_heads: int,
    scale: float,
    dtype: torch.dtype,
) -> Measured:
    """The call in ``dtype``; the new keys are written by the same launch where the cache is of that dtype."""
    if new is not None and k.dtype is not dtype:
        _write(k, new.k, new.place, own)
        _write(v, new.v, new.place, own)
        new = None
    q, k, v = (t.to(dtype) for t in (q, k, v))
    written: tuple[Any, ...] = (None, None, None, 0)
    if new is not None:
        on_device = isinstance(new.place, Tensor)
        where = (new.place, 0) if on_device else (None, new.place)
        written = (new.k, new.v, *where)
    named = _named_samples(own, len(k), q.device)
    tail = (named, *written, front, num_heads, scale)
    o, parts = cuda_decoding.cached_attention(q, k, v, seen, *tail)
    return Measured(o.flatten(0, 1), parts, q.shape[2] // num_heads)


def _write(cache: Tensor, rows: Tensor, place: int | Tensor, own: Sequence[int]) -> None:
    """Put rows [S, m, C] into the samples ``own`` of a cache, from ``place`` on; a tensor is not read on the host."""
    whole = list(own) == list(range(len(cache)))
    kept: Any = slice(None) if whole else list(own)
    if not isinstance(place, Tensor):
        cache[kept, place : place + rows.shape[1]] = rows
        return
    places = place + torch.arange(rows.shape[1], device=rows.device)
    if whole:
        cache.index_copy_(1, places, rows)
    else:
        cache[torch.tensor(kept, device=rows.device)[:, None], places] = rows


def _named_samples(own: Sequence[int], count: int, device: torch.device) -> Tensor | None:
    """The samples for the CUDA kernel, which needs none where they are all of the cache's in order."""
    if list(own) == list(range(count)):
        return None
    return torch.tensor(own, dtype=torch.int32, device=device)


def reads_packed_keys(rows: Tensor, impl: str = "auto") -> bool:
    """Whether ``cached_attention`` with such rows as q, k and v takes the kernels that read ``PackedKeys``."""
    at = dispatch.situation("cached_attention", [rows], mask_tensor=True)
    return not at.autocast and dispatch.choose(at, impl).impl == "cpu"


def pack_keys(k: Tensor, v: Tensor, *, num_heads: int) -> PackedKeys:
    """Pack k and v [B, N, C], fp32 or bf16 CPU tensors, C = H * D; needs the compiled library.

    Raises ShapeError for operands that do not fit, KernelUnavailable where the library is missing.
    """
    _check_tensors(k=k, v=v)
    check_numbers(num_heads, None)
    _check_rows("k", k, num_heads)
    _check_keys(k, v, k)
    if k.device.type != "cpu" or k.dtype not in (torch.float32, torch.bfloat16) or not k.shape[1]:
        raise ShapeError(
            f"k must be a float32 or bfloat16 CPU tensor with at least one key, "
            f"got {k.dtype} on {k.device} of shape {list(k.shape)}"
        )
    if not library.available():
        raise KernelUnavailable(
            f"pack_keys needs the compiled library, which {library.why_unavailable()}"
        )
    own = (dispatch.rows_in_memory(t.detach()) for t in (k, v))
    return PackedKeys(_ops().pack_keys(*own, num_heads), k.shape[1])


def _ops() -> Any:
    """The compiled ops, with their shape functions registered."""
    _register()
    return torch.ops.beit3_fast


@library.once
def _register() -> None:
    library.load()

    @torch.library.register_fake("beit3_fast::cached_attention")
    def _(q: Tensor, *_: Any) -> Tensor:
        return q.new_empty(q.shape)

    @torch.library.register_fake("beit3_fast::pack_keys")
    def _(k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        return k.new_empty(_packed_shape(k, k.shape[1], num_heads))


# Columns of a panel, and bytes of a column in a chunk of its depth (csrc/cpu/kernels.h).
_PANEL, _CHUNK = 32, 64


def _packed_shape(like: Tensor, count: int, num_heads: int) -> tuple[int, int, int]:
    """[B, H, L] of ``count`` packed keys of samples [B, N, C]."""
    batch, _, width = like.shape
    chunk, depth = _CHUNK // like.element_size(), width // num_heads
    panels = ((count, depth), (depth, count))
    size = sum(-(-columns // _PANEL) * -(-inner // chunk) for columns, inner in panels)
    return batch, num_heads, size * chunk * _PANEL


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    samples: Sequence[int] | None,
    num_heads: int,
    scale: float | None,
    front: int,
) -> None:
    _check_tensors(q=q, k=k, v=v, seen=seen)
    check_numbers(num_heads, scale)
    _check_rows("q", q, num_heads)
    _check_keys(k, v, q)
    own = range(len(k)) if samples is None else samples
    if (
        not isinstance(own, (list, tuple, range))
        or len(own) != len(q)
        or not all(isinstance(sample, int) and 0 <= sample < len(k) for sample in own)
    ):
        raise ShapeError(
            f"samples must name a cache sample, 0 to {len(k) - 1}, for each of the {len(q)} sequences, "
            f"got {samples!r}"
        )
    if not isinstance(front, int) or not 0 <= front <= k.shape[1]:
        raise ShapeError(f"front must count some of the {k.shape[1]} keys, got {front!r}")
    expected = (*q.shape[:2], k.shape[1] - front)
    if seen.dtype != torch.bool or tuple(seen.shape) != expected or seen.device != q.device:
        shape = "[S, n, N - front]" if front else "[S, n, N]"
        raise ShapeError(
            f"seen must be bool {shape} = {list(expected)} on {q.device}, "
            f"got {seen.dtype} of shape {list(seen.shape)} on {seen.device}"
        )


def _check_tensors(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def _check_rows(name: str, q: Tensor, num_heads: int) -> None:
    if (
        q.dim() != 3
        or not q.dtype.is_floating_point
        or num_heads < 1
        or not q.shape[2]
        or q.shape[2] % num_heads
    ):
        raise ShapeError(
            f"{name} must be a floating-point tensor [S, n, H * D] with H = num_heads = {num_heads}, "
            f"got {q.dtype} of shape {list(q.shape)}"
        )


def _check_keys(k: Tensor, v: Tensor, q: Tensor) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 3 or tensor.shape != k.shape or tensor.shape[2] != q.shape[2]:
            raise ShapeError(
                f"{name} must have shape [B, N, C] with C = {q.shape[2]}, k and v alike, got {list(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ShapeError(
                f"{name} must have q's dtype and device ({q.dtype}, {q.device}), "
                f"got {tensor.dtype}, {tensor.device}"
            )


def _check_new(new: NewKeys, q: Tensor, k: Tensor) -> None:
    if not isinstance(new, NewKeys):
        raise ShapeError(f"new must be NewKeys, got {type(new).__name__}")
    _check_tensors(**{"new.k": new.k, "new.v": new.v})
    for name, rows in (("new.k", new.k), ("new.v", new.v)):
        fits = rows.dim() == 3 and rows.shape[::2] == q.shape[::2] and rows.shape == new.k.shape
        if not fits or rows.dtype != k.dtype or rows.device != k.device:
            raise ShapeError(
                f"{name} must be [S, m, C] with S = {len(q)} and C = {q.shape[2]}, k and v alike, of the cache's dtype and "
                f"device ({k.dtype}, {k.device}), got {rows.dtype} of shape {list(rows.shape)} on {rows.device}"
            )
    place = new.place
    if isinstance(place, Tensor):
        if place.dtype != torch.int64 or tuple(place.shape) != (1,) or place.device != k.device:
            raise ShapeError(
                f"new.place must be int64 [1] on {k.device}, got {place.dtype} of shape {list(place.shape)} on {place.device}"
            )
    elif not isinstance(place, int) or not 0 <= place <= k.shape[1] - new.k.shape[1]:
        raise ShapeError(
            f"new.place must leave {new.k.shape[1]} of the {k.shape[1]} places, got {place!r}"
        )


def _check_prefix(prefix: PackedKeys, q: Tensor, k: Tensor, num_heads: int) -> None:
    if not isinstance(prefix, PackedKeys):
        raise ShapeError(f"prefix must come from pack_keys, got {type(prefix).__name__}")
    packed, count = prefix
    expected = _packed_shape(k, count, num_heads)
    if packed.dtype != q.dtype or tuple(packed.shape) != expected or packed.device != q.device:
        raise ShapeError(
            f"prefix must hold {count} keys for each of {len(k)} samples, {num_heads} heads and q's dtype and device "
            f"({q.dtype}, {q.device}): {list(expected)}, got {packed.dtype} of shape {list(packed.shape)}"
        )
