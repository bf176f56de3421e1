"""Many calls of `nettrim.prune` at once, and many one after the other: the same results, and nothing that grows."""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nettrim
from benchmarks.memory import anonymous_bytes
from nettrim import fingerprints

AT_ONCE = 8
ASKED: tuple[dict[str, Any], ...] = (
    {"epsilon": 0.2, "penalty": "l1"},
    {"epsilon": 0.3, "mode": "parallel"},
    {"epsilon": 0.3, "consistency": "paper"},
    {"epsilon": 0.3, "solver": "cvxpy", "penalty": "l1", "targets": "head"},
    {"sparsity": 0.6},
    {"sparsity": 0.5, "allocation": "uniform", "max_rows": 100},
    {"epsilon": 0.3, "penalty": "l0"},
    {"pattern": "2:4"},
)
ON_ONE_AND_TWO: dict[str, dict[str, Any]] = {
    "exact zeros": {"sparsity": 0.7, "allocation": "uniform"},
    "a budget": {"epsilon": 0.3, "penalty": "l1", "tol": 0.05},
}
WEIGHTS_TOLERANCE = 1e-4  # with a budget, relative difference of a layer's weights; the masks are the same
OUTPUT_TOLERANCE = 0.05  # with a number of zeros, relative difference of the output's discrepancy; masks may differ: a search has near ties
WIDE = (256, 256, 64)  # P·N·M of its first layer is above what is solved on one thread


class Network(nn.Module):
    """Attention between linear layers, BatchNorm and dropout: training flags, buffers and fused kernels all count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.attention = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(torch.relu(self.stem(x))))
        return self.head(self.attention(h.unflatten(0, (-1, 4))).flatten(0, 1))


@dataclasses.dataclass
class Load:
    """How many calls were made, in how many of them the results were not those of a call on its own, and what was wrong."""

    runs: int = 0
    differences: int = 0
    complaints: list[str] = dataclasses.field(default_factory=list)


_DRAWING = threading.Lock()  # torch's generator is the process's: two threads that draw weights would mix them


def network(seed: int) -> nn.Module:
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network().train()


def wide(seed: int) -> nn.Module:
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDE[0], WIDE[1]), nn.ReLU(), nn.Linear(WIDE[1], WIDE[2]))


def call(index: int, model: nn.Module | None = None) -> dict[str, str]:
    """The ``index``-th call, on a model of its own unless one is given; a hash of each of the weights and of the certificate."""
    rows = torch.randn(160, 12, generator=torch.Generator().manual_seed(index))
    result = nettrim.prune(network(index) if model is None else model, [rows[:80], rows[80:]], **ASKED[index % len(ASKED)])
    return _hashes(result)


def wide_call(index: int) -> dict[str, str]:
    """A call whose layers are above and below the size that is solved on one thread."""
    rows = torch.randn(400, WIDE[0], generator=torch.Generator().manual_seed(index))
    return _hashes(nettrim.prune(wide(index), rows, sparsity=0.7, allocation="uniform"))


def _hashes(result: nettrim.PruneResult) -> dict[str, str]:
    found = {name: fingerprints.tensor_hash(value) for name, value in result.model.state_dict().items()}
    return {**found, "certificate": str(dataclasses.astuple(result.report.certificate))}


def _compare(what: str, expected: list[dict[str, str]], found: list[Any]) -> Load:
    load = Load(runs=len(expected))
    for index, (alone, together) in enumerate(zip(expected, found, strict=True)):
        if isinstance(together, BaseException):
            differing = f"{type(together).__name__}: {together}"
        else:
            differing = ", ".join(name for name in alone if alone[name] != together.get(name))
        if differing:
            load.differences += 1
            load.complaints.append(f"{what}, call {index}: {differing}")
    return load


def _together(pool: Executor, function: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    futures = [pool.submit(function, *given) for given in arguments]
    return [future.exception() or future.result() for future in futures]


@contextlib.contextmanager
def _threads(count: int, each: int | None = None) -> Iterator[Executor]:
    """Threads that all begin at once."""
    gate = threading.Barrier(count)

    def begin() -> None:
        if each is not None:
            torch.set_num_threads(each)
        gate.wait(60)

    with ThreadPoolExecutor(count, initializer=begin) as pool:
        yield pool


def at_once(rounds: int) -> list[Load]:
    """Eight calls in threads, in processes, and in threads on one model; and calls of wide layers on all the cores there are."""
    indices = [(index,) for index in range(AT_ONCE)]
    alone = [call(index) for (index,) in indices]
    shared = network(0)
    before = {name: fingerprints.tensor_hash(value) for name, value in shared.state_dict().items()}
    shared_alone = [call(index, network(0)) for (index,) in indices]
    wide_alone = [wide_call(index) for index in range(4)]
    loads: list[Load] = []
    for _ in range(rounds):
        with _threads(AT_ONCE) as pool:
            loads.append(_compare("threads", alone, _together(pool, call, indices)))
        with _threads(AT_ONCE) as pool:
            loads.append(_compare("threads on one model", shared_alone, _together(pool, call, [(index, shared) for (index,) in indices])))
        with _threads(4) as pool:
            loads.append(_compare("threads with wide layers", wide_alone, _together(pool, wide_call, indices[:4])))
        if {name: fingerprints.tensor_hash(value) for name, value in shared.state_dict().items()} != before or not shared.training:
            loads.append(Load(1, 1, ["the model that threads shared is another one afterwards"]))
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(
        AT_ONCE, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        loads += [_compare("processes", alone, _together(pool, call, indices)) for _ in range(rounds)]
    return loads


def workers(counts: tuple[int, ...] = (1, 2, 3, 8)) -> Load:
    """Parallel mode with different numbers of worker threads: bit for bit what it is without any."""
    rows = torch.randn(160, 12, generator=torch.Generator().manual_seed(0))
    expected = _hashes(nettrim.prune(network(0), rows, epsilon=0.2, mode="parallel"))
    found = []
    for count in counts:
        with ThreadPoolExecutor(count) as pool:
            found.append(_hashes(nettrim.prune(network(0), rows, epsilon=0.2, mode="parallel", executor=pool)))
    return _compare("workers", [expected] * len(counts), found)


@dataclasses.dataclass
class Threads:
    """One thread against two.

    The largest relative difference of a layer's weights, how many entries of the masks differ, and by how much the output's measured discrepancy.
    """

    weights: float
    masks: int
    entries: int
    output: float

    def within(self, asked: dict[str, Any]) -> bool:
        """Whether that is what docs/trust.md promises."""
        return self.output <= OUTPUT_TOLERANCE if "sparsity" in asked else self.weights <= WEIGHTS_TOLERANCE and self.masks == 0


def thread_counts(asked: dict[str, Any]) -> Threads:
    """The same call on one thread and on two, for wide layers."""
    rows = torch.randn(800, WIDE[0], generator=torch.Generator().manual_seed(0))
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(nettrim.prune(wide(0), rows, **asked))
    finally:
        torch.set_num_threads(before)
    one, two = (result.model.state_dict() for result in results)
    masks = [(results[0].masks[name] != results[1].masks[name]) for name in results[0].masks]
    largest = max(float((one[name] - two[name]).norm() / one[name].norm()) for name in one)
    measured = [result.report.certificate.measured for result in results]
    return Threads(
        largest, sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks), abs(measured[1] / measured[0] - 1)
    )


@dataclasses.dataclass
class Leak:
    """Per call, by a straight line through the measurements after the first third: bytes of the process's own memory, open files, and threads."""

    runs: int
    bytes_per_run: float
    files_per_run: float
    threads_per_run: float


def leak(runs: int) -> Leak:
    """So many calls of all kinds, one after the other, in this process."""
    seen = []
    for index in range(runs):
        call(index)
        gc.collect()
        seen.append((anonymous_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count()))
    measured = np.array(seen[runs // 3 :], dtype=float)
    slopes = [float(np.polyfit(np.arange(len(measured)), column, 1)[0]) for column in measured.T]
    return Leak(runs, *slopes)
