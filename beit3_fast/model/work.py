"""What a forward or a training step needs at least, counted, not measured.

The multiplications and additions that the answer needs, with no padded rows, and in the last layer only the rows that the
task's head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from beit3_fast.config import BEiT3Config
from beit3_fast.errors import ConfigError


@dataclass(frozen=True)
class Product:
    """[rows, width] times the transpose of [out, width], `times` times, each with weights of its own.

    ``residual``: rows of the result's size are added, and so read.
    """

    rows: int
    width: int
    out: int
    times: int = 1
    residual: bool = field(default=False, compare=False)

    @property
    def flops(self) -> float:
        """Floating-point operations of all of them."""
        return 2.0 * self.rows * self.width * self.out * self.times


@dataclass(frozen=True)
class Work:
    """What an answer needs at least.

    products: the products with weights.
    attention: floating-point operations of attention's two products, which have no weights.
    attention_values: numbers that attention reads (queries, keys, values) and writes.
    scores_again: floating-point operations of scores that a backward pass makes again, as nobody keeps them; as is the
        custom, ``flops`` leaves them out.
    """

    products: tuple[Product, ...] = ()
    attention: float = 0.0
    attention_values: float = 0.0
    scores_again: float = 0.0

    @property
    def flops(self) -> float:
        """Floating-point operations of all of it, but for scores that are made again."""
        return sum(product.flops for product in self.products) + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.attention_values + other.attention_values,
            self.scores_again + other.scores_again,
        )


def embedding_work(config: BEiT3Config, images: int) -> Work:
    """The patch projection of `images` images."""
    rows = images * (config.num_vision_tokens - 1)
    return Work((Product(rows, config.in_chans * config.patch_size**2, config.embed_dim),))


def attention_scores(vision: int, text: int, mask: str) -> int:
    """How many pairs of a query and a key a mask lets through in a sample of so many vision and text tokens.

    mask: as in ``shared_attention``. Raises ConfigError for another.
    """
    tokens = vision + text
    if mask == "bidirectional":
        return tokens * tokens
    if mask == "seq2seq":
        return vision * tokens + text * (text + 1) // 2
    if mask == "causal":
        return tokens * (tokens + 1) // 2
    raise ConfigError(f"mask must be bidirectional, seq2seq or causal, got {mask!r}")


def encoder_work(
    config: BEiT3Config,
    vision: int,
    texts: Sequence[int],
    *,
    read: Sequence[int] | None = None,
    seq2seq: bool = False,
) -> Work:
    """The encoder for samples of `vision` image tokens and a text each.

    Queries, keys and values are one product, and the rows of each expert another one. In the last layer
    the rows that the head reads are taken together, whichever expert they belong to.

    Args:
        vision: image tokens of every sample, 0 without an image.
        texts: real text tokens of each sample, 0 without a text.
        read: how many rows of each sample the head reads after the last layer; None means all.
        seq2seq: text sees the image and earlier text, the image sees only itself.
    """
    width, ffn, layers = config.embed_dim, config.ffn_dim, config.num_layers
    attention = values = 0.0
    for i, text in enumerate(texts):
        tokens = vision + text
        last_rows = tokens if read is None else read[i]
        scores = attention_scores(vision, text, "seq2seq" if seq2seq else "bidirectional")
        if read is None:
            last_scores: float = scores
        elif seq2seq:
            # A head that reads rows of a captioning model reads text rows: the mean of what they see.
            last_scores = last_rows * (vision + (text + 1) / 2 if text else 0)
        else:
            last_scores = last_rows * tokens
        attention += 4.0 * width * ((layers - 1) * scores + last_scores)
        values += 4.0 * width * (layers - 1) * tokens + 2.0 * width * (tokens + last_rows)

    experts = [rows for rows in (vision * len(texts), sum(texts)) if rows]
    paired = sum(vision + text for text in texts if vision and text)
    projected = [sum(experts)] if config.attention == "shared" and experts else experts
    # Rows of pairs have an expert of their own in the top layers; samples of one kind keep theirs.
    top = [sum(experts) - paired, paired] if config.vl_expert_layers else experts
    whole = layers if read is None else layers - 1
    products = []
    for rows in projected:
        products += [
            Product(rows, width, 3 * width, whole),
            Product(rows, width, width, whole, residual=True),
        ]
    above = max(config.vl_expert_layers - (layers - whole), 0)
    for own, times in ((experts, whole - above), (top, above)):
        for rows in own:
            if rows and times:
                products += [
                    Product(rows, width, ffn, times),
                    Product(rows, ffn, width, times, residual=True),
                ]
    if read is not None:
        products += [Product(rows, width, 2 * width) for rows in projected]
        last = sum(read)
        products += [Product(last, width, width, 2)]
        products += [Product(last, width, ffn), Product(last, ffn, width, residual=True)]
    return Work(tuple(products), attention, values)


def linear_work(rows: int, *widths: int) -> Work:
    """A chain of linear layers on `rows` rows: ``linear_work(8, 768, 3129)`` is one of 768 to 3129."""
    return Work(tuple(Product(rows, a, b) for a, b in pairwise(widths)))


def training_work(pixels: Work, forward: Work) -> Work:
    """Forward and backward, which is two products for each one of forward; pixels need no gradient.

    The gradient of a residual is that of the result: nothing is read for it.
    """
    products = tuple(replace(product, residual=False) for product in forward.products)
    backward = replace(forward, products=products)
    again = Work(scores_again=forward.attention / 2)
    return pixels + pixels + forward + backward + backward + again
