"""The callable that stands in for ``forward`` of one torchscale encoder."""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_fast.errors import ConfigError
from beit3_fast.integrations._packing import Packing
from beit3_fast.integrations._structure import Structure
from beit3_fast.integrations._tried import Tried
from beit3_fast.model.encoder import encode_rows
from beit3_fast.model.incremental import encode_incremental
from beit3_fast.model.masks import read_blocked_mask

logger = logging.getLogger("beit3_fast")

# With another dtype torchscale's own masked_fill or addition raises, or (bool) adds 1 instead of blocking.
_MASK_DTYPES = (torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16)
# torchscale then attends to the blocked keys, as rounding happens to leave them.
_SEES_NOTHING = "an attn_mask that blocks every key of a token"


class LeaveAlone(Exception):
    """A call, or an encoder, that the packed computation cannot do; the message says why."""


class Call(NamedTuple):
    """The arguments of torchscale's ``Encoder.forward``."""

    src_tokens: Tensor | None
    encoder_padding_mask: Tensor | None
    attn_mask: Tensor | None
    return_all_hiddens: bool
    token_embeddings: Tensor | None
    multiway_split_position: int | None
    features_only: bool
    incremental_state: Any
    positions: Tensor | None


def read_call(
    src_tokens: Tensor | None,
    encoder_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    return_all_hiddens: bool = False,
    token_embeddings: Tensor | None = None,
    multiway_split_position: int | None = None,
    features_only: bool = False,
    incremental_state: Any = None,
    positions: Tensor | None = None,
    **unknown: Any,
) -> Call:
    """The arguments by name."""
    if unknown:
        raise LeaveAlone(f"arguments that torchscale does not know: {sorted(unknown)}")
    return Call(
        src_tokens,
        encoder_padding_mask,
        attn_mask,
        return_all_hiddens,
        token_embeddings,
        multiway_split_position,
        features_only,
        incremental_state,
        positions,
    )


class Plan(NamedTuple):
    """A call that the fast path can do: what was read from its arguments."""

    embeddings: Tensor
    num_vision: int
    padding: Tensor | None
    packing: Packing | None
    mask: str | Tensor


class EncoderForward:
    """Computes an encoder on packed rows where that is equal, and calls the encoder's own forward where not.

    An object of its own, because a function bound to the encoder would not survive pickling. It does not keep the
    encoder, which keeps it: a cycle would hold the weights until Python's collector runs. ``impl`` names the
    implementation of both ops; ``tried`` holds the classes whose results were compared, ``distrusted`` says what
    came of it; ``fallback_reasons`` says why calls went to the encoder's own forward so far.
    """

    def __init__(self, encoder: Any, impl: str) -> None:
        self._encoder = weakref.ref(encoder)
        self.impl = impl
        self.distrusted: str | None = None
        self.tried = Tried()
        self.fallback_reasons: list[str] = []
        self._structure: Structure | None = None
        self._implied_split: tuple[int, int | None] | None = None
        self.__signature__ = inspect.signature(type(encoder).forward.__get__(encoder))

    def __getstate__(self) -> dict[str, Any]:
        # A structure looks at the dictionaries of these very modules, which a copy does not share.
        return {**self.__dict__, "_encoder": self.encoder, "_structure": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _encoder=weakref.ref(state["_encoder"]))

    @property
    def encoder(self) -> Any:
        """The encoder. Raises ConfigError when it is no more."""
        encoder = self._encoder()
        if encoder is None:
            raise ConfigError(
                "the forward of an accelerated encoder was called after the encoder itself was freed; keep the "
                "model, or the encoder, as long as its forward is used"
            )
        return encoder

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """torchscale's ``Encoder.forward``, same arguments and same dictionary."""
        call, reason = None, ""
        try:
            call = read_call(*args, **kwargs)
            plan = self.plan(call)
        except LeaveAlone as refusal:
            reason = str(refusal)
        if reason:
            return self._own_forward(reason, call, args, kwargs)
        assert call is not None
        if call.multiway_split_position is not None:
            self._implied_split = (call.multiway_split_position, self.structure().stored_split())
        return self.run(call, plan)

    def structure(self) -> Structure:
        """The present structure of the encoder, looked at again if anything in it has changed."""
        encoder, structure = self.encoder, self._structure
        if structure is None or not structure.is_current(encoder):
            structure = self._structure = Structure(encoder)
        return structure

    def obstacle(self) -> str | None:
        """Why no call at all can take the fast path now, or None."""
        if self.distrusted:
            return self.distrusted
        if nn.modules.module._has_any_global_hook():
            return "a hook on all modules (torch.nn.modules.module.register_module_...)"
        structure = self.structure()
        if structure.obstacles:
            return structure.obstacles[0]
        return self.tried.doubt(structure.classes) or structure.setting_obstacle()

    def plan(self, call: Call) -> Plan:
        """What the fast path needs to know of a call. Raises LeaveAlone for one that it cannot do."""
        obstacle = self.obstacle()
        if obstacle is not None:
            raise LeaveAlone(obstacle)
        if torch.jit.is_tracing():
            raise LeaveAlone("tracing by torch.jit")
        embeddings = call.token_embeddings
        if embeddings is None:
            table = self.encoder.embed_tokens
            if call.src_tokens is None or table is None:
                raise LeaveAlone("neither token embeddings nor tokens with an embedding table")
            embeddings = table(call.src_tokens)
        if embeddings.dim() != 3 or not embeddings.numel():
            raise LeaveAlone(f"token embeddings of shape {list(embeddings.shape)}")
        batch, tokens = embeddings.shape[:2]
        num_vision = self._num_vision(call.multiway_split_position, tokens)
        _check_positions(call.positions, batch, tokens, pair=0 < num_vision < tokens)
        padding = _read_padding(call.encoder_padding_mask, batch, tokens)
        if call.attn_mask is not None and call.attn_mask.dtype not in _MASK_DTYPES:
            raise LeaveAlone(
                f"attn_mask of dtype {call.attn_mask.dtype}, which torchscale does not block with"
            )
        if call.incremental_state is not None:
            self._check_incremental(call, tokens)
            return Plan(embeddings, num_vision, padding, None, "bidirectional")
        packing = Packing.of(padding, batch, num_vision, tokens - num_vision, embeddings.device)
        if not packing.layout.num_rows:
            raise LeaveAlone("a batch of nothing but padding")
        mask: str | Tensor = "bidirectional"
        if call.attn_mask is not None:
            mask = _read_mask(call.attn_mask, packing, padding)
        return Plan(embeddings, num_vision, padding, packing, mask)

    def run(self, call: Call, plan: Plan) -> dict[str, Any]:
        """The fast path."""
        encoder = self.encoder
        structure = self.structure()
        embedded = plan.embeddings
        if encoder.embed_scale != 1:
            embedded = encoder.embed_scale * embedded
        vision, text = self._with_positions(embedded, plan.num_vision, call.positions)
        states: list[Tensor] | None = [] if call.return_all_hiddens else None
        if plan.packing is None:
            x = torch.cat([part for part in (vision, text) if part.shape[1]], dim=1)
            if plan.padding is not None:
                x = x * (1 - plan.padding.unsqueeze(-1).type_as(x))
            out = encode_incremental(
                encoder,
                x,
                plan.num_vision,
                call.attn_mask,
                call.incremental_state,
                self.impl,
                states,
            )
        else:
            rows = encode_rows(
                encoder,
                plan.packing.pack(vision, text),
                plan.packing.layout,
                mask=plan.mask,
                drop_path_rates=structure.drop_path_rates(),
                hidden_states=states,
                recompute=["layer"] * len(encoder.layers) if structure.checkpointed else (),
                impl=self.impl,
            )
            out = plan.packing.unpack(rows)
            states = [plan.packing.unpack(rows) for rows in states or ()]
        if not call.features_only and encoder.output_projection is not None:
            out = encoder.output_projection(out)
        padding = call.encoder_padding_mask
        if padding is None:
            padding = torch.zeros(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
        return {
            "encoder_out": out,
            "encoder_embedding": embedded,
            "encoder_padding_mask": padding,
            "encoder_states": states or [],
            "l_aux": [None] * len(encoder.layers),
        }

    def _with_positions(
        self, embedded: Tensor, num_vision: int, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Vision and text tokens with positions added, without touching ``split_position``."""
        tables = self.encoder.embed_positions
        vision, text = embedded[:, :num_vision], embedded[:, num_vision:]
        if tables is not None:
            if vision.shape[1]:
                vision = vision + tables.A(vision, positions=positions)
            if text.shape[1]:
                text = text + tables.B(text, positions=positions)
        return vision, text

    def _num_vision(self, split: int | None, tokens: int) -> int:
        if split is None:
            split = self._split_without_argument()
            if split is None:
                raise LeaveAlone(
                    "no split position given, and the Multiway modules hold different ones"
                )
        if not -1 <= split < tokens:
            raise LeaveAlone(f"a split position of {split} for {tokens} tokens")
        return tokens if split == -1 else split

    def _split_without_argument(self) -> int | None:
        """What torchscale's modules would hold: the split of the last call that gave one, unless set since."""
        stored = self.structure().stored_split()
        implied = self._implied_split
        return implied[0] if implied is not None and implied[1] == stored else stored

    def _check_incremental(self, call: Call, tokens: int) -> None:
        if self.structure().drop_path_rates():
            raise LeaveAlone("decoding with drop path in train mode")
        state, layers = call.incremental_state, len(self.encoder.layers)
        complete = isinstance(state, list) and len(state) == layers
        if not complete and not (
            isinstance(state, dict) and all(i in state for i in range(layers))
        ):
            raise LeaveAlone(
                f"an incremental_state that is no dictionary or list of {layers} caches"
            )
        if call.attn_mask is None:
            return
        past = state[0].get("prev_key")
        keys = tokens + (0 if past is None else past.shape[2])
        if tuple(call.attn_mask.shape) != (tokens, keys):
            shape = list(call.attn_mask.shape)
            raise LeaveAlone(f"attn_mask of shape {shape} for {tokens} tokens and {keys} keys")
        if bool((call.attn_mask != 0).all(1).any()):
            raise LeaveAlone(_SEES_NOTHING)

    def _own_forward(
        self, reason: str, call: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if reason not in self.fallback_reasons:
            self.fallback_reasons.append(reason)
            logger.warning("accelerate: torchscale's own encoder runs, because of %s", reason)
        if call is not None and call.multiway_split_position is not None:
            self._implied_split = None
        elif self._implied_split is not None:
            split = self._split_without_argument()
            if split is not None:
                self.structure().store_split(split)
        encoder = self.encoder
        result: dict[str, Any] = type(encoder).forward(encoder, *args, **kwargs)
        return result


def _check_positions(positions: Tensor | None, batch: int, tokens: int, pair: bool) -> None:
    if positions is None:
        return
    if pair:
        raise LeaveAlone("positions given for a pair")
    if tuple(positions.shape) not in ((1, tokens), (batch, tokens)):
        raise LeaveAlone(f"positions of shape {list(positions.shape)}")


def _read_padding(padding: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """bool [B, N] or None."""
    if padding is None:
        return None
    if tuple(padding.shape) != (batch, tokens):
        raise LeaveAlone(f"encoder_padding_mask of shape {list(padding.shape)}")
    if padding.dtype is torch.bool:
        return padding
    blocked = padding != 0
    if not bool((blocked == padding).all()):
        raise LeaveAlone("encoder_padding_mask with values other than 0 and 1")
    return blocked


def _read_mask(blocked: Tensor, packing: Packing, padding: Tensor | None) -> str | Tensor:
    """The mask of the packed rows: a structure, or a tensor in which every real token sees something."""
    num_vision, num_text = packing.num_vision, packing.num_text
    tokens = num_vision + num_text
    if tuple(blocked.shape) != (tokens, tokens):
        raise LeaveAlone(f"attn_mask of shape {list(blocked.shape)} for {tokens} tokens")
    text_padding = None if padding is None else padding[:, num_vision:]
    mask = read_blocked_mask(blocked, num_vision, num_text, text_padding)
    if isinstance(mask, str):
        return mask
    if padding is not None and bool(padding[:, :num_vision].any()):
        raise LeaveAlone("an attn_mask of no known structure with padded image tokens")
    sees = mask.any(-1)
    if mask.dim() == 3:
        layout = packing.layout
        lengths = torch.empty(layout.batch_size, 1, dtype=torch.int64)
        lengths[list(layout.order), 0] = num_vision + torch.tensor(layout.text_lengths)
        sees = sees | (torch.arange(mask.shape[1]) >= lengths).to(sees.device)
    if not bool(sees.all()):
        raise LeaveAlone(_SEES_NOTHING)
    return mask
