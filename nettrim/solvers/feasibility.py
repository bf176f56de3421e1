"""Bringing an almost feasible sparse point inside its budget without touching its zeros."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nettrim.programs import LayerProgram

_CG_STEPS = 8
_ROOT_STEPS = 30
_ROUNDS = 3


def restricted_least_squares(G: Tensor, B: Tensor, mask: Tensor, steps: int = _CG_STEPS) -> Tensor:
    """``argmin_X ½⟨X G, X⟩ − ⟨B, X⟩  s.t. X = 0 off the mask``, by ``steps`` projected conjugate-gradient steps from 0, row by row.

    ``G`` (N, N) Gram matrix; ``B``, ``mask``, result (M, N). Jacobi preconditioned.
    """
    return projected_gradients(lambda X: X @ G, G.diagonal(), B, mask, steps)


def projected_gradients(apply: Callable[[Tensor], Tensor], diagonal: Tensor, B: Tensor, mask: Tensor, steps: int = _CG_STEPS) -> Tensor:
    """The same where ``G`` is known by ``apply(X) = X G`` and its diagonal (N,)."""
    scale = diagonal.clamp(min=torch.finfo(B.dtype).tiny).reciprocal()
    X = torch.zeros_like(B)
    R = torch.where(mask, B, 0.0)
    H = scale * R
    direction, rho = H, (R * H).sum(1, keepdim=True)
    # on a singular G (duplicate columns) what is left after convergence is rounding, whose quotients would be steps of any size
    rounding = 10 * torch.finfo(B.dtype).eps
    converged = rounding**2 * rho
    for _ in range(steps):
        Q = torch.where(mask, apply(direction), 0.0)
        curvature = (direction * Q).sum(1, keepdim=True)
        usable = (rho > converged) & (curvature > rounding * (direction.square() / scale).sum(1, keepdim=True))
        alpha = torch.where(usable, rho / curvature, 0.0)
        X = X + alpha * direction
        R = R - alpha * Q
        H = scale * R
        rho_next = (R * H).sum(1, keepdim=True)
        direction = H + torch.where(rho > 0, rho_next / rho, 0.0) * direction
        rho = rho_next
    return X


def rounding_margin(program: LayerProgram, dtype: torch.dtype) -> float:
    """The share of the budget that rounding the answer to the program's dtype may cost."""
    return 1e-6 if torch.float32 in (dtype, program.dtype) else 1e-10


def restore_budget(program: LayerProgram, G: Tensor, W: Tensor, columns: Tensor | None = None) -> Tensor | None:
    """The nearest point to ``W`` (M, N), on its own support, that keeps the budget; None where a few rounds don't find one.

    At ``W`` the misfit is majorised by ``‖A W'ᵀ − (Z − D)‖_F²``, a least-squares problem in ``G = AᵀA``; the step towards its minimiser on the
    support of ``W`` lowers the misfit, and only as much of it is taken as the budget needs: an optimal point lies on the boundary.

    With ``columns`` (their indices), ``W`` and ``G`` are those of some columns, the other weights being 0.
    Computes in the dtype of ``W`` and ``G`` (N, N); three passes over the rows a round, and two matrices of the targets' shape.
    """
    assert program.epsilon is not None
    margin = rounding_margin(program, W.dtype)
    budget = program.epsilon * (1 - margin)
    if budget**2 == 0:
        return None
    mask = W != 0
    Z = torch.empty((program.rows, program.shape[0]), dtype=W.dtype, device=W.device)
    dZ = torch.empty_like(Z)

    def excess(t: float) -> float:
        """Squared distance at ``Z − t dZ`` over the squared budget, less 1: negative inside."""
        total = 0.0
        for rows, Y, V in program.target_chunks(W.dtype):
            total += float(program.residual(torch.sub(Z[rows], dZ[rows], alpha=t), Y, V).square().sum())
        return total / budget**2 - 1

    for _ in range(_ROUNDS):
        total, B = 0.0, torch.zeros_like(W)
        for rows, A, Y, V in program.row_chunks(W.dtype, columns):
            Z[rows] = A @ W.T
            D = program.residual(Z[rows], Y, V)
            total += float(D.square().sum())
            B.addmm_(D.T, A)
        at_zero = total / budget**2 - 1
        if at_zero <= 0:
            return W
        if not math.isfinite(at_zero):
            return None
        step = restricted_least_squares(G, B, mask)
        for rows, A, _, _ in program.row_chunks(W.dtype, columns):
            dZ[rows] = A @ step.T
        at_one = excess(1.0)
        if at_one <= 0:
            return W - smallest_step(excess, at_zero, at_one, margin) * step
        W = W - step
    return None


def smallest_step(excess: Callable[[float], float], at_zero: float, at_one: float, margin: float) -> float:
    """A root in (0, 1] of a convex function that falls from above 0 to below it, from the feasible side (Illinois false position)."""
    low, weight_low, high, f_high = 0.0, at_zero, 1.0, at_one
    for _ in range(_ROOT_STEPS):
        middle = (low * f_high - high * weight_low) / (f_high - weight_low)
        value = excess(middle)
        if value <= 0:
            high, f_high, weight_low = middle, value, weight_low / 2
            if value > -margin:
                break
        else:
            low, weight_low = middle, value
    return high
