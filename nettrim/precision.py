"""What precision things are computed in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_WIDE_WORK = 1e6  # N²M below which nothing is gained by products in float32
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")  # devices


def working_dtype(M: int, N: int) -> torch.dtype:
    """What weights (M, N) of float32 are searched for in."""
    return torch.float64 if N * N * M < _WIDE_WORK else torch.float32


def rough_dtype(like: Tensor) -> torch.dtype | None:
    """What products of float32 matrices are taken in where few digits of them are enough: bfloat16, if the processor has instructions for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    rough = like.dtype == torch.float32 and like.device.type == "cpu" and supported is not None and supported()
    return torch.bfloat16 if rough else None


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the tensors' own dtypes, whatever autocast the caller runs under; a model's own, inside its forward, is its own affair.

    Nothing is cached either: under autocast torch keeps what it made of a weight as long as the caller's lasts, and would go on with what the weight
    was before it was pruned.
    """
    cached = torch.is_autocast_cache_enabled()
    with contextlib.ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
