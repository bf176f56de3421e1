"""Exceptions at every line of the stages of `nettrim.prune`, one a run: is the caller's model what it was, and is nothing left behind?

A trace function sees each line before it runs, and raises at a chosen one: an interrupt can strike between any two lines, a ``finally`` included. The
lines are those of the package but for the solvers and the programs, which never see the model.
"""

import dataclasses
import linecache
import multiprocessing
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import nettrim
from nettrim import sharing

PACKAGE = Path(nettrim.__file__).parent
UNSEEN = {"programs.py", "residual.py", "proximal.py", "rows.py", "patterns.py", "report.py", "options.py"}
ERRORS: tuple[Callable[[], BaseException], ...] = (KeyboardInterrupt, lambda: MemoryError("injected"), lambda: RuntimeError("injected"))
CALLS: dict[str, dict[str, Any]] = {
    "cascade, in place": {"epsilon": 0.2, "inplace": True},
    "exact zeros, in place": {"sparsity": 0.5, "inplace": True},
    "a checkpoint": {"epsilon": 0.2, "checkpoint_dir": True},
    "threads": {"epsilon": 0.2, "mode": "parallel", "executor": True, "inplace": True},
}
Place = tuple[str, int]


class Network(nn.Module):
    """A chain with a buffer that the forward pass changes, dropout, and flags that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.norm.eval()
        self.second.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.drop(torch.relu(self.norm(self.first(x)))))


@dataclasses.dataclass
class Faults:
    """How many exceptions were raised in how many places, and what was wrong afterwards."""

    places: int = 0
    injected: int = 0
    wrong: int = 0
    complaints: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class World:
    """All that a call may not change for good."""

    state: dict[str, bytes]
    flags: list[tuple[bool, int]]
    gradients: list[bool]
    switches: tuple[Any, ...]
    left: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> "World":
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks")
        return cls(
            {name: value.detach().contiguous().numpy().tobytes() for name, value in model.state_dict().items()},
            [(module.training, sum(len(getattr(module, kind)) for kind in hooks)) for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.backends.mha.get_fastpath_enabled(),
                torch.get_num_threads(),
                torch.get_rng_state().numpy().tobytes(),
                _get_current_dispatch_mode(),
                torch.is_autocast_enabled("cpu"),
                torch.is_autocast_cache_enabled(),
                torch.get_default_device(),
            ),
            {
                "threads": threading.active_count(),
                "processes": len(multiprocessing.active_children()),
                "files": len(os.listdir("/proc/self/fd")),
                "locks": _locks_held(),
            },
        )

    def differences(self, other: "World") -> list[str]:
        found = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != getattr(other, field.name)]
        return [f"{name}: {self.left} before, {other.left} after" if name == "left" else name for name in found]


def _locks_held() -> int:
    """How many of the locks that threads share are still held by this one."""
    held = 0

    def look() -> None:
        nonlocal held
        for lock in sharing._locks.values():
            if lock.acquire(blocking=False):
                lock.release()
            else:
                held += 1

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return held


def _prune(model: nn.Module, call: str, folder: Path) -> None:
    options = dict(CALLS[call])
    if "checkpoint_dir" in options:
        options["checkpoint_dir"] = folder
    data = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    if not options.pop("executor", False):
        nettrim.prune(model, [data[:40], data[40:]], **options)
        return
    with ThreadPoolExecutor(1) as pool:
        nettrim.prune(model, [data[:40], data[40:]], executor=pool, **options)


def _traced(work: Callable[[], None], at_line: Callable[[Place], None]) -> None:
    """Do the work; ``at_line`` is called in front of every line of the stages, in this thread.

    But for a ``with`` that is left: Python looks for signals behind calls and jumps, of which there is none between the body's end and ``__exit__``.
    """

    def local_to(path: str, previous: int) -> Any:
        def local(frame: Any, event: str, argument: Any) -> Any:
            nonlocal previous
            if event == "line":
                left = frame.f_lineno < previous and linecache.getline(path, frame.f_lineno).lstrip().startswith("with ")
                previous = frame.f_lineno
                if not left:
                    at_line((Path(path).name, frame.f_lineno))
            return local

        return local

    known: dict[str, bool] = {}

    def every(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in known:
            path = Path(name)
            known[name] = path.parent == PACKAGE and path.name not in UNSEEN
        return local_to(name, frame.f_lineno) if known[name] else None  # of a generator that goes on: where it was

    before = sys.gettrace()
    sys.settrace(every)
    try:
        work()
    finally:
        sys.settrace(before)


def places(call: str) -> list[Place]:
    """The lines that a call runs, one entry each time."""
    found: list[Place] = []
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        _traced(lambda: _prune(Network(), call, Path(folder)), found.append)
    return found


def inject(call: str, index: int, error: Callable[[], BaseException]) -> list[str]:
    """Raise in front of the ``index``-th line; what is wrong afterwards."""
    torch.manual_seed(0)
    model = Network()
    count = -1
    where: Place = ("", 0)

    def at_line(place: Place) -> None:
        nonlocal count, where
        count += 1
        if count == index:
            where = place
            raise error()

    before = World.of(model)
    with tempfile.TemporaryDirectory() as folder:
        wrong = ["the exception was swallowed"]
        try:
            _traced(lambda: _prune(model, call, Path(folder)), at_line)
        except (KeyboardInterrupt, Exception):
            wrong = []
    wrong += before.differences(World.of(model))
    return [f"{call}: {error().__class__.__name__} at {where[0]}:{where[1]}: {problem}" for problem in wrong]


def faults(per_line: int = 3, seed: int = 0, calls: tuple[str, ...] = tuple(CALLS), share: float = 1.0) -> Faults:
    """At every line (or a ``share`` of them) of each call: the first time that it runs, the last, and at random times between."""
    draw = random.Random(seed)
    total = Faults()
    for call in calls:
        runs: dict[Place, list[int]] = {}
        for index, place in enumerate(places(call)):
            runs.setdefault(place, []).append(index)
        for indices in runs.values():
            if draw.random() > share:
                continue
            total.places += 1
            chosen = {indices[0], indices[-1], *(draw.choice(indices) for _ in range(per_line - 2))}
            for index in sorted(chosen):
                total.injected += 1
                total.complaints += (found := inject(call, index, draw.choice(ERRORS)))
                total.wrong += bool(found)
    return total
