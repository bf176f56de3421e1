"""What a call is made under: the caller's autocast and default device are for the caller's own code, and for the model where it is run."""

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

    Nothing is cached by an autocast of the model's own either: as long as the caller's lasts, torch keeps what it made of a weight, and would go on
    with what the weight was before it was pruned.
    """
    cached, device = torch.is_autocast_cache_enabled(), torch.get_default_device()
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            stack.callback(_CALLERS.reset, _CALLERS.set(device))
            stack.enter_context(torch.device("cpu"))
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextmanager
def callers_device() -> Iterator[None]:
    """The caller's default device again, for code of his."""
    device = _CALLERS.get()
    if device is None:
        yield
        return
    with torch.device(device):
        yield
