"""The released captioning model, by its official names, and captions of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.data import Processor
from beit3_fast.data.tokenizer import BOS, EOS, PAD
from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.finite import check_finite, check_pixels
from beit3_fast.generate import Caption, CaptionStep, Options, Special, caption_steps, captions
from beit3_fast.model.decoding import CaptionDecoder, head_logits
from beit3_fast.model.inputs import check_processor, image_batches, image_tensors, listed
from beit3_fast.model.task import BEiT3Task, check_given, take_further
from beit3_fast.ops.packed_weight import PackedWeight
from beit3_fast.padded_layout import shapes_are_fixed

# The vocabulary of the released models, and <mask> in it.
_RELEASED_VOCABULARY, _RELEASED_MASK = 64010, 64001


class BEiT3ForCaptioning(BEiT3Task):
    """Masked prediction of caption tokens; the text sees the image and earlier text."""

    _outputs_hold_text = True

    def __init__(self, config: BEiT3Config, impl: str = "auto") -> None:
        super().__init__(config, impl)
        self.mlm_head = nn.Linear(config.embed_dim, config.vocab_size)
        self._init_head()

    def forward(
        self,
        image: Tensor | None,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        language_masked_pos: Tensor | None,
        text_len: int | None = None,
        incremental_state: dict[int, dict[str, Tensor]] | None = None,
        **further: Any,
    ) -> tuple[Tensor, dict[int, dict[str, Tensor]] | None]:
        """Predict tokens; returns (logits, incremental_state).

        image [B, 3, H, W], text_ids int64 [B, Nt], padding_mask [B, Nt], nonzero for padding. With
        ``language_masked_pos`` [B, Nt], nonzero for words and not for padding, logits are [masked, V], else [B, Nt, V]. Decoding: the first call has the
        image and an empty ``incremental_state``; later calls have ``image=None``, the last word and a mask token
        as ``text_ids`` [B, 2], and ``text_len``, the length of the text so far including both.
        """
        check_given(text_ids=text_ids)
        take_further(self, further)
        if incremental_state is not None or image is None:
            return self._decode(
                image, text_ids, padding_mask, language_masked_pos, text_len, incremental_state
            )
        fixed = shapes_are_fixed()
        encoded = self.beit3.encode(
            image,
            text_ids,
            padding_mask,
            mask="seq2seq",
            read_vision="none",
            read_text="all" if language_masked_pos is None or fixed else language_masked_pos,
        )
        if fixed:
            rows = encoded.rows.view(*text_ids.shape, encoded.rows.shape[1])
            if language_masked_pos is not None:
                rows = rows[language_masked_pos.bool()]
            elif padding_mask is not None:
                rows = torch.where(padding_mask.bool()[..., None], 0.0, rows)
            return self._logits(rows), None
        if language_masked_pos is not None:
            return self._logits(self._caller_order(encoded)), None
        features = encoded.rows
        kept = torch.ones_like(text_ids, dtype=torch.bool)
        if padding_mask is not None:
            kept = ~padding_mask.bool()
        order = torch.tensor(encoded.layout.order, device=text_ids.device)
        places = torch.arange(text_ids.numel(), device=text_ids.device).view_as(text_ids)
        padded = features.new_zeros(text_ids.numel(), features.shape[1])
        padded = padded.index_copy(0, places[order][kept[order]], features)
        return self._logits(padded.view(*text_ids.shape, -1)), None

    @torch.inference_mode()
    def caption(
        self,
        images: Any,
        num_beams: int = 3,
        max_length: int = 32,
        length_penalty: float = 0.6,
        num_return_sequences: int = 1,
        *,
        processor: Processor | None = None,
        sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        compat: bool = False,
        mask_id: int | None = None,
        batch_size: int = 16,
    ) -> list[list[Caption]]:
        """Caption images; for every image its ``num_return_sequences`` captions, best first.

        ``images`` is one or a list: normalised floating-point tensors [3, H, W] (a batch [B, 3, H, W] too), or with
        a ``processor`` whatever it takes (paths, Pillow images, arrays); sizes may differ. A processor with a
        tokenizer also gives the captions' ``text`` and the mask token's id, which is 64001 for the released
        vocabulary and must else be passed as ``mask_id``.

        ``num_beams`` > 1 is the released beam search, 1 takes the likeliest word each time, and ``sample`` with
        num_beams=1 draws words (``temperature``, the likeliest ``top_k``, those that make up ``top_p`` of the
        probability, ``seed``). ``max_length`` counts all tokens, beginning and end included, ``length_penalty`` is
        the power of the length that a caption's sum of log probabilities is divided by, from -10 to 10: within these
        bounds no score of up to 1,024 tokens leaves the numbers of fp32, so that all keep their order. ``compat`` keeps
        the released code's habits, see ``beit3_fast.generate.beam``. ``batch_size`` images are decoded at a time.

        Raises ConfigError for options that make no sense, InputError and ShapeError for images that cannot be used, and
        InputError where scores are not finite.
        """
        options = Options(
            num_beams,
            max_length,
            length_penalty,
            num_return_sequences,
            sample,
            temperature,
            top_k,
            top_p,
            seed,
            compat,
        )
        special = self._special(options, processor, mask_id)
        sources = listed(images)
        generator = self._generator(options)
        results: list[list[Caption]] = [[]] * len(sources)
        for places, batch in image_batches(self.beit3, sources, processor, batch_size):
            check_pixels(batch, places)
            decoder = self._decoder(batch, options, special)
            found = captions(decoder, options, special, generator)
            check_finite(torch.tensor([[c.score for c in own] for own in found]), "image", places)
            for place, own in zip(places, found, strict=True):
                results[place] = own
        if processor is None or processor.tokenizer is None:
            return results
        decode = processor.tokenizer.decode
        return [
            [replace(c, text=decode(_words(c.tokens, special))) for c in found] for found in results
        ]

    def stream_caption(
        self,
        image: Any,
        max_length: int = 32,
        *,
        processor: Processor | None = None,
        sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        mask_id: int | None = None,
    ) -> Iterator[CaptionStep]:
        """Caption one image, each word as soon as it is chosen; the texts of all steps together are the caption's. Tokens that
        make a letter between them come together.

        Arguments as for ``caption`` with num_beams=1; what they raise is raised at once, not at the first word. Raises
        InputError at a word whose probability is not finite.
        """
        options = Options(1, max_length, 0.0, 1, sample, temperature, top_k, top_p, seed)
        special = self._special(options, processor, mask_id)
        sources = listed(image)
        if len(sources) != 1:
            raise ConfigError(f"stream_caption takes one image, got {len(sources)}; use caption")
        (tensor,) = image_tensors(self.beit3, sources, processor)
        check_pixels(tensor[None], [0])
        with torch.inference_mode():
            decoder = self._decoder(tensor[None], options, special)
        return self._steps(decoder, options, special, processor)

    def _steps(
        self,
        decoder: CaptionDecoder,
        options: Options,
        special: Special,
        processor: Processor | None,
    ) -> Iterator[CaptionStep]:
        tokens: list[int] = []
        said = text = ""
        # Of letters of several tokens: a decoder puts U+FFFD for what is not whole yet.
        held: list[CaptionStep] = []
        steps = caption_steps(decoder, options, special, self._generator(options))
        while True:
            # The mode belongs to the thread: it must not leak into what the caller does between two words.
            with torch.inference_mode():
                step = next(steps, None)
            if step is None:
                break
            if processor is None or processor.tokenizer is None:
                yield step
                continue
            tokens.append(step.token)
            text = processor.tokenizer.decode(_words(tokens, special))
            held.append(step)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield from _saying(held, text[len(said) :])
                held, said = [], text
        yield from _saying(held, text[len(said) :])

    def _decoder(self, images: Tensor, options: Options, special: Special) -> CaptionDecoder:
        return CaptionDecoder(
            self, images, options.width, options.max_length - 2, special.bos, special.mask
        )

    def _special(
        self, options: Options, processor: Processor | None, mask_id: int | None
    ) -> Special:
        check_processor(processor)
        if mask_id is None and processor is not None and processor.tokenizer is not None:
            mask_id = processor.tokenizer.mask_id
        if mask_id is None and self.config.vocab_size == _RELEASED_VOCABULARY:
            mask_id = _RELEASED_MASK
        if not isinstance(mask_id, int):
            raise ConfigError(
                f"the id of the mask token is not known for a vocabulary of {self.config.vocab_size}, got "
                f"mask_id={mask_id!r}; pass a processor with a tokenizer, or mask_id"
            )
        special = Special(BOS, PAD, EOS, mask_id)
        # The first two rows of the text position table are never read.
        options.check_model(self.config.vocab_size, self.config.max_text_positions - 2, special)
        return special

    def _generator(self, options: Options) -> torch.Generator | None:
        if options.seed is None:
            return None
        return torch.Generator(self.mlm_head.weight.device).manual_seed(options.seed)

    def _logits(self, rows: Tensor) -> Tensor:
        """A packed weight is multiplied as it is; nn.Linear would unpack it at every call."""
        head = self.mlm_head
        if isinstance(head.weight, PackedWeight):
            return head_logits(head, rows, self.beit3.impl)
        return head(rows)

    def _caller_order(self, encoded: Any) -> Tensor:
        """Text rows sorted by the caller's samples, as indexing with the mask would give them."""
        if encoded.layout.in_order:
            return encoded.rows
        return encoded.rows[encoded.layout.sample_of_row.argsort(stable=True)]

    def _decode(
        self,
        image: Tensor | None,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        language_masked_pos: Tensor | None,
        text_len: int | None,
        state: dict[int, dict[str, Tensor]] | None,
    ) -> tuple[Tensor, dict[int, dict[str, Tensor]] | None]:
        if state is None:
            raise ConfigError("a caption step without an image needs incremental_state")
        for index in range(self.get_num_layers()):
            state.setdefault(index, {})
        new = text_ids.shape[1]
        length = new if text_len is None else text_len
        num_image = self.config.num_vision_tokens
        if image is not None:
            rows, columns = self.beit3.vision_embed.grid_size(image)
            num_image = rows * columns + 1
        elif "prev_key" in state[0]:
            num_image = state[0]["prev_key"].shape[2] + new - _integer(length)
        if _integer(length) < new or num_image < 1 or (image is not None and length != new):
            raise ShapeError(
                f"text_len must be the length of the text so far, including the {new} of text_ids "
                f"{list(text_ids.shape)} (with the image: no more than these), got {text_len!r}"
            )
        device = text_ids.device
        total = num_image + length
        blocked = torch.ones(total, total, dtype=torch.bool, device=device)
        blocked[:, :num_image] = False
        blocked[num_image:, num_image:] = ~torch.ones(
            length, length, dtype=torch.bool, device=device
        ).tril()
        positions = None
        if image is None:
            blocked = blocked[-new:]
            padding_mask = None
            # The offset of two rows in the position table equals the two tokens that a step feeds.
            positions = torch.arange(length, length + new, device=device)[None]
        outputs = self.beit3(
            text_ids,
            image,
            padding_mask,
            attn_mask=blocked,
            incremental_state=state,
            positions=positions,
        )
        features = outputs["encoder_out"]
        if image is not None:
            features = features[:, num_image:]
        if language_masked_pos is not None:
            features = features[language_masked_pos.bool()]
        return self._logits(features), state


def _saying(steps: list[CaptionStep], text: str) -> Iterator[CaptionStep]:
    """The steps, the last of which adds the text to what was said."""
    for index, step in enumerate(steps, 1):
        yield step._replace(text=text if index == len(steps) else "")


def _integer(text_len: object) -> int:
    if not isinstance(text_len, int) or isinstance(text_len, bool):
        raise ShapeError(f"text_len must be an int, got {text_len!r}")
    return text_len


def _words(tokens: Sequence[int], special: Special) -> list[int]:
    """Only what a tokenizer knows: the released search may choose unused rows of the vocabulary."""
    return [token for token in tokens if token < special.mask]
