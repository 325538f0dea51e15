"""BEiT-3's text tokenizer: a SentencePiece model under the id map of fairseq's XLM-R.

============  ====================================================================
id            meaning
============  ====================================================================
0, 1, 2, 3    ``<s>`` (bos), ``<pad>``, ``</s>`` (eos), ``<unk>``
p + 1         piece p of the SentencePiece file, from p = 3: its own pieces 0, 1, 2
              are ``<unk>``, ``<s>``, ``</s>`` and have the ids 3, 0, 2 above
pieces + 1    ``<mask>``
============  ====================================================================

The official ``beit3.spm`` has 64,000 pieces: ``<mask>`` is 64001 and ``vocab_size`` 64002. The embedding table
of the released models has 64010 rows, of which the last eight are unused.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import os
import stat
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, Literal

import torch

from beit3_fast import unreadable
from beit3_fast.data.batch import Batch
from beit3_fast.errors import ConfigError, InputError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
MAX_MODEL_BYTES = 64 << 20
_OFFSET = 1
_FIRST_PIECE = 3

Padding = Literal["max_length"] | bool

logger = logging.getLogger("beit3_fast")


class Tokenizer:
    """Text to official token ids and back.

    ``sentencepiece_model`` is the path or the content of a ``.spm`` file whose pieces 0, 1 and 2 are ``<unk>``,
    ``<s>`` and ``</s>``. A tokenizer may be shared by threads and pickled into worker processes. Raises
    InputError for a file that is missing, damaged, larger than 64 MiB or laid out otherwise.
    """

    bos_id, pad_id, eos_id, unk_id = BOS, PAD, EOS, UNK

    def __init__(self, sentencepiece_model: str | PathLike[str] | bytes) -> None:
        if isinstance(sentencepiece_model, bytes):
            content, what = sentencepiece_model, "the given bytes"
        else:
            content, what = _read(sentencepiece_model), repr(os.fspath(sentencepiece_model))
        self._load(content, what)

    def _load(self, content: bytes, what: str) -> None:
        from sentencepiece import SentencePieceProcessor

        if not content:
            raise InputError(f"expected a SentencePiece model, but {what} is empty")
        try:
            model = SentencePieceProcessor(model_proto=content)
            pieces = model.get_piece_size()
            # By name, as fairseq has it: bos_id() knows <s> only as a control piece, not as a user's symbol.
            first = [model.id_to_piece(p) for p in range(min(pieces, _FIRST_PIECE))]
            unknown = model.unk_id()
        # The parser answers damage with errors of several kinds.
        except Exception as error:
            raise InputError(
                f"{what} is not a SentencePiece model, or it is damaged ({_one_line(error)}); download beit3.spm again"
            ) from error
        if unknown != 0 or first[1:] != ["<s>", "</s>"] or pieces <= _FIRST_PIECE:
            raise InputError(
                f"expected <unk>, <s>, </s> as pieces 0, 1, 2 and ordinary pieces after them, but {what} begins with "
                f"{first} of {pieces} pieces and has its unknown piece at {unknown}; train with SentencePiece's "
                "default special ids or use beit3.spm"
            )
        self._content = content
        self._model: Any = model
        self._pieces = int(pieces)

    @property
    def identity(self) -> str:
        """A digest of the SentencePiece model."""
        return hashlib.sha256(self.__getstate__()).hexdigest()

    def __getstate__(self) -> bytes:
        return self._content

    def __setstate__(self, content: bytes) -> None:
        self._load(content, "the pickled tokenizer")

    def __repr__(self) -> str:
        return f"Tokenizer({self._pieces} pieces, vocab_size={self.vocab_size})"

    @property
    def piece_count(self) -> int:
        """Pieces of the SentencePiece file, its three special ones included (64,000 officially)."""
        return self._pieces

    @property
    def mask_id(self) -> int:
        """Id of ``<mask>``: piece_count + 1."""
        return self._pieces + _OFFSET

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1; the embedding table must have at least that many rows."""
        return self._pieces + _OFFSET + 1

    def encode(self, text: str) -> list[int]:
        """The token ids of one text, without bos and eos.

        Names of special tokens in the text ("</s>", "<mask>") are ordinary characters, unless the file itself
        defines them as symbols. Control characters are dropped or become ``<unk>``, as the file's normaliser has
        it; "" has no tokens. Raises InputError for what is not a str and for lone surrogates, which are not text.
        """
        if not isinstance(text, str):
            raise InputError(f"text must be a str, got {type(text).__name__}; decode bytes first")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text has a lone surrogate, {text[error.start]!r}, at character {error.start}, which is no Unicode "
                "text; replace it with text.encode('utf-8', 'replace').decode()"
            ) from None
        return [
            p + _OFFSET if p >= _FIRST_PIECE else _ID_OF_SPECIAL[p]
            for p in self._model.encode(text)
        ]

    def __call__(
        self,
        texts: str | Sequence[str],
        max_length: int | None = 64,
        padding: Padding = True,
    ) -> Batch:
        """Texts as model input; one text is a batch of one.

        Returns a Batch with ``text_tokens``, ``text_padding_mask`` and ``attention_mask``, see ``segments``.
        The log says which texts ``max_length`` cuts. Raises InputError for texts that cannot be encoded, naming which, and
        for an empty list.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, (list, tuple)):
            raise InputError(f"text must be a str or a list of str, got {type(texts).__name__}")
        tokens = []
        for index, text in enumerate(texts):
            try:
                tokens.append(self.encode(text))
            except InputError as error:
                raise InputError(f"text {index}: {error}") from error
        cut = [index for index, own in enumerate(tokens) if is_cut(own, max_length)]
        if cut:
            logger.warning(
                "texts cut behind %d tokens: %d of %d, the first of them text %d, %.40r",
                *(max_length, len(cut), len(tokens), cut[0], texts[cut[0]]),
            )
        return segments(tokens, max_length, padding)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids: a list, or an integer tensor or array [N].

        bos, pad, eos, unk and mask are left out, as the official captioning evaluation does;
        ``skip_special=False`` writes their names, set off by spaces. Raises InputError for an id outside
        [0, vocab_size) and for what is not a sequence of integers.
        """
        runs: list[str] = []
        run: list[int] = []
        for i in self._checked(ids):
            if UNK < i < self.mask_id:
                run.append(i - _OFFSET)
            elif not skip_special:
                runs += [self._model.decode(run), _NAMES.get(i, "<mask>")]
                run = []
        runs.append(self._model.decode(run))
        return " ".join(filter(None, runs)).strip()

    def batch_decode(self, ids: Iterable[Iterable[int]], skip_special: bool = True) -> list[str]:
        """``decode`` for each row of ids: nested lists, or an integer tensor or array [B, N]."""
        if not hasattr(ids, "__iter__"):
            raise InputError(f"ids must be a sequence of sequences, got {type(ids).__name__}")
        return [self.decode(row, skip_special) for row in ids]

    def _checked(self, ids: Iterable[int]) -> list[int]:
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        checked = []
        try:
            for i in ids:
                # operator.index refuses floats, strings and nested lists, but takes a bool.
                if isinstance(i, bool):
                    raise TypeError
                checked.append(operator.index(i))
        except TypeError:
            raise InputError(
                f"ids must be one sequence of integers, got {_one_line(repr(ids))}; "
                "use batch_decode for several sequences"
            ) from None
        wrong = [i for i in checked if not 0 <= i < self.vocab_size]
        if wrong:
            raise InputError(
                f"ids must be integers in [0, {self.vocab_size}), got {wrong[0]}: they come from another tokenizer, "
                "or from unused rows of the embedding table"
            )
        return checked


def is_cut(tokens: Sequence[int], max_length: int | None) -> bool:
    """Whether ``segments`` takes less than all of these tokens."""
    return max_length is not None and len(tokens) > max_length - 2


def segments(
    tokens: Sequence[Sequence[int]], max_length: int | None = 64, padding: Padding = True
) -> Batch:
    """Token ids without specials, as in the official index files, to model input.

    A segment is [bos] + the first max_length - 2 tokens + [eos]; ``max_length=None`` cuts nothing. ``padding``
    True pads with pad (1) to the longest segment, "max_length" to max_length, False not at all. Returns a Batch:

    - ``text_tokens`` int64 [B, N];
    - ``text_padding_mask`` bool [B, N], True at padding (torchscale's meaning);
    - ``attention_mask`` int64 [B, N], 1 at tokens, 0 at padding (Hugging Face's meaning);

    with ``padding=False`` each is a list of B tensors [N_i]. Raises InputError for no segments at all and
    ConfigError for a max_length below 2 or an unknown padding.
    """
    check_lengths(max_length, padding)
    if not tokens:
        raise InputError("expected at least one text, got none")
    cut = None if max_length is None else max_length - 2
    rows = [[BOS, *row[:cut], EOS] for row in tokens]
    lengths = [len(row) for row in rows]
    if padding is False:
        return Batch(
            text_tokens=[torch.tensor(row, dtype=torch.int64) for row in rows],
            text_padding_mask=[torch.zeros(n, dtype=torch.bool) for n in lengths],
            attention_mask=[torch.ones(n, dtype=torch.int64) for n in lengths],
        )
    width = max_length if padding == "max_length" and max_length is not None else max(lengths)
    text_tokens = torch.tensor(
        [row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int64
    )
    is_padding = torch.arange(width) >= torch.tensor(lengths)[:, None]
    return Batch(
        text_tokens=text_tokens, text_padding_mask=is_padding, attention_mask=(~is_padding).long()
    )


def check_lengths(max_length: int | None, padding: Padding) -> None:
    """Raises ConfigError for what ``segments`` cannot work with."""
    if max_length is not None and (
        isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2
    ):
        raise ConfigError(
            f"max_length must be an integer of at least 2, or None, got {max_length!r}"
        )
    if not (isinstance(padding, bool) or padding == "max_length"):
        raise ConfigError(f"padding must be True, False or 'max_length', got {padding!r}")
    if padding == "max_length" and max_length is None:
        raise ConfigError("padding='max_length' needs a max_length, got None")


_ID_OF_SPECIAL = (UNK, BOS, EOS)
_NAMES = {BOS: "<s>", PAD: "<pad>", EOS: "</s>", UNK: "<unk>"}


def _read(path: str | PathLike[str]) -> bytes:
    try:
        what = os.fspath(path)
        status = os.stat(what)
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"expected the path or the bytes of a SentencePiece file such as beit3.spm, got {path!r} "
            f"({unreadable.why(error)})"
        ) from error
    # A pipe or a device would block or never end.
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"expected a SentencePiece file, but {what!r} is not a regular file")
    if status.st_size > MAX_MODEL_BYTES:
        raise InputError(
            f"expected a SentencePiece file of at most {MAX_MODEL_BYTES} bytes, but {what!r} has {status.st_size}; "
            "is it a checkpoint?"
        )
    try:
        with open(what, "rb") as file:
            return file.read(MAX_MODEL_BYTES)
    except OSError as error:
        raise InputError(
            f"the SentencePiece file {what!r} cannot be read ({unreadable.why(error)})"
        ) from error


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
