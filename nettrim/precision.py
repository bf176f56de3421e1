"""What precision things are computed in, and whether numbers are within its range."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE_WORK = 1e6  # N²M below which nothing is gained by products in float32


def working_dtype(M: int, N: int) -> torch.dtype:
    """What weights (M, N) of float32 are searched for in."""
    return torch.float64 if N * N * M < _WIDE_WORK else torch.float32


def rough_dtype(like: Tensor) -> torch.dtype | None:
    """What products of float32 matrices are taken in where few digits of them are enough: bfloat16, if the processor has instructions for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    rough = like.dtype == torch.float32 and like.device.type == "cpu" and supported is not None and supported()
    return torch.bfloat16 if rough else None


def all_finite(values: Tensor) -> bool:
    """Whether every number is finite: by their sum, in one pass, where that is; it may overflow without NaN or infinity among them."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
