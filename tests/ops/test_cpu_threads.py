"""The compiled CPU ops called from several Python threads at once, each with sizes and numbers of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from cpu_cases import DTYPES, OPS, Attention, Linear
from torch import Tensor


def wrong_calls(calls: list[Callable[[], Tensor]], repeats: int) -> list[int]:
    """The numbers of the calls that gave something else while all ran, each on a thread, than alone."""
    wanted = [call() for call in calls]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(repeats):
            if not torch.equal(calls[number](), wanted[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


def test_weights_packed_for_the_call() -> None:
    linears = [Linear(d, (20 + 9 * n, 40 + n, 70 - n)) for n in range(4) for d in DTYPES.values()]
    assert not wrong_calls([lambda own=own: own.run(packed=[]) for own in linears], 10)


def test_biases_and_norms() -> None:
    """Long enough that another thread begins a call while one reads its parameters."""
    shapes = [(500, 200, 500), (400, 260, 430), (440, 230, 480)]
    linears = [Linear(torch.float32, shape, seed=n) for n, shape in enumerate(shapes)]
    assert not wrong_calls([own.run for own in linears], 100)


def test_attention() -> None:
    lengths = [([197], [30]), ([60, 90], [0, 20]), ([], [150])]
    cases = [Attention(torch.float32, v or [0], t, 2, 64, seed=len(v)) for v, t in lengths]
    assert not wrong_calls([lambda own=own: own.run("causal") for own in cases], 100)


def test_patches() -> None:
    def call(size: int, width: int) -> Callable[[], Tensor]:
        draw = torch.Generator().manual_seed(size)
        images, bias, token = (
            torch.randn(shape, generator=draw) for shape in ((1, 3, size, size), width, width)
        )
        packed = OPS.pack_weight(torch.randn(width, 3 * 16**2, generator=draw))
        tokens = (bias, token, token, None, None)
        return lambda: OPS.patch_embedding(images, packed, *tokens, 16)[0]

    assert not wrong_calls([call(192, 150), call(160, 200), call(176, 170)], 100)
