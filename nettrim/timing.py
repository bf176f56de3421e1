"""Which of several calls is faster, on a machine that others use too: they take turns, and only ratios within a turn are trusted.

With one thread on a CPU, what is counted is that thread's processor time. On an idle machine it is the time on the clock; on a busy one it leaves out
the waiting for a processor, which would otherwise fall on one call or the other by chance.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

TURNS = 9
MOST_CALLS = 64  # in a part: where threads wait for a busy machine, a call may take a thousand times what it did a moment ago
SECONDS = 0.004  # of a call's part of one turn: long enough for the clock, short enough that a turn sees one state of the machine


@dataclass(frozen=True)
class Timing:
    """One call beside the first of those compared.

    Attributes
    ----------
    seconds : float
        Of one call: the median over the turns.
    speedup : float
        Median over the turns of the first call's time over this one's in the same turn: above 1, this one is faster.
    """

    seconds: float
    speedup: float


@torch.no_grad()
def compare(
    calls: Mapping[str, Callable[[], object]], *, cpu: bool, threads: int | None = None, turns: int = TURNS, seconds: float = SECONDS
) -> dict[str, Timing]:
    """Time calls in turns with :class:`torch.utils.benchmark.Timer`, which waits for a CUDA device, and sets and restores torch's threads.

    Parameters
    ----------
    calls : mapping of str to callable()
        The first is what the others are compared with.
    cpu : bool
        All that they do, they do on CPUs.
    threads : int, optional
        Of torch; as they are set if not given.
    turns : int
        In each, every call has its part.
    seconds : float
        Of a part, up to 64 calls; a call that takes longer is made once.
    """
    from torch.utils.benchmark import Timer  # it takes an eighth of a second to import, and only this needs it
    from torch.utils.benchmark.utils.timer import timer as clock

    count = torch.get_num_threads() if threads is None else threads
    chosen = time.thread_time if cpu and count == 1 else clock
    timers = {name: Timer("call()", timer=chosen, globals={"call": call}, num_threads=count) for name, call in calls.items()}
    numbers = {name: min(MOST_CALLS, max(1, int(seconds / max(timer.timeit(2).mean, 1e-9)))) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, timer in timers.items():
            times[name].append(timer.timeit(numbers[name]).mean)
    first = times[next(iter(calls))]
    return {
        name: Timing(statistics.median(found), statistics.median(a / b for a, b in zip(first, found, strict=True))) for name, found in times.items()
    }
