"""Proximal operators and projections: each docstring is the problem that the function solves."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """``argmin_w  t |w| + ½ (w − v)²``, entry by entry (``t ≥ 0`` broadcast)."""
    return v - v.clamp(min=-t, max=t) if isinstance(t, float) else v - torch.minimum(torch.maximum(v, -t), t)


def shrink_to_ball(D: Tensor, radius: float) -> tuple[Tensor, float]:
    """``argmin_X ‖X − D‖_F  s.t. ‖X‖_F ≤ radius``, and the factor in [0, 1] that does it."""
    norm = float(D.norm())
    gain = 1.0 if norm <= radius else radius / norm
    return D * gain, gain
