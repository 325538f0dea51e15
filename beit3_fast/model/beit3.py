"""The BEiT-3 backbone: images, texts, pairs, or a batch that mixes all three, in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.errors import ShapeError
from beit3_fast.layout import Pick, TokenLayout
from beit3_fast.model import drop_path
from beit3_fast.model.batch import (
    Embedded,
    embed_ordered,
    embed_padded,
    embed_samples,
    packed_choice,
)
from beit3_fast.model.capture import Capturable
from beit3_fast.model.embedding import VisionEmbedding
from beit3_fast.model.embeddings import Embeddings
from beit3_fast.model.encoder import encode_rows
from beit3_fast.model.incremental import encode_incremental
from beit3_fast.model.masks import read_blocked_mask
from beit3_fast.model.parameters import Encoder


@dataclass(frozen=True)
class Encoded:
    """Packed rows [Rq, C] with their layout, and every layer's rows [R, C] where they were asked for."""

    rows: Tensor
    layout: TokenLayout
    hidden_states: list[Tensor] = field(default_factory=list)

    def vision(self) -> Tensor:
        """Vision rows [Rvq, C], samples in the caller's order where each sample has one row."""
        return self._in_order(self.rows[: self.layout.num_vision_rows], "vision_lengths")

    def text(self) -> Tensor:
        """Text rows [Rtq, C], samples in the caller's order where each sample has one row."""
        return self._in_order(self.rows[self.layout.num_vision_rows :], "text_lengths")

    def _in_order(self, rows: Tensor, lengths: str) -> Tensor:
        if self.layout.in_order:
            return rows
        if set(getattr(self.layout, lengths)) != {1}:
            raise ShapeError(
                "rows of several tokens a sample stay packed when the batch mixes kinds; read them with "
                "Encoded.layout"
            )
        order = torch.tensor(self.layout.order, device=rows.device)
        return torch.empty_like(rows).index_copy(0, order, rows)


class BEiT3(Embeddings, Capturable):
    """torchscale's ``BEiT3`` in parameters, forward signature and output; packed and stateless inside.

    ``config.modalities`` may leave a branch out. ``impl`` names the implementation of both ops.
    """

    _outputs_hold_text = True

    def __init__(self, config: BEiT3Config, impl: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        self.name: str | None = None
        if "text" in config.modalities:
            self.text_embed = nn.Embedding(config.vocab_size, config.embed_dim)
        if "vision" in config.modalities:
            self.vision_embed = VisionEmbedding(config)
        self.encoder = Encoder(config)
        self.apply(init_weights)
        if "text" in config.modalities:
            nn.init.normal_(self.text_embed.weight, std=config.embed_dim**-0.5)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch rows and columns of the position table."""
        return self.config.grid_size

    def forward(
        self,
        textual_tokens: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        text_padding_position: Tensor | None = None,
        attn_mask: Tensor | None = None,
        vision_masked_position: Tensor | None = None,
        incremental_state: dict[int, dict[str, Tensor]] | None = None,
        positions: Tensor | None = None,
        return_all_hiddens: bool = False,
    ) -> dict[str, Any]:
        """torchscale's call: padded in, padded out.

        textual_tokens int64 [B, Nt]; visual_tokens [B, 3, H, W]; text_padding_position [B, Nt], nonzero for
        padding; attn_mask [N, N], nonzero where blocked (a row of all keys blocked attends to nothing, where
        torchscale's sum with -1e8 takes the mean of all values); vision_masked_position [B, patches]; positions
        [1 or B, Nt], rows of the text position table (texts only). Returns encoder_out [B, N, C] (zeros at
        padding), encoder_embedding, encoder_padding_mask, encoder_states, l_aux, multiway_split_position.
        Raises ShapeError and ConfigError for inputs that do not fit.
        """
        embedded = embed_padded(
            self,
            visual_tokens,
            textual_tokens,
            text_padding_position,
            vision_masked_position,
            positions,
            keep_words=True,
        )
        assert embedded.words is not None
        num_vision, num_text = embedded.num_vision, embedded.num_text
        batch, tokens = embedded.layout.batch_size, num_vision + num_text
        padding = torch.zeros(batch, tokens, dtype=torch.bool, device=embedded.rows.device)
        if text_padding_position is not None:
            padding[:, num_vision:] = text_padding_position.bool()
        states: list[Tensor] = []
        if incremental_state is not None:
            x = embedded.unpack(embedded.rows)
            out = encode_incremental(
                self.encoder,
                x,
                num_vision,
                attn_mask,
                incremental_state,
                self.impl,
                states if return_all_hiddens else None,
            )
        else:
            mask: str | Tensor = "bidirectional"
            if attn_mask is not None:
                mask = read_blocked_mask(attn_mask, num_vision, num_text, padding[:, num_vision:])
            hidden: list[Tensor] | None = [] if return_all_hiddens else None
            rows = self._encode(embedded.rows, embedded.layout, mask, None, hidden)
            out = embedded.unpack(rows)
            states = [embedded.unpack(h) for h in hidden or ()]
        split = -1 if num_text == 0 else num_vision
        return {
            "encoder_out": out,
            "encoder_embedding": embedded.unpack(embedded.words),
            "encoder_padding_mask": padding,
            "encoder_states": states,
            "l_aux": [None] * len(self.encoder.layers),
            "multiway_split_position": split,
        }

    def encode(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        text_padding: Tensor | None = None,
        *,
        mask: str | Tensor = "bidirectional",
        vision_masked_position: Tensor | None = None,
        read_vision: Pick = "all",
        read_text: Pick | Tensor = "all",
        return_all_hiddens: bool = False,
    ) -> Encoded:
        """Encode a padded batch and return only the rows that are read, packed.

        image [B, 3, H, W]; text int64 [B, Nt]; text_padding [B, Nt], nonzero for padding. ``read_vision`` and
        ``read_text`` are "all", "first" (class token, beginning of text) or "none"; ``read_text`` may be a
        mask [B, Nt]. Rows that nobody reads are not computed in the last layer.
        """
        embedded = embed_padded(self, image, text, text_padding, vision_masked_position)
        if isinstance(read_text, Tensor):
            read_text = packed_choice(read_text, text_padding, embedded.layout)
        hidden: list[Tensor] | None = [] if return_all_hiddens else None
        return self._read(embedded, mask, read_vision, read_text, hidden)

    def forward_packed(
        self,
        images: Sequence[Tensor | None] | None = None,
        text: Sequence[Tensor | None] | None = None,
        *,
        mask: str | Tensor = "bidirectional",
        read_vision: Pick = "all",
        read_text: Pick = "all",
        return_all_hiddens: bool = False,
    ) -> Encoded:
        """Encode a batch that may mix images, texts and pairs; one entry a sample, None where there is none.

        images: tensors [3, H, W], sizes may differ; text: int64 tensors [Nt], lengths may differ. Positions are
        interpolated for images of another size than the model's. Raises ShapeError for a sample with neither.
        """
        embedded = embed_samples(self, images, text)
        hidden: list[Tensor] | None = [] if return_all_hiddens else None
        return self._read(embedded, mask, read_vision, read_text, hidden)

    def encode_ordered(
        self,
        images: Tensor | None,
        tokens: Tensor | None,
        text_lengths: Sequence[int],
        image_only: int,
        *,
        vision_masked_position: Tensor | None = None,
        read_vision: Pick | Tensor = "all",
        read_text: Pick | Tensor = "all",
    ) -> Encoded:
        """Encode a batch in the order images, pairs, texts, as ``beit3_fast.data.MaskedBatch`` holds it.

        images [I + P, 3, H, W], the first ``image_only`` without a text; tokens int64 [Rt], texts one behind the other;
        vision_masked_position [I + P, patches]. ``read_vision`` and ``read_text`` may be bool tensors [Rv] and [Rt].
        """
        embedded = embed_ordered(
            self, images, tokens, text_lengths, image_only, vision_masked_position
        )
        return self._read(embedded, "bidirectional", read_vision, read_text, None)

    def _read(
        self,
        embedded: Embedded,
        mask: str | Tensor,
        read_vision: Pick | Tensor,
        read_text: Pick | Tensor,
        hidden: list[Tensor] | None,
    ) -> Encoded:
        layout = embedded.layout
        selection = None
        if any(isinstance(read, Tensor) or read != "all" for read in (read_vision, read_text)):
            selection = layout.select(read_vision, read_text)
        rows = self._encode(embedded.rows, layout, mask, selection, hidden)
        return Encoded(rows, layout if selection is None else selection.layout, hidden or [])

    def _encode(
        self,
        rows: Tensor,
        layout: TokenLayout,
        mask: str | Tensor,
        read: Any,
        hidden: list[Tensor] | None,
    ) -> Tensor:
        rates = self.encoder.drop_path_rates if self.training and drop_path.acts() else ()
        return encode_rows(
            self.encoder,
            rows,
            layout,
            mask=mask,
            read=read,
            drop_path_rates=rates,
            hidden_states=hidden,
            recompute=self.encoder.recompute if self.training else (),
            impl=self.impl,
        )


def init_weights(module: nn.Module) -> None:
    """The official initialisation: truncated normal (std 0.02) projections, LayerNorm at one and zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
