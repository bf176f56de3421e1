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


def residual(
    Z: Tensor, Y: Tensor, V: Tensor | None = None, *, relu: bool = True, floor: Tensor | None = None, ceiling: Tensor | None = None
) -> Tensor:
    """``D``: ``z − y`` on Ω and ``max(z − v, 0)`` off Ω (everywhere ``z − y`` without a ReLU).

    ``Z − D`` is the projection of ``Z`` onto ``{z = y on Ω, z ≤ v off Ω}``, and for ``V = 0`` half the square of ``D``'s norm has ``D`` as its
    gradient with respect to ``Z``. Shapes: all (P, M); with a ``floor``, (M,), Ω is ``y > floor``, and the floor takes the place of 0;
    with a ``ceiling``, (M,), it is ``min(z − y, 0)`` where ``y`` has reached that.
    """
    D = Z - Y
    if not relu:
        return D
    above = Y if floor is None else Y - floor
    if V is not None:
        return torch.where(above > 0, D, (Z - V).clamp(min=0))
    # off Ω, where y = floor, max(z − y, 0); on Ω nothing is below the bound: several times as fast as where, and the same to the bit
    D = torch.maximum(D, torch.sign(above).mul_(-torch.finfo(Y.dtype).max), out=D)
    return D if ceiling is None else torch.where(Y < ceiling, D, D.clamp(max=0))
