"""Calls at once and calls in a row: the same results as alone, nothing left in the process, and a model that changes meanwhile is noticed."""

import gc
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from networks import chain, hooks_of, same_bits, samples, state_of

import nettrim
from benchmarks import soak_load
from nettrim import NetTrimError, layers, prune, sharing

INPUTS = samples(60, 8)


def test_calls_in_threads_are_those_of_calls_alone() -> None:
    expected = [soak_load.call(index) for index in range(soak_load.AT_ONCE)]
    with soak_load._threads(soak_load.AT_ONCE) as pool:
        found = soak_load._together(pool, soak_load.call, [(index,) for index in range(soak_load.AT_ONCE)])
    assert found == expected


def test_threads_may_share_one_model() -> None:
    model = soak_load.network(0)
    before, flags = state_of(model), [module.training for module in model.modules()]
    expected = [soak_load.call(index, soak_load.network(0)) for index in range(soak_load.AT_ONCE)]
    with soak_load._threads(soak_load.AT_ONCE) as pool:
        found = soak_load._together(pool, soak_load.call, [(index, model) for index in range(soak_load.AT_ONCE)])
    assert found == expected
    assert same_bits(state_of(model), before) and [module.training for module in model.modules()] == flags
    assert torch.backends.mha.get_fastpath_enabled()


def test_workers_do_not_change_a_bit() -> None:
    load = soak_load.workers((1, 3))
    assert (load.runs, load.differences, load.complaints) == (2, 0, [])


@pytest.mark.parametrize("name", soak_load.ON_ONE_AND_TWO)
def test_the_number_of_threads_changes_no_more_than_is_promised(name: str) -> None:
    asked = soak_load.ON_ONE_AND_TWO[name]
    assert soak_load.thread_counts(asked).within(asked)


def test_one_thread_is_for_the_thread_that_asked() -> None:
    """Two threads here, and in threads that begin meanwhile; one inside."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seen: list[int] = []
        with sharing.one_thread():
            inside = torch.get_num_threads()
            other = threading.Thread(target=lambda: seen.append(sharing.thread_count()))
            other.start()
            other.join()
        assert (inside, seen, torch.get_num_threads()) == (1, [2], 2)
    finally:
        torch.set_num_threads(before)


def test_filters_of_warnings_are_left_alone() -> None:
    """Restored out of order, those of one thread would stay for all."""
    before = list(warnings.filters)
    read_only = np.ones((20, 4))
    read_only.setflags(write=False)

    def work(_: int) -> None:
        for _ in range(50):
            nettrim.LayerProgram(read_only, read_only, epsilon=0.5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert list(warnings.filters) == before


def test_a_model_that_is_written_into_meanwhile_is_noticed() -> None:
    model = chain(8, 10, 4)

    def train(event: nettrim.ProgressEvent) -> None:
        if event.index == 1:
            with torch.no_grad():
                model[2].weight.add_(1e-3)

    before = model[0].weight.detach().clone()
    with pytest.raises(NetTrimError, match="parameter '2.weight' changed while the model was pruned"):
        prune(model, INPUTS, epsilon=0.2, progress=train, inplace=True)
    assert torch.equal(model[0].weight, before)


def test_a_copy_is_made_without_the_hooks_of_a_thread_that_runs_the_model() -> None:
    model, inside, go = chain(8, 6, 4), threading.Event(), threading.Event()

    def run() -> None:
        with sharing.turn():
            handle = model[0].register_forward_hook(lambda *args: None)
            inside.set()
            go.wait(30)
            handle.remove()

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(30)
    threading.Timer(0.2, go.set).start()
    copied = layers.copy_of(model)
    thread.join()
    assert hooks_of(copied) == 0


def test_a_forked_child_may_prune_while_a_thread_of_its_parent_does() -> None:
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        with sharing.turn():
            inside.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    child = os.fork()
    if not child:
        held = sharing.turn().acquire(timeout=5)
        os._exit(0 if held else 1)
    status = os.waitpid(child, 0)[1]
    go.set()
    thread.join()
    assert status == 0


def test_many_calls_leak_nothing() -> None:
    """Open files and threads to the last one; memory in the soak, where there are enough calls for a slope."""
    soak_load.call(4)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    for _ in range(3):
        soak_load.call(4)
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) <= tensors
