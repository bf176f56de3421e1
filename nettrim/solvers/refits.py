"""The weights on a support: least squares in Gram space, after the search (:mod:`nettrim.solvers.support`, whose letters these are).

    argmin ½⟨S W G, W⟩ − ⟨S C, W⟩  over the W (M, N) with the support

By Cholesky factors of every neuron's own Gram matrix, or by conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.metrics import Metric
from nettrim.precision import rough_dtype
from nettrim.solvers.support import ROUNDED, Quadratic

_BATCH_ELEMENTS = 20_000_000
_CG_STEPS = 120
_CG_ROUGH_STEPS = 40  # with products in half precision, from one exact residual
_CG_LAST = 4  # steps whose part in the value tells when to stop
_CHOLESKY_WORK = 1e8  # flops of exact refits from which conjugate gradients do
SINGULAR = 1e-10  # of the unit diagonal, added to a support's Gram matrix; more where its factorisation fails
_SETTLED = {torch.float32: 3e-4, torch.float64: 1e-12}  # of what the value is over the least: what the last steps took off it together


@dataclass(frozen=True)
class Fit:
    """A support (M, N) and its least squares (M, N) float64.

    ``cost`` (M, N), where it was asked for: by how much their value rises when one weight of the support is removed, ``w_i² / 2[G_SS⁻¹]_ii`` (from
    the optimality of the refit).
    """

    mask: Tensor
    W: Tensor
    cost: Tensor | None = None


def refit(problem: Quadratic, C: Tensor, mask: Tensor, start: Tensor | None = None, *, costs: bool = False, ridge: float = SINGULAR) -> Fit:
    """``argmin ½⟨S W G, W⟩ − ⟨S C, W⟩`` on a support.

    Without a metric by Cholesky factors of every neuron's own Gram matrix; where those would cost too much, and with a metric, which couples the
    neurons, by conjugate gradients from ``start`` (0 if not given: many more steps), until little is left to gain, or their limit. Least squares of
    all weights are damped by ``ridge``.
    """
    counts = mask.sum(1)
    if bool(mask.all()):  # W G = C for all neurons at once, whatever weighs their errors
        factor = _factor(problem.G.clone(), ridge)
        W = torch.cholesky_solve(C.T, factor).T
        exact = torch.cholesky_inverse(factor).diagonal() if costs and problem.S is None else 1.0
        return Fit(mask, W, 0.5 * W.square() / exact if costs else None)
    W, cost = torch.zeros_like(C), torch.zeros_like(C) if costs else None
    if problem.S is not None or float((counts.double() ** 3).sum()) > _CHOLESKY_WORK:
        W = _conjugate_gradients(problem, C, mask, W if start is None else start)
        cost = 0.5 * W.square() if costs else None  # [G_SS⁻¹]_ii ≥ 1 / G_ii = 1: the most that removal can cost
    else:
        for rows in counts.argsort().split(max(1, _BATCH_ELEMENTS // max(int(counts.max()), 1) ** 2)):
            W[rows], part = _batch(problem.G, C[rows], mask[rows], costs)
            if cost is not None and part is not None:
                cost[rows] = part
    return Fit(mask, W, cost)


def _conjugate_gradients(problem: Quadratic, C: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """Conjugate gradients on ``S W G`` over the weights of the mask, all neurons at once, in the dtype of the search.

    Products are in half precision where the processor has it; every few steps start again from the exact residual ``R = C − W G``. Steps that did not
    lower the value are taken back, and the last are in the dtype of the search, unless the limit of steps comes first.
    """
    exact = operator = _Normal.of(problem, mask, problem.dtype)
    if (half := rough_dtype(exact.G)) is not None:
        operator = _Normal.of(problem, mask, half)
    C, W = C.to(problem.dtype), torch.where(mask, start.to(problem.dtype), 0.0)
    R = C - W @ exact.G
    if float((problem.weigh(W) * (C + R)).sum()) < 0:  # -2 times its value: worse than no weights, from which no descent need come back
        W, R = torch.zeros_like(W), C
    excess, gradient = problem.excess(R), exact.masked(R)
    rounded = ROUNDED[problem.dtype] ** 2 * float(exact.masked(C).square().sum())
    left = _CG_STEPS
    while left > 0:
        limit = left if operator is exact else min(left, _CG_ROUGH_STEPS)
        step, taken, settled = _descend(operator, gradient, limit, excess, rounded)
        after = exact.masked(C - (W + step) @ exact.G)
        fall = 0.5 * float((step * (gradient + after)).sum())  # of a quadratic, by its gradients at both ends: no cancellation
        left -= taken
        if fall > 0:
            W, gradient, excess = W + step, after, excess - fall
        if settled or taken < limit or not fall > 0:
            if operator is exact:
                break
            operator = exact  # has the last word
    return W.double()


@dataclass(frozen=True)
class _Normal:
    """``X ↦ S X G`` over a support (M, N), products in the dtype of ``G`` and ``S``."""

    G: Tensor
    S: Metric | None
    mask: Tensor  # of the same dtype: a product with it takes a fifth of the time of a choice

    @classmethod
    def of(cls, problem: Quadratic, mask: Tensor, dtype: torch.dtype) -> _Normal:
        return cls(problem.G.to(dtype), None if problem.S is None else problem.S.to(dtype), mask.to(dtype))

    def masked(self, X: Tensor) -> Tensor:
        return (X if self.S is None else self.S.weigh(X)) * self.mask

    def __call__(self, X: Tensor) -> Tensor:
        return self.masked(X.to(self.G.dtype) @ self.G).to(X)


def _descend(operator: _Normal, gradient: Tensor, limit: int, excess: float, rounded: float) -> tuple[Tensor, int, bool]:
    """Steps of conjugate gradients down from ``gradient`` (M, N): their sum, how many, and whether they have settled.

    They end after ``limit``, or where rounding leaves no curvature; and have settled when the last few together have lowered the value by a small
    part of ``excess``, what it is over the least of all weights. (A step lowers it by ``½ ‖residual‖⁴ / curvature``, and the last ones' sum estimates
    how far the least on the support is: Strakoš and Tichý, ETNA 13, 2002. The norm of the residual would not do: at mild sparsities the whole misfit
    is small beside the output.)
    """
    step, residual, direction = torch.zeros_like(gradient), gradient.clone(), gradient.clone()
    square = float((residual * residual).sum())
    falls: list[float] = []
    for taken in range(limit):
        settled = taken >= _CG_LAST and sum(falls[-_CG_LAST:]) <= _SETTLED[gradient.dtype] * (excess - sum(falls))
        if settled or square <= rounded:
            return step, taken, True
        image = operator(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            return step, taken, False
        length = square / curvature
        step.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        falls.append(0.5 * length * square)
        last, square = square, float((residual * residual).sum())
        direction.mul_(square / last).add_(residual)
    return step, limit, False


def _batch(G: Tensor, C: Tensor, mask: Tensor, costs: bool) -> tuple[Tensor, Tensor | None]:
    """Least squares and removal costs of a few neurons, their supports padded to the largest."""
    width = max(int(mask.sum(1).max()), 1)
    index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    valid = mask.gather(1, index)
    grams = G[index.unsqueeze(2), index.unsqueeze(1)]
    grams *= valid.unsqueeze(2) & valid.unsqueeze(1)
    diagonal = grams.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(valid, diagonal, 1.0))
    factor = _factor(grams)
    right = torch.where(valid, C.gather(1, index), 0.0)
    solution = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    W = torch.zeros_like(C).scatter_(1, index, torch.where(valid, solution, 0.0))
    if not costs:
        return W, None
    inverse = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
    return W, torch.zeros_like(C).scatter_(1, index, torch.where(valid, 0.5 * solution.square() / inverse, 0.0))


def _factor(grams: Tensor, shift: float = SINGULAR) -> Tensor:
    """Cholesky factors of Gram matrices (.., n, n) of unit diagonal, which are overwritten; with what it takes on their diagonals to be definite."""
    while True:
        grams.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor, failed = torch.linalg.cholesky_ex(grams)
        if not bool(failed.any()):
            return factor
        shift *= 10
