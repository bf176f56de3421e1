"""What the threads of a process share, and so use in turns: a model's hooks and flags, torch's switches, the warnings' filters.

Two calls of `nettrim.prune` in two threads may be given the same model, or models with a module in common. Its hooks and training flags are the
module's own, and the switch of the fused attention kernels is the process's, so models are run in turns; programs are solved side by side.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_locks = {name: threading.RLock() for name in ("models", "threads", "warnings")}


def _renew() -> None:
    """In a forked child nobody holds a lock: a thread that did is not there."""
    _locks.update({name: threading.RLock() for name in _locks})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def turn() -> threading.RLock:
    """Use as ``with turn():`` around whatever reads or changes a model's hooks, flags or buffers."""
    return _locks["models"]


@contextmanager
def quiet(category: type[Warning]) -> Iterator[None]:
    """Ignore warnings of a category. Two threads that restore the filters out of order would leave those of the other."""
    with _locks["warnings"], warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


def thread_count() -> int:
    """How many threads torch uses in this thread. One that has not used torch yet takes the process's number, now."""
    with _locks["threads"]:
        return torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread here, and nowhere else.

    ``torch.set_num_threads`` sets the calling thread's number, and the number that threads which have not used torch yet will take. The second is
    put back at once, by a thread of its own: else a call that starts meanwhile would round its sums in another order.
    """
    with _locks["threads"]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(before,))
        other.start()
        other.join()
    try:
        yield
    finally:
        torch.set_num_threads(before)
