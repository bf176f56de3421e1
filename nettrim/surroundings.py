"""What a call is made under: the caller's autocast is left out, and the default device is for the model alone, where it is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")  # devices
_CALLERS: ContextVar[torch.device | None] = ContextVar("callers", default=None)


@contextmanager
def left_out() -> Iterator[None]:
    """Compute in the tensors' own dtypes and where they are, whatever autocast and default device the caller has set.

    As long as the caller's autocast lasts, torch keeps what it made of a weight, and would go on with what the weight was before it was pruned: none
    of that is used here or left behind.
    """
    device = torch.get_default_device()
    with ExitStack() as stack:  # which puts all back, wherever an exception strikes
        stack.callback(torch.clear_autocast_cache)
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            stack.callback(_CALLERS.reset, _CALLERS.set(device))
            stack.enter_context(torch.device("cpu"))
        torch.set_autocast_cache_enabled(False)
        yield


@contextmanager
def callers_device() -> Iterator[None]:
    """For code of the caller's: his default device again, and nothing kept of a weight, as an autocast that the model made before may keep it."""
    torch.clear_autocast_cache()
    device = _CALLERS.get()
    if device is None:
        yield
        return
    with torch.device(device):
        yield
