"""The store of derived tensors: nothing stale, nothing kept alive, nothing made twice."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import beit3_fast
from beit3_fast import derived as module
from beit3_fast.derived import derived, forget


def double(weight: Tensor) -> Tensor:
    return derived("double", (weight,), lambda: weight.detach() * 2)


def assert_fresh(weight: Tensor) -> None:
    torch.testing.assert_close(double(weight), weight.detach() * 2, rtol=0, atol=0)


def step(linear: nn.Linear) -> None:
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.SGD(linear.parameters(), lr=0.5).step()


def turn_data(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.t()


def adam_step(linear: nn.Linear) -> None:
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.AdamW(linear.parameters(), lr=0.5, foreach=True).step()


def fused_step(linear: nn.Linear) -> None:
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.AdamW(linear.parameters(), lr=0.5, fused=True).step()


def change_in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.copy_(torch.randn_like(linear.weight))


def change_a_view(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight[0, 0] = 17.0


def change_a_detached_alias(linear: nn.Linear) -> None:
    linear.weight.detach().mul_(3.0)


def load(linear: nn.Linear) -> None:
    linear.load_state_dict({k: torch.randn_like(v) for k, v in linear.state_dict().items()})


def assign(linear: nn.Linear) -> None:
    state = {k: torch.randn_like(v) for k, v in linear.state_dict().items()}
    linear.load_state_dict(state, assign=True)


def replace_parameter(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))


def replace_data(linear: nn.Linear) -> None:
    linear.weight.data = torch.randn_like(linear.weight)


def to_bf16(linear: nn.Linear) -> None:
    linear.to(torch.bfloat16)


def to_bf16_and_back(linear: nn.Linear) -> None:
    linear.to(torch.bfloat16).to(torch.float32)


def init(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight)


def vector(linear: nn.Linear) -> None:
    nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in linear.parameters())), linear.parameters()
    )


CHANGES: list[Callable[[nn.Linear], None]] = [
    step,
    turn_data,
    adam_step,
    fused_step,
    change_in_place,
    change_a_view,
    change_a_detached_alias,
    load,
    assign,
    replace_parameter,
    replace_data,
    to_bf16,
    to_bf16_and_back,
    init,
    vector,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("size", [8, 300, 512])
def test_every_change_of_a_weight_is_seen(change: Callable[[nn.Linear], None], size: int) -> None:
    # Sizes on both sides of the limit where memory is mapped anew: freed memory soon holds other weights.
    for _ in range(4):
        linear = nn.Linear(size, size)
        assert_fresh(linear.weight)
        change(linear)
        assert_fresh(linear.weight)
        change(linear)
        assert_fresh(linear.weight)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_of_a_later_source_is_seen(change: Callable[[nn.Linear], None]) -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    if change in (to_bf16,):
        first.to(torch.bfloat16)

    def stacked() -> Tensor:
        return torch.cat([first.weight, second.weight.to(first.weight.dtype)]).detach()

    for _ in range(3):
        ours = derived("stacked", (first.weight, second.weight), stacked)
        assert torch.equal(ours, stacked())
        change(second)


def test_a_new_source_at_an_old_address_is_seen() -> None:
    first = nn.Parameter(torch.randn(64, 64))
    for _ in range(50):
        second = nn.Parameter(torch.randn(64, 64))
        ours = derived("sum", (first, second), lambda s=second: (first + s).detach())
        assert torch.equal(ours, (first + second).detach())
        del second


def test_nothing_is_made_twice_and_toggles_do_not_count_as_changes() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    first = double(weight)
    weight.requires_grad_(False)
    assert double(weight) is first
    weight.requires_grad_(True)
    weight.grad = torch.ones(4, 4)
    assert double(weight) is first
    with torch.inference_mode():
        assert double(weight) is first
    assert derived("other", (weight,), lambda: torch.zeros(1)) is not first
    assert double(weight) is first


def test_kinds_and_sources_do_not_mix() -> None:
    a, b, c = (nn.Parameter(torch.randn(2, 2)) for _ in range(3))
    assert derived("k", (a, b), lambda: "ab") == "ab"
    assert derived("k", (a, c), lambda: "ac") == "ac"
    assert derived("k", (a, b), lambda: "ab again") == "ab again"
    assert derived("l", (a, b), lambda: "other kind") == "other kind"
    assert derived("k", (b, a), lambda: "ba") == "ba"


def test_copies_have_their_own() -> None:
    linear = nn.Linear(4, 4)
    before = double(linear.weight)
    other = copy.deepcopy(linear)
    change_in_place(other)
    assert_fresh(other.weight)
    assert double(linear.weight) is before


def test_made_without_a_graph_and_usable_in_training() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    with torch.inference_mode():
        kept = derived("product", (weight,), lambda: weight @ weight)
    assert not kept.requires_grad
    assert not kept.is_inference()
    (kept * weight).sum().backward()
    assert weight.grad is not None


def test_tensors_of_inference_mode_are_never_kept() -> None:
    with torch.inference_mode():
        weight = torch.randn(4, 4)
        assert_fresh(weight)
        weight.mul_(2.0)
        assert_fresh(weight)
    assert weight not in module._store


def test_data_is_the_documented_exception_and_refresh_mends_it() -> None:
    linear = nn.Linear(4, 4)
    assert_fresh(linear.weight)
    linear.weight.data.mul_(2.0)
    with pytest.raises(AssertionError):
        assert_fresh(linear.weight)
    beit3_fast.refresh(linear)
    assert_fresh(linear.weight)


def test_forget_reaches_buffers_and_leaves_others_alone() -> None:
    norm, other = nn.BatchNorm1d(3), nn.Linear(2, 2)
    kept = double(other.weight)
    assert norm.running_mean is not None
    double(norm.running_mean)
    norm.running_mean.data.add_(1.0)
    forget(norm)
    assert_fresh(norm.running_mean)
    assert double(other.weight) is kept


def test_nothing_outlives_its_weight() -> None:
    gc.collect()
    before = len(module._store)
    linears = [nn.Linear(16, 16) for _ in range(20)]
    results = [weakref.ref(double(linear.weight)) for linear in linears]
    weights = [weakref.ref(linear.weight) for linear in linears]
    assert len(module._store) == before + 20
    del linears
    gc.collect()
    assert not any(ref() is not None for ref in (*results, *weights))
    assert len(module._store) == before


def test_an_old_value_is_let_go() -> None:
    weight = nn.Parameter(torch.randn(16, 16))
    old = weakref.ref(double(weight))
    with torch.no_grad():
        weight.add_(1.0)
    double(weight)
    gc.collect()
    assert old() is None


def test_a_failed_make_leaves_nothing_behind() -> None:
    weight = nn.Parameter(torch.randn(4, 4))

    def fail() -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        derived("double", (weight,), fail)
    assert_fresh(weight)


def test_made_once_for_many_threads() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    made: list[int] = []
    results: list[Tensor] = []
    barrier = threading.Barrier(8)

    def make() -> Tensor:
        made.append(1)
        # a derived tensor may itself rest on a derived tensor
        return double(weight) @ double(weight)

    def work() -> None:
        barrier.wait()
        results.append(derived("threads", (weight,), make))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(results) == 8
    assert all(result is results[0] for result in results)
    assert len(made) == 1


def test_of_shared_memory_nothing_is_kept() -> None:
    weight = torch.ones(4).share_memory_()
    double(weight)
    # As another process writes: without the counter of this one.
    weight.numpy()[:] = 3
    assert_fresh(weight)


def test_weights_can_be_swapped_after_refresh() -> None:
    linear = nn.Linear(2, 2)
    double(linear.weight)
    forget(linear)
    torch.utils.swap_tensors(linear.weight, nn.Parameter(torch.zeros(2, 2)))
    assert_fresh(linear.weight)


def test_a_second_tensor_on_the_same_memory_is_another_source() -> None:
    first, second = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    derived("sum", (first, second), lambda: (first + second).detach())
    second.data.mul_(2.0)
    # It has a counter of its own, at nought as well.
    alias = second.data
    found = derived("sum", (first, alias), lambda: (first + alias).detach())
    assert torch.equal(found, (first + alias).detach())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_finds_the_lock_free() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with module._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if module._lock.acquire(timeout=5) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0
