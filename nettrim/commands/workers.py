"""Where programs are solved besides this process: processes of this machine, or those of a Dask cluster."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import torch

from nettrim.errors import NetTrimError


@contextlib.contextmanager
def workers(count: int | None, scheduler: str | None) -> Iterator[Executor | None]:
    """An executor of ``count`` processes, or of the cluster at the address ``scheduler``; None for neither.

    Raises
    ------
    NetTrimError
        There is no such scheduler, or distributed is not installed.
    """
    if scheduler is not None:
        with _cluster(scheduler) as executor:
            yield executor
    elif count is None:
        yield None
    else:
        executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(torch.get_num_threads(),))
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    try:
        import distributed
    except ImportError as error:
        raise NetTrimError("--scheduler needs distributed, which is not installed; run: pip install 'nettrim[dask]'") from error
    try:
        client = distributed.Client(address, timeout="5s")
    except (OSError, ValueError) as error:
        raise NetTrimError(f"no Dask scheduler answers at {address} ({error}); expected an address such as tcp://host:8786") from error
    with client:
        yield client.get_executor()


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and without a word; the command says what there is to say
    torch.set_num_threads(threads)
