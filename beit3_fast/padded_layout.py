"""PaddedLayout: a batch in which every sample has equally many rows, padding included.

torch.compile, torch.export and CUDA graphs want shapes that no value decides. This layout costs the rows of the
padding and reads no length on the host: which text rows are padding stays a tensor, and the batch size may be
symbolic. Rows lie as in TokenLayout, vision rows of the batch first, samples in the caller's order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.layout import Pick, Selection, TokenLayout

_fixed: ContextVar[bool] = ContextVar("beit3_fast_fixed_shapes", default=False)


def shapes_are_fixed() -> bool:
    """Whether batches get a PaddedLayout: while torch.compile or torch.export trace, and in ``fixed_shapes()``."""
    return torch.compiler.is_compiling() or _fixed.get()


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Within it, padded batches keep their padding, so that shapes depend on shapes only."""
    token = _fixed.set(True)
    try:
        yield
    finally:
        _fixed.reset(token)


class PaddedLayout(TokenLayout):
    """B samples of ``num_vision`` and ``num_text`` rows each.

    ``valid`` bool [B, Nt]: the text rows that are not padding (None: all). No query sees a key that is padding; what is
    computed in rows of padding means nothing. A sample whose whole text is padding counts as a pair. Raises ShapeError for
    another ``valid``.
    """

    num_vision: int
    num_text: int
    valid: Tensor | None

    def __init__(
        self,
        batch_size: int,
        num_vision: int,
        num_text: int,
        device: torch.device,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        if valid is not None and (valid.dtype is not torch.bool or valid.dim() != 2):
            raise ShapeError(
                f"valid must be bool [B, Nt], True where a text row is no padding, got {valid.dtype} of shape {list(valid.shape)}"
            )
        if valid is not None and tuple(valid.shape) != (batch_size, num_text):
            raise ShapeError(
                f"valid must be bool [B, Nt] = {[batch_size, num_text]}, got {list(valid.shape)}"
            )
        samples = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
        fields = {
            "_batch_size": batch_size,
            "num_vision": num_vision,
            "num_text": num_text,
            "device": device,
            "valid": valid,
            "positions": positions,
            "cu_vision": samples * num_vision,
            "cu_text": samples * num_text,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def batch_size(self) -> int:
        """B."""
        size: int = self.__dict__["_batch_size"]
        return size

    @property
    def vision_lengths(self) -> tuple[int, ...]:
        """Rows of each sample; makes a symbolic B a number, as the other tuples do."""
        return (self.num_vision,) * self.batch_size

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Rows of each sample."""
        return (self.num_text,) * self.batch_size

    @property
    def order(self) -> tuple[int, ...]:
        """The caller's."""
        return tuple(range(self.batch_size))

    @property
    def image_only(self) -> int:
        """All samples or none."""
        return 0 if self.num_text else self.batch_size

    @property
    def text_only(self) -> int:
        """All samples or none."""
        return 0 if self.num_vision else self.batch_size

    @property
    def in_order(self) -> bool:
        """True."""
        return True

    @property
    def sample_without_text(self) -> int | None:
        """A sample without text rows, None where all have some."""
        return None if self.num_text else 0

    @property
    def num_vision_rows(self) -> int:
        """Rv."""
        return self.batch_size * self.num_vision

    @property
    def num_text_rows(self) -> int:
        """Rt."""
        return self.batch_size * self.num_text

    @property
    def longest(self) -> int:
        """N."""
        return self.num_vision + self.num_text

    @property
    def mask_size(self) -> int:
        """N."""
        return self.longest

    @property
    def sample_of_row(self) -> Tensor:
        """int64 [R]: the sample that each row belongs to."""
        samples = torch.arange(self.batch_size, device=self.device)[:, None]
        counts = (self.num_vision, self.num_text)
        return torch.cat([samples.expand(-1, count).flatten() for count in counts])

    @property
    def is_uniform(self) -> bool:
        """True when there is no text, or text alone without padding."""
        return self.num_text == 0 or (self.num_vision == 0 and self.valid is None)

    def expert_bounds(self, experts: str) -> tuple[int, ...]:
        """As in TokenLayout."""
        if experts == "ACB":
            rows = self.num_rows
            if not self.num_text:
                return (0, rows, rows, rows)
            return (0, 0, rows, rows) if self.num_vision else (0, 0, 0, rows)
        return super().expert_bounds(experts)

    def select(self, vision: Pick | Tensor = "none", text: Pick | Tensor = "none") -> Selection:
        """As in TokenLayout, but without a tensor that names rows: ShapeError."""
        if isinstance(vision, Tensor) or isinstance(text, Tensor):
            raise ShapeError(
                "how many rows a tensor chooses is not known where shapes are fixed (torch.compile, "
                "torch.export, capture); read all of them and index the result"
            )
        counts: list[int] = []
        rows, positions = [], []
        segments = ((vision, self.num_vision, 0), (text, self.num_text, self.num_vision_rows))
        for pick, length, offset in segments:
            if pick not in ("all", "first", "none"):
                raise ConfigError(f"rows to keep must be 'all', 'first' or 'none', got {pick!r}")
            count = length if pick == "all" or length == 0 else int(pick == "first")
            places = torch.arange(count, device=self.device)[None]
            first = torch.arange(self.batch_size, device=self.device)[:, None] * length + offset
            counts.append(count)
            rows.append((first + places).flatten())
            positions.append(places.expand(self.batch_size, -1).flatten())
        own = PaddedLayout(
            self.batch_size,
            counts[0],
            counts[1],
            self.device,
            positions=torch.cat(positions).to(torch.int32),
        )
        return Selection(torch.cat(rows), own)

    def unpack(self, rows: Tensor) -> Tensor:
        """[R, C] -> [B, N, C], zeros at padding."""
        vision, text = (
            part.view(self.batch_size, count, rows.shape[1])
            for part, count in (
                (rows[: self.num_vision_rows], self.num_vision),
                (rows[self.num_vision_rows :], self.num_text),
            )
        )
        if self.valid is not None:
            text = torch.where(self.valid[..., None], text, 0.0)
        return torch.cat([vision, text], dim=1)
