"""Data that many tasks need, brought to the workers of an executor once.

Processes of one machine share the memory of torch's tensors, and threads share all of it, so there a value is sent as it is. Dask's workers are
reached over the network: there the value is the result of a task of its own, which later tasks name. A worker that needs it gets it once, from
the worker that has it; if that one dies the scheduler makes it again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any


def hold(executor: Executor, value: Any) -> Any:
    """What stands for ``value`` in the arguments of ``executor.submit``, for as long as it is kept."""
    client = getattr(executor, "_client", None)
    if client is None or not type(executor).__module__.startswith("distributed."):
        return value
    with quiet():
        return client.submit(_itself, value, pure=False)  # an equal value has another name: hashing it would read it all


def _itself(value: Any) -> Any:
    return value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Dask's advice to scatter large arguments: scattered data are lost with the worker that holds them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sending large graph")
        yield
