"""TokenLayout: where the rows of a batch lie once padding is gone.

All vision rows of the batch come first, then all text rows, so every expert of a layer owns one contiguous
range of rows. Samples are ordered by kind (image only, pairs, text only): a vision-language expert's rows,
those of the pairs, are then contiguous too. Shape letters: B samples, R rows (Rv vision, Rt text), N tokens
of one sample (Nv vision, Nt text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from beit3_fast.errors import ConfigError, ShapeError

Pick = Literal["all", "first", "none"]


class Selection(NamedTuple):
    """Some rows of a layout: ``rows`` int64 [Rq], ascending, and the layout that they form."""

    rows: Tensor
    layout: TokenLayout


class Part(NamedTuple):
    """A group of samples: its vision rows and text rows in the whole layout, and its own layout."""

    vision: slice
    text: slice
    layout: TokenLayout

    def of(self, rows: Tensor) -> Tensor:
        """The group's rows [Rp, ...] of all rows [R, ...]."""
        return torch.cat([rows[self.vision], rows[self.text]])


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Modality-major rows of one batch; immutable, built once and passed down as an argument.

    ``vision_lengths`` and ``text_lengths`` hold the rows of each packed sample; packed sample i is sample
    ``order[i]`` of the caller's batch. The first ``image_only`` packed samples have no text, the last
    ``text_only`` have no image. ``positions`` int32 [R], present in a selection only, is the place of each
    row within its own sample's vision or text rows (what a causal mask compares).
    """

    vision_lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]
    order: tuple[int, ...]
    image_only: int
    text_only: int
    device: torch.device
    positions: Tensor | None = None

    @classmethod
    def from_lengths(
        cls,
        vision_lengths: Sequence[int],
        text_lengths: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> TokenLayout:
        """The layout of B samples, given their token counts in the caller's order.

        Raises ShapeError when the two lists differ in length or a count is negative.
        """
        if not all(isinstance(own, (list, tuple)) for own in (vision_lengths, text_lengths)):
            raise ShapeError(
                "vision_lengths and text_lengths must be lists of token counts, got "
                f"{type(vision_lengths).__name__} and {type(text_lengths).__name__}"
            )
        if len(vision_lengths) != len(text_lengths):
            raise ShapeError(
                "vision_lengths and text_lengths must have one entry per sample, got "
                f"{len(vision_lengths)} and {len(text_lengths)}"
            )
        lengths = list(zip(vision_lengths, text_lengths, strict=True))
        if not all(isinstance(count, (int, torch.SymInt)) for pair in lengths for count in pair):
            raise ShapeError(f"token counts must be integers, got {lengths}")
        if any(vision < 0 or text < 0 for vision, text in lengths):
            raise ShapeError(f"token counts must not be negative, got {lengths}")
        kinds = [0 if text == 0 else 1 if vision else 2 for vision, text in lengths]
        order = sorted(range(len(lengths)), key=kinds.__getitem__)
        return cls(
            vision_lengths=tuple(lengths[i][0] for i in order),
            text_lengths=tuple(lengths[i][1] for i in order),
            order=tuple(order),
            image_only=kinds.count(0),
            text_only=kinds.count(2),
            device=torch.device(device),
        )

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.order)

    @cached_property
    def num_vision_rows(self) -> int:
        """Rv."""
        return sum(self.vision_lengths)

    @cached_property
    def num_text_rows(self) -> int:
        """Rt."""
        return sum(self.text_lengths)

    @property
    def num_rows(self) -> int:
        """R = Rv + Rt."""
        return self.num_vision_rows + self.num_text_rows

    @cached_property
    def longest(self) -> int:
        """Most rows that a sample has: the largest N."""
        lengths = zip(self.vision_lengths, self.text_lengths, strict=True)
        return max(map(sum, lengths), default=0)

    @property
    def mask_size(self) -> int:
        """Rows and columns of a mask tensor: the longest image's tokens and the longest text's."""
        return max(self.vision_lengths, default=0) + max(self.text_lengths, default=0)

    @property
    def in_order(self) -> bool:
        """Whether packed samples are in the caller's order."""
        return self.order == tuple(range(len(self.order)))

    @property
    def sample_without_text(self) -> int | None:
        """The first of the caller's samples that has no text rows, None where all have some."""
        without = [own for own, text in zip(self.order, self.text_lengths, strict=True) if not text]
        return min(without, default=None)

    @cached_property
    def vision_starts(self) -> tuple[int, ...]:
        """First vision row of each packed sample, and Rv at the end: B + 1 numbers."""
        return tuple(accumulate(self.vision_lengths, initial=0))

    @cached_property
    def text_starts(self) -> tuple[int, ...]:
        """First text row of each packed sample counted from Rv, and Rt at the end: B + 1 numbers."""
        return tuple(accumulate(self.text_lengths, initial=0))

    @cached_property
    def cu_vision(self) -> Tensor:
        """``vision_starts`` as int32 [B + 1] on the layout's device."""
        return torch.tensor(self.vision_starts, dtype=torch.int32, device=self.device)

    @cached_property
    def cu_text(self) -> Tensor:
        """``text_starts`` as int32 [B + 1] on the layout's device."""
        return torch.tensor(self.text_starts, dtype=torch.int32, device=self.device)

    @cached_property
    def sample_of_row(self) -> Tensor:
        """int64 [R]: the caller's sample that each row belongs to."""
        order = torch.tensor(self.order, dtype=torch.int64)
        lengths = torch.tensor((self.vision_lengths, self.text_lengths), dtype=torch.int64)
        rows = [order.repeat_interleave(segment) for segment in lengths]
        return torch.cat(rows).to(self.device)

    @cached_property
    def padded_rows(self) -> tuple[Tensor, Tensor]:
        """int64 [B, N]: the row at each place of a packed sample padded to the longest, and bool [B, N]: is one.

        Places hold the vision rows, then the text rows; padding points at row 0.
        """
        starts = torch.tensor((self.vision_starts[:-1], self.text_starts[:-1]), dtype=torch.int64)
        lengths = torch.tensor((self.vision_lengths, self.text_lengths), dtype=torch.int64)
        places = torch.arange(int(lengths.sum(0).max()) if self.order else 0)[None]
        vision = lengths[0][:, None]
        text = places - vision + starts[1][:, None] + self.num_vision_rows
        rows = torch.where(places < vision, places + starts[0][:, None], text)
        valid = places < lengths.sum(0)[:, None]
        return rows.where(valid, 0).to(self.device), valid.to(self.device)

    @cached_property
    def is_uniform(self) -> bool:
        """True when all rows are of one modality and every sample has equally many: they are [B, N] as they lie."""
        one_kind = 0 in (self.num_vision_rows, self.num_text_rows)
        return one_kind and len(set(self.vision_lengths)) <= 1 and len(set(self.text_lengths)) <= 1

    def expert_bounds(self, experts: str) -> tuple[int, ...]:
        """Row ranges of the experts: E + 1 ascending numbers from 0 to R.

        ``experts`` is "A" (one expert for all rows), "AB" (vision, text) or "ACB" (vision rows of image-only
        samples, all rows of pairs, text rows of text-only samples).
        """
        if experts == "A":
            return (0, self.num_rows)
        if experts == "AB":
            return (0, self.num_vision_rows, self.num_rows)
        if experts == "ACB":
            first_text_only = self.batch_size - self.text_only
            return (
                0,
                self.vision_starts[self.image_only],
                self.num_vision_rows + self.text_starts[first_text_only],
                self.num_rows,
            )
        raise ConfigError(f"experts must be 'A', 'AB' or 'ACB', got {experts!r}")

    def segments(self, sample: int) -> tuple[slice, slice]:
        """The vision rows and the text rows of a packed sample, as two slices of [0, R)."""
        if not 0 <= sample < self.batch_size:
            raise ShapeError(f"a sample must be in [0, {self.batch_size}), got {sample}")
        offset = self.num_vision_rows
        vision = slice(self.vision_starts[sample], self.vision_starts[sample + 1])
        text = slice(
            offset + self.text_starts[sample],
            offset + self.text_starts[sample + 1],
        )
        return vision, text

    def select(self, vision: Pick | Tensor = "none", text: Pick | Tensor = "none") -> Selection:
        """Keep some rows of every sample: all, the first (class token, beginning of text) or none.

        Either may also be a bool tensor, [Rv] or [Rt], that names rows in packed order. How many it names must be known
        on the host: one that lies on the CPU is read there, and a GPU does not have to be waited for.
        """
        vision_rows, vision_lengths, vision_positions = _pick(
            "vision", vision, self.vision_lengths, self.vision_starts, self.device
        )
        text_rows, text_lengths, text_positions = _pick(
            "text", text, self.text_lengths, self.text_starts, self.device
        )
        rows = torch.cat([vision_rows, text_rows + self.num_vision_rows])
        layout = TokenLayout(
            vision_lengths=vision_lengths,
            text_lengths=text_lengths,
            order=self.order,
            image_only=self.image_only,
            text_only=self.text_only,
            device=self.device,
            positions=torch.cat([vision_positions, text_positions]).to(torch.int32),
        )
        return Selection(rows, layout)

    def keep(self, samples: Sequence[bool]) -> Selection:
        """Only the samples that are True (in the caller's order), all their rows; ``order`` keeps the caller's numbers."""
        kept = [place for place, own in enumerate(self.order) if samples[own]]
        vision, text = (
            _rows_of([lengths[i] for i in kept], [starts[i] for i in kept])
            for lengths, starts in (
                (self.vision_lengths, self.vision_starts),
                (self.text_lengths, self.text_starts),
            )
        )
        rows = torch.cat([vision, text + self.num_vision_rows]).to(self.device)
        first_text_only = self.batch_size - self.text_only
        layout = TokenLayout(
            vision_lengths=tuple(self.vision_lengths[i] for i in kept),
            text_lengths=tuple(self.text_lengths[i] for i in kept),
            order=tuple(self.order[i] for i in kept),
            image_only=sum(i < self.image_only for i in kept),
            text_only=sum(i >= first_text_only for i in kept),
            device=self.device,
            positions=None if self.positions is None else self.positions[rows],
        )
        return Selection(rows, layout)

    def split(self, max_rows: int) -> list[Part]:
        """Groups of neighbouring packed samples with at most ``max_rows`` rows each (or one sample)."""
        parts: list[Part] = []
        start = rows = 0
        for sample in range(self.batch_size + 1):
            own = 0
            if sample < self.batch_size:
                own = self.vision_lengths[sample] + self.text_lengths[sample]
                if rows + own <= max_rows or sample == start:
                    rows += own
                    continue
            if sample > start:
                parts.append(self.part(start, sample))
            start, rows = sample, own
        return parts

    def part(self, start: int, stop: int) -> Part:
        """The packed samples ``start`` to ``stop`` as a group."""
        vision = slice(self.vision_starts[start], self.vision_starts[stop])
        text = slice(
            self.num_vision_rows + self.text_starts[start],
            self.num_vision_rows + self.text_starts[stop],
        )
        positions = self.positions
        if positions is not None:
            positions = torch.cat([positions[vision], positions[text]])
        first_text_only = self.batch_size - self.text_only
        layout = TokenLayout(
            vision_lengths=self.vision_lengths[start:stop],
            text_lengths=self.text_lengths[start:stop],
            order=self.order[start:stop],
            image_only=max(0, min(stop, self.image_only) - start),
            text_only=max(0, stop - max(start, first_text_only)),
            device=self.device,
            positions=positions,
        )
        return Part(vision, text, layout)


def _rows_of(lengths: list[int], starts: list[int]) -> Tensor:
    """int64: the numbers of the rows of segments that begin at ``starts``."""
    counts, first = torch.tensor((lengths, starts), dtype=torch.int64)
    shift = first - (counts.cumsum(0) - counts)
    return torch.arange(sum(lengths)) + shift.repeat_interleave(counts)


def _pick(
    segment: str,
    pick: str | Tensor,
    lengths: tuple[int, ...],
    starts: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Rows, their count per sample and their positions within the sample, for one segment."""
    if isinstance(pick, Tensor):
        return _pick_named(segment, pick, lengths, starts, device)
    if pick == "all":
        rows = torch.arange(starts[-1], device=device)
        first = torch.tensor(starts[:-1], dtype=torch.int64, device=device)
        counts = torch.tensor(lengths, dtype=torch.int64, device=device)
        return rows, lengths, rows - first.repeat_interleave(counts)
    if pick not in ("first", "none"):
        raise ConfigError(f"rows to keep must be 'all', 'first' or 'none', got {pick!r}")
    counts_kept = tuple(min(length, 1) if pick == "first" else 0 for length in lengths)
    kept = [start for start, count in zip(starts, counts_kept, strict=False) if count]
    rows = torch.tensor(kept, dtype=torch.int64, device=device)
    return rows, counts_kept, torch.zeros_like(rows)


def _pick_named(
    segment: str,
    mask: Tensor,
    lengths: tuple[int, ...],
    starts: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """``_pick`` of the rows that a bool tensor names."""
    if mask.dtype != torch.bool or tuple(mask.shape) != (starts[-1],):
        letters = f"R{segment[0]}"
        raise ShapeError(
            f"{segment} rows to keep must be a bool tensor [{letters}] = [{starts[-1]}], "
            f"got {mask.dtype} of shape {list(mask.shape)}"
        )
    rows = mask.nonzero().flatten()
    bounds = torch.tensor(starts, dtype=torch.int64, device=mask.device)
    samples = torch.searchsorted(bounds[1:], rows, right=True)
    counts = tuple(torch.bincount(samples, minlength=len(lengths)).tolist())
    places = rows - bounds[samples]
    return rows.to(device), counts, places.to(device)
