"""Which weights to keep: the support search behind programs with a number of nonzeros, in Gram space.

    min ½⟨W G, W⟩ − ⟨C, W⟩   s.t.  the support of W is one that the pattern allows (``G = AᵀA``, ``C = YᵀA``: the misfit of ``A Wᵀ ≈ Y``)

Three steps, each of which hands its support to the next:

1. :func:`search`: alternating directions with the split ``S = W`` (weight ρ, scaled multipliers ``E``), where ``S`` is the nearest matrix with an
   allowed support and ρ grows until the support stands still (the scheme of ALPS, Meng et al., NeurIPS 2024, Algorithm 1, here in columns of equal
   norm). ``(G + ρI)⁻¹`` comes from one eigendecomposition for every ρ.
2. :func:`refit`: the least squares on a support, exactly, neuron by neuron.
3. :func:`swap`: weights that cost least to remove, ``w_i² / 2[G_SS⁻¹]_ii``, make room for those that gain most, ``r_j² / 2h_j`` with ``R = C − W G``
   and the Schur complement ``h_j = G_jj − G_jS G_SS⁻¹ G_Sj`` (both from the optimality of the refit), as long as the misfit falls. (Splicing: Zhu
   et al., PNAS 2020, section 2, there with ``G_jj`` in the place of ``h_j``, which is no smaller; so here where the ``h_j`` would cost too much.)

Everything here is in columns of unit norm (``G_jj = 1``); weights that the pattern does not count are kept always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.patterns import Supports
from nettrim.solvers.feasibility import restricted_least_squares

_FIRST_WEIGHT = 0.05  # ρ over the diagonal of G
_INNER = 3
_OUTER = 60
_GROWTH = ((0.05, 1.25), (0.005, 1.15), (0.0, 1.07))  # of ρ, where more than so much of the support still changes
_STILL = 3  # outer steps without a change after which the support stands
_SWAP_ROUNDS = 30
_SWAPPED = 0.1  # share of the kept weights that a round may swap, to start with; halved when the misfit rises
_BATCH_ELEMENTS = 20_000_000
_CG_STEPS = 100
_CHOLESKY_WORK = 2e11  # flops of exact refits from which conjugate gradients do
_SCHUR_WORK = 5e10  # flops from which Schur complements are not computed
_SMALLEST_SCHUR = 1e-6  # columns closer than that to the span of the support gain nothing that can be told from rounding
_SINGULAR = 1e-10  # of the unit diagonal, added to a support's Gram matrix; more where its factorisation fails


@dataclass(frozen=True)
class Fit:
    """A support (M, N), its least squares (M, N) float64, and their misfit ``½⟨W G, W⟩ − ⟨C, W⟩``.

    ``cost`` (M, N): by how much it rises when one weight of the support is removed; ``gain`` (M, N): by how much it falls, at least, when one joins.
    """

    mask: Tensor
    W: Tensor
    cost: Tensor
    gain: Tensor
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
    for _ in range(_OUTER):
        before = mask
        for _ in range(_INNER):
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
    widths = counts.double()
    schur = torch.ones_like(C)
    if float((widths**3).sum()) > _CHOLESKY_WORK:
        W = restricted_least_squares(G, C, mask, _CG_STEPS)
        cost = 0.5 * W.square()  # [G_SS⁻¹]_ii ≥ 1 / G_ii = 1: the most that removal can cost
    else:
        W, cost = torch.zeros_like(C), torch.zeros_like(C)
        complete = float((widths**2).sum()) * len(G) <= _SCHUR_WORK
        order = counts.argsort()
        widest = max(int(counts.max()), 1)
        for rows in order.split(max(1, _BATCH_ELEMENTS // (widest * (len(G) if complete else widest)))):
            W[rows], cost[rows], schur[rows] = _batch(G, C[rows], mask[rows], complete)
    R = C - W @ G
    gain = torch.where(mask, 0.0, 0.5 * R.square() / schur)
    return Fit(mask, W, cost, gain, -0.5 * float((W * (C + R)).sum()))


def _batch(G: Tensor, C: Tensor, mask: Tensor, complete: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares, removal costs and (if ``complete``) Schur complements of a few neurons, their supports padded to the largest."""
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
    W, cost, schur = torch.zeros_like(C), torch.zeros_like(C), torch.ones_like(C)
    W.scatter_(1, index, torch.where(valid, solution, 0.0))
    cost.scatter_(1, index, torch.where(valid, 0.5 * solution.square() / inverse, 0.0))
    if complete:
        reduced = torch.linalg.solve_triangular(factor, G[index] * valid.unsqueeze(2), upper=False)
        schur = (1 - reduced.square().sum(1)).clamp(min=_SMALLEST_SCHUR)
    return W, cost, schur


def swap(G: Tensor, C: Tensor, supports: Supports, fit: Fit) -> Fit:
    """Step 3: swaps, many at a time, until none lowers the misfit; blocks are left as they are."""
    if supports.pattern.block != (1, 1):
        return fit
    most = max(1, int(_SWAPPED * supports.kept))
    for _ in range(_SWAP_ROUNDS):
        found = _swaps(supports, fit, most)
        if found is None:
            break
        mask = fit.mask.clone()
        mask.view(-1)[found[0]], mask.view(-1)[found[1]] = False, True
        swapped = refit(G, C, mask)
        if swapped.value < fit.value:
            fit = swapped
            continue
        if len(found[0]) == 1:
            break
        most = max(1, len(found[0]) // 2)
    return fit


def _swaps(supports: Supports, fit: Fit, most: int) -> tuple[Tensor, Tensor] | None:
    """Flat indices of up to ``most`` weights to remove and as many to keep instead, the most profitable pairs first; None where no pair profits."""
    addable = ~fit.mask if supports.allowed is None else ~fit.mask & supports.allowed
    gain = torch.where(addable & supports.counted, fit.gain, -1.0)
    cost = torch.where(fit.mask & supports.counted, fit.cost, torch.inf)
    if supports.pattern.kept_of is None:
        removed = cost.flatten().topk(most, largest=False)
        added = gain.flatten().topk(most)
        profit, out, into = added.values - removed.values, removed.indices, added.indices
    else:
        m = supports.pattern.kept_of[1]
        columns = torch.nonzero(supports.counted).flatten().view(-1, m)
        cheapest = cost[:, columns].min(2)
        best = gain[:, columns].max(2)
        profit = (best.values - cheapest.values).flatten()
        rows = torch.arange(len(cost), device=cost.device).unsqueeze(1) * cost.shape[1]
        place = torch.arange(len(columns), device=cost.device)
        out = (rows + columns[place, cheapest.indices]).flatten()
        into = (rows + columns[place, best.indices]).flatten()
        profit, chosen = profit.topk(min(most, profit.numel()))
        out, into = out[chosen], into[chosen]
    good = profit > 0
    return (out[good], into[good]) if bool(good.any()) else None

