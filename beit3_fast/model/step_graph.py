"""A decoding step as a CUDA graph: its kernels replayed on the memory that they had when they were captured."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from beit3_fast.derived import keeping

logger = logging.getLogger("beit3_fast")


class StepGraph:
    """``run(words, parents)`` for arguments of these shapes, captured once, without being run for it.

    A call returns the same tensor every time, whose content the next call replaces. All that ``run`` reads or changes must
    stay where it is in memory, and must have been run before, so that kernels are compiled and chosen.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor], Tensor], words: Tensor, parents: Tensor
    ) -> None:
        self._words, self._parents = words.clone(), parents.clone()
        with keeping() as self._reads:
            self._replay = record(lambda: run(self._words, self._parents), words.device)

    def __call__(self, words: Tensor, parents: Tensor) -> Tensor:
        self._words.copy_(words)
        self._parents.copy_(parents)
        return self._replay()

    def fits(self, words: Tensor) -> bool:
        """Whether words of this shape were captured."""
        return self._words.shape == words.shape


def record(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What replays ``run`` and returns its output, always the same tensor. Raises RuntimeError where it cannot be.

    Unlike ``torch.cuda.graph`` it neither waits for the device nor gives cached memory back: one is captured for every
    batch of images.
    """
    with torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                output = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def try_to_capture(
    run: Callable[[Tensor, Tensor], Tensor], words: Tensor, parents: Tensor
) -> StepGraph | None:
    """The step as a graph, or None where it cannot be captured."""
    try:
        return StepGraph(run, words, parents)
    except RuntimeError as error:
        logger.info("decoding goes on without a CUDA graph: %s", error)
        return None
