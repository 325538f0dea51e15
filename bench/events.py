"""Times calls in turn on any device; on a GPU by CUDA events, with no wait between the calls of a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from beit3_fast.timing import Effort, Samples, interleave


def timed_rounds(
    calls: Mapping[str, Callable[[], object]], effort: Effort, device: torch.device
) -> Samples:
    """As ``beit3_fast.timing.interleave``: seconds of every call, one list per name, all of the same length.

    On a GPU a sample is the time between two events in the stream, and the CPU waits once a round, behind its last
    call: a GPU that is never idle shows what a kernel takes, and a step that the CPU cannot launch in time shows that.
    """
    if device.type != "cuda":
        return interleave(calls, effort)
    for _ in range(effort.warmup):
        for call in calls.values():
            call()
    torch.cuda.synchronize(device)
    samples: Samples = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(effort.most):
        if done >= effort.rounds and time.perf_counter() - start >= effort.seconds:
            break
        marks = _round(calls)
        marks[-1].synchronize()
        for name, before, after in zip(calls, marks, marks[1:], strict=False):
            samples[name].append(before.elapsed_time(after) / 1e3)
    return samples


def _round(calls: Mapping[str, Callable[[], object]]) -> list[torch.cuda.Event]:
    """Events before the first call and after each."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls.values(), marks[1:], strict=True):
        call()
        mark.record()
    return marks
