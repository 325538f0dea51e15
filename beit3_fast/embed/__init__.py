"""Embeddings of whole datasets: decoding in workers, shards on disk, and a job that goes on where it stopped."""

from beit3_fast.embed.folder import load_embeddings
from beit3_fast.embed.job import ENGINES, OUTPUTS, embed_dataset
from beit3_fast.embed.shards import FORMATS
from beit3_fast.embed.sources import KINDS
from beit3_fast.embed.work import EmbedReport

__all__ = [
    "ENGINES",
    "FORMATS",
    "KINDS",
    "OUTPUTS",
    "EmbedReport",
    "embed_dataset",
    "load_embeddings",
]
