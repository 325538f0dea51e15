"""CodesOfFiles: visual tokens that are known by the file of an image."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class CodesOfFiles(Protocol):
    """What ``MixedData`` asks instead of showing it pixels."""

    def of_file(self, image: str) -> Tensor:
        """The codes int64 [patches] of an image, given its path."""
