"""Which weights to keep: the support search behind programs with a number of nonzeros, in Gram space.

    min ½⟨W G, W⟩ − ⟨C, W⟩   s.t.  the support of W is one that the pattern allows (``G = AᵀA``, ``C = YᵀA``: the misfit of ``A Wᵀ ≈ Y``)

Two steps:

1. :func:`search`: alternating directions with the split ``S = W`` (weight ρ, scaled multipliers ``E``), where ``S`` is the nearest matrix with an
   allowed support and ρ grows until the support stands still (the scheme of ALPS, Meng et al., NeurIPS 2024, Algorithm 1, here in columns of equal
   norm, and slower: what the support loses by haste no refit brings back). ``(G + ρI)⁻¹`` comes from one eigendecomposition for every ρ.
2. :func:`refit`: the least squares on that support, exactly, neuron by neuron, and what removing a weight from it would cost.

Everything here is in columns of unit norm (``G_jj = 1``); weights that the pattern does not count are kept always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.patterns import Supports
from nettrim.solvers.feasibility import restricted_least_squares

_FIRST_WEIGHT = 0.02  # ρ over the diagonal of G
_ITERATIONS = 300
_GROWTH = ((0.05, 1.05), (0.005, 1.03), (0.0, 1.02))  # of ρ an iteration, where more than so much of the support still changes
_STILL = 5  # iterations without a change after which the support stands
_BATCH_ELEMENTS = 20_000_000
_CG_STEPS = 100
_CHOLESKY_WORK = 2e11  # flops of exact refits from which conjugate gradients do
_SINGULAR = 1e-10  # of the unit diagonal, added to a support's Gram matrix; more where its factorisation fails


@dataclass(frozen=True)
class Fit:
    """A support (M, N), its least squares (M, N) float64, and their misfit ``½⟨W G, W⟩ − ⟨C, W⟩``.

    ``cost`` (M, N): by how much it rises when one weight of the support is removed, ``w_i² / 2[G_SS⁻¹]_ii`` (from the optimality of the refit).
    """

    mask: Tensor
    W: Tensor
    cost: Tensor
    value: float


def search(G: Tensor, C: Tensor, supports: Supports, start: Tensor, dtype: torch.dtype) -> Tensor:
    """Step 1 from the weights ``start`` (M, N): the support (M, N) on which the alternating directions settle."""
    eigenvalues, Q = torch.linalg.eigh(G)
    Q, eigenvalues = Q.to(dtype), eigenvalues.clamp(min=0).to(dtype)
    CQ = C.to(dtype) @ Q
    S = start.to(dtype)
    mask = supports.nearest(S.square())
    S = S * mask
    E = torch.zeros_like(S)
    rho, still = _FIRST_WEIGHT, 0
    for _ in range(_ITERATIONS):
        before = mask
        T = ((CQ + rho * ((S - E) @ Q)) / (eigenvalues + rho)) @ Q.T + E
        mask = supports.nearest(T.square())
        S = T * mask
        E = T - S
        changed = float((mask != before).sum()) / max(2 * supports.kept, 1)
        still = still + 1 if changed == 0 else 0
        if still >= _STILL:
            break
        growth = next(factor for share, factor in _GROWTH if changed >= share)
        rho *= growth
        E /= growth
    return mask


def refit(G: Tensor, C: Tensor, mask: Tensor) -> Fit:
    """Step 2: ``argmin ½⟨W G, W⟩ − ⟨C, W⟩`` on a support.

    By Cholesky factors of every neuron's own Gram matrix; where those would cost too much, by conjugate gradients on all neurons at once.
    """
    counts = mask.sum(1)
    if float((counts.double() ** 3).sum()) > _CHOLESKY_WORK:
        W = restricted_least_squares(G, C, mask, _CG_STEPS)
        cost = 0.5 * W.square()  # [G_SS⁻¹]_ii ≥ 1 / G_ii = 1: the most that removal can cost
    else:
        W, cost = torch.zeros_like(C), torch.zeros_like(C)
        for rows in counts.argsort().split(max(1, _BATCH_ELEMENTS // max(int(counts.max()), 1) ** 2)):
            W[rows], cost[rows] = _batch(G, C[rows], mask[rows])
    return Fit(mask, W, cost, float((W * (0.5 * (W @ G) - C)).sum()))


def _batch(G: Tensor, C: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares and removal costs of a few neurons, their supports padded to the largest."""
    width = max(int(mask.sum(1).max()), 1)
    index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    valid = mask.gather(1, index)
    grams = G[index.unsqueeze(2), index.unsqueeze(1)]
    grams *= valid.unsqueeze(2) & valid.unsqueeze(1)
    diagonal = grams.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(valid, diagonal, 1.0))
    shift = _SINGULAR
    while True:
        diagonal += shift
        factor, failed = torch.linalg.cholesky_ex(grams)
        if not bool(failed.any()):
            break
        shift *= 10
    right = torch.where(valid, C.gather(1, index), 0.0)
    solution = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    inverse = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
    W, cost = torch.zeros_like(C), torch.zeros_like(C)
    W.scatter_(1, index, torch.where(valid, solution, 0.0))
    cost.scatter_(1, index, torch.where(valid, 0.5 * solution.square() / inverse, 0.0))
    return W, cost
