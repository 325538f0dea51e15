"""Embeddings of whole datasets: decoding in workers, shards on disk, and a job that goes on where it stopped."""

from beit3_fast.embed.job import EmbedReport, embed_dataset
from beit3_fast.embed.sources import KINDS

__all__ = ["KINDS", "EmbedReport", "embed_dataset"]
