"""What weights do to a layer's constraints, entry by entry and in sum; the letters are those of :mod:`nettrim.programs`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A one-sided constraint z <= v is met when ‖max(z − v, 0)‖_F is below this share of the budget (of ‖Y‖_F where there is none): first-order
# solvers approach a million inequalities from outside. The budget itself is never exceeded: that norm counts in it.
ONE_SIDED_TOLERANCE = 2e-5
ROUNDING = 1e-12


@dataclass(frozen=True)
class Measures:
    """What weights do to the constraints and to the layer's output, all in float64.

    Attributes
    ----------
    on_support : float
        ``Σ_Ω (z − y)²``.
    off_support : float
        ``Σ_{Ωᶜ} max(z − v, 0)²``; 0 for a layer without a ReLU.
    discrepancy : float
        ``‖relu(Z) − Y‖_F``, or ``‖Z − Y‖_F`` without a ReLU.
    """

    on_support: float
    off_support: float
    discrepancy: float

    @property
    def distance(self) -> float:
        """``‖D‖_F``: zero when every target is met and no one-sided constraint is exceeded."""
        return math.sqrt(self.on_support + self.off_support)


def residual(Z: Tensor, Y: Tensor, V: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """``D``: ``z − y`` on Ω and ``max(z − v, 0)`` off Ω (everywhere ``z − y`` without a ReLU).

    ``Z − D`` is the projection of ``Z`` onto ``{z = y on Ω, z ≤ v off Ω}``, and for ``V = 0`` half the square of ``D``'s norm has ``D`` as its
    gradient with respect to ``Z``. Shapes: all (P, M).
    """
    D = Z - Y
    if not relu:
        return D
    if V is not None:
        return torch.where(Y > 0, D, (Z - V).clamp(min=0))
    # off Ω, where y = 0, max(z, 0); on Ω nothing is below the bound: several times as fast as where, and the same to the bit
    return torch.maximum(D, torch.sign(Y).mul_(-torch.finfo(Y.dtype).max), out=D)
