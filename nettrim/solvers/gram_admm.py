"""``gram_admm``: layers without a ReLU, where ``G = AᵀA``, ``C = YᵀA`` and ``‖Y‖²`` are all that matters of P rows.

One pass over the rows gathers them, in float64. Then ``½‖A Wᵀ − Y‖_F² + λ Σ ω|w|`` is solved with the single split ``S = W`` (weight σ, scaled
multipliers ``E``; Boyd et al., 2011, section 6.4, a neuron a row):

1. ``W ← (C + σ (S − E)) (G + σI)⁻¹``: one product with a cached inverse is all that an iteration costs.
2. ``S ← soft-threshold(W + E, λω/σ)``, ``E ← W + E − S``, seeing the over-relaxed ``W``.

A budget moves λ: on a fixed support ``F − min F`` grows with λ², so ``λ ← λ √((ε² − min F)/(F(W) − min F))``, and ``F(W)`` costs no product, since
step 1 says that ``W G = C + σ (S − E − W)``. The dual point is the residual of the dense iterate ``W``, whose correlations with the columns
are ``σ (W − S + E)``, the multipliers; the bound that is reported is recomputed from ``G`` and ``C`` in float64. The sparse iterate is brought inside
the budget on its own support, where ``F`` is a parabola along the step.

Columns are scaled to equal norm. Neurons are treated in blocks, which bounds what an iteration holds beside ``G``, ``C``, the inverse, ``W`` and
``S + E``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.duality import best_gram_bound
from nettrim.programs import LayerProgram
from nettrim.proximal import soft_threshold
from nettrim.solvers import prox_admm
from nettrim.solvers.base import Solution, judge, relative_gap
from nettrim.solvers.feasibility import restricted_least_squares, rounding_margin

NAME = "gram_admm"
OVER_RELAXATION = 1.7
SUPPORT_WEIGHT = 0.1  # σ over the mean diagonal of G, to start with
_BALANCE = 5.0  # residuals further apart than this move σ, at the price of one factorisation
_CHECK_EVERY = 20
_FLOAT32_WORK = 1e9  # N²M from which the iterates are kept in single precision
_BLOCK_ELEMENTS = 4_000_000
_MARGINS = 4
_RESOLVED = 1e-9  # a misfit below this share of ‖Y‖² is a difference of numbers too large for float64: the rows themselves are needed


@dataclass
class _Problem:
    """The program in Gram space (float64), and its iterates in scaled columns (``W = W_true · column``)."""

    G: Tensor
    C: Tensor
    squares: Tensor  # ‖y_m‖² of each neuron
    column: Tensor
    inverse: Tensor
    sigma: float
    least: float  # min F, to the accuracy of the factorisation
    level: float  # λ
    W: Tensor
    T: Tensor  # S + E
    omega: Tensor  # ω / column

    def blocks(self) -> Iterator[slice]:
        step = max(1, _BLOCK_ELEMENTS // self.W.shape[1])
        for start in range(0, len(self.W), step):
            yield slice(start, start + step)

    def sparse(self, rows: slice) -> Tensor:
        """``S`` of a block of neurons, in scaled columns."""
        omega = self.omega if self.omega.ndim == 1 else self.omega[rows]
        return soft_threshold(self.T[rows], self.level / self.sigma * omega)

    def misfit(self, W: Tensor) -> float:
        """``F(W)`` for true columns, float64, block by block."""
        total = float(self.squares.sum())
        for rows in self.blocks():
            w = W[rows].double()
            total += float((w * (w @ self.G - 2 * self.C[rows])).sum())
        return max(total, 0.0)


def refuses(program: LayerProgram) -> str | None:
    return "it needs a layer without a ReLU (activation=None)" if program.relu else None


def run(program: LayerProgram, tol: float, max_iter: int, initial: Tensor | None) -> Solution:
    """Solve a no-ReLU program from one pass over its rows; another pass measures the answer on them."""
    start = time.perf_counter()
    problem = _gather(program, tol, initial)
    if program.epsilon is not None and program.epsilon**2 < _RESOLVED * float(problem.squares.sum()):
        return prox_admm.run(program, tol, max_iter, initial)
    bound, iterations, margin = 0.0, 0, rounding_margin(program, problem.W.dtype)
    best: tuple[float, Tensor | None] = (math.inf, None)
    zero = torch.zeros(program.shape, dtype=program.dtype, device=program.device)
    candidates = [zero] if initial is None else [zero, initial]
    for candidate in candidates:
        if program.is_feasible(candidate):
            best = min(best, (_objective(program, problem, candidate), candidate), key=lambda pair: pair[0])
    attempts = 0
    out_of_reach = program.epsilon is not None and program.epsilon**2 < problem.least * (1 - 1e-6)
    while not out_of_reach and best[0] > 0 and iterations < max_iter:
        iterations += 1
        primal, dual = _step(program, problem)
        if iterations % _CHECK_EVERY and iterations != max_iter:
            continue
        W, objective = _candidate(program, problem, margin)
        if W is not None and objective < best[0]:
            best = (objective, W)
        dense = problem.W.double() / problem.column
        bound = max(bound, best_gram_bound(program, problem.G, problem.C, problem.squares, dense))
        if relative_gap(best[0], bound) > tol:
            if not _BALANCE > primal / max(dual, 1e-300) > 1 / _BALANCE:
                _rebalance(problem, 3.0 if primal > dual else 1 / 3.0)
            continue
        assert best[1] is not None
        if program.is_feasible(best[1].to(program.dtype)):
            break
        # G and C are rounded too: what they hold of the budget does not quite hold on the rows
        attempts += 1
        if attempts > _MARGINS:
            return prox_admm.run(program, tol, max_iter, initial)
        margin *= 10
        best = (math.inf, None)
    if program.epsilon is None and best[1] is not None and problem.misfit(best[1]) < _RESOLVED * float(problem.squares.sum()):
        return prox_admm.run(program, tol, max_iter, initial)
    least = None
    if best[1] is None:
        least = prox_admm.least_distance(program, run, max_iter)
    answer = zero if best[1] is None else best[1]
    return judge(
        program,
        answer,
        bound,
        tol=tol,
        iterations=iterations,
        seconds=time.perf_counter() - start,
        solver=NAME,
        infeasible=least is not None,
        least_distance=least,
    )


def _gather(program: LayerProgram, tol: float, initial: Tensor | None) -> _Problem:
    M, N = program.shape
    G = torch.zeros((N, N), dtype=torch.float64, device=program.device)
    C = torch.zeros((M, N), dtype=torch.float64, device=program.device)
    squares = torch.zeros(M, dtype=torch.float64, device=program.device)
    for _, A, Y, _ in program.row_chunks():
        G.addmm_(A.T, A)
        C.addmm_(Y.T, A)
        squares += Y.square().sum(0)
    dtype = torch.float32 if program.dtype == torch.float32 and N * N * M >= _FLOAT32_WORK and tol >= 1e-6 else torch.float64
    diagonal = G.diagonal()
    mean = float(diagonal.mean()) or 1.0
    column = torch.where(diagonal > 0, (diagonal / mean).sqrt(), 1.0)
    sigma = SUPPORT_WEIGHT * mean
    inverse = _regularised_inverse(G, column, sigma, dtype)
    W = _least_squares(G, C, column, mean) if initial is None else initial.double()
    omega = program.l1_weights.double() / column  # type: ignore[union-attr]
    problem = _Problem(G, C, squares, column, inverse, sigma, 0.0, 1.0, (W * column).to(dtype), W, omega.to(dtype))
    problem.least = problem.misfit(_least_squares(G, C, column, mean) if initial is not None else W)
    problem.T = problem.W.clone()
    problem.level = program.regularization or 0.05 * sigma * max(float(problem.W.abs().mean()), 1e-300)
    return problem


def _regularised_inverse(G: Tensor, column: Tensor, sigma: float, dtype: torch.dtype) -> Tensor:
    """``(G/(column columnᵀ) + σI)⁻¹``: G is positive semidefinite to rounding, and σ of the size of its mean diagonal, so this cannot fail."""
    scaled = G / column / column[:, None]
    scaled.diagonal().add_(sigma)
    return torch.cholesky_inverse(torch.linalg.cholesky(scaled)).to(dtype)


def _least_squares(G: Tensor, C: Tensor, column: Tensor, mean: float) -> Tensor:
    """Weights close to ``argmin F``; a share 1e-10 of the mean diagonal is added to G, which can only raise their misfit."""
    scaled = G / column / column[:, None]
    share = 1e-10
    while True:
        scaled.diagonal().add_(share * mean)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not int(failed):
            return torch.cholesky_solve((C / column).T, factor).T / column
        share *= 10


def _step(program: LayerProgram, p: _Problem) -> tuple[float, float]:
    """One iteration for all neurons; returns the relative primal and dual residuals, ``‖W − S‖/‖W‖`` and ``‖S − S_before‖/‖E‖``."""
    misfit = float(p.squares.sum())
    apart = moved = size = multipliers = 0.0
    for rows in p.blocks():
        S = p.sparse(rows)
        pull = p.sigma * (2 * S - p.T[rows])  # σ (S − E)
        C = (p.C[rows] / p.column).to(p.W.dtype)
        W = (C + pull) @ p.inverse
        p.W[rows] = W
        # F(W) from W G = C + σ (S − E − W), without a product
        misfit += float((W * (pull - p.sigma * W - C)).double().sum())
        p.T[rows] = torch.lerp(S, W, OVER_RELAXATION) + (p.T[rows] - S)
        after = p.sparse(rows)
        apart += float((W - after).square().sum())
        moved += float((after - S).square().sum())
        size += float(W.square().sum())
        multipliers += float((p.T[rows] - after).square().sum())
    if program.epsilon is not None:
        wanted, found = program.epsilon**2 - p.least, misfit - p.least
        ratio = math.sqrt(max(wanted, 0.0) / found) if found > 0 else 2.0
        _set_level(p, max(p.level * min(max(ratio, 0.5), 2.0), 1e-12 * p.sigma))


    return math.sqrt(apart / size) if size else 0.0, math.sqrt(moved / multipliers) if multipliers else math.inf


def _rebalance(p: _Problem, factor: float) -> None:
    """Change σ; the multipliers ``σE`` stay what they are."""
    for rows in p.blocks():
        S = p.sparse(rows)
        p.T[rows] = S + (p.T[rows] - S) / factor
    p.sigma *= factor
    p.inverse = _regularised_inverse(p.G, p.column, p.sigma, p.W.dtype)


def _set_level(p: _Problem, level: float) -> None:
    """Change λ; the multipliers ``E`` are of its size and change with it."""
    for rows in p.blocks():
        S = p.sparse(rows)
        p.T[rows] = S + (p.T[rows] - S) * (level / p.level)
    p.level = level


def _candidate(program: LayerProgram, p: _Problem, margin: float) -> tuple[Tensor | None, float]:
    """The sparse iterate inside its budget, in true columns, and its objective; None where it cannot be brought inside."""
    W = torch.cat([p.sparse(rows) / p.column.to(p.W.dtype) for rows in p.blocks()])
    if program.epsilon is not None:
        inside = _restore(program, p, W, margin)
        if inside is None:
            return None, math.inf
        W = inside
    W = W.to(program.dtype)
    return W, _objective(program, p, W)


def _objective(program: LayerProgram, p: _Problem, W: Tensor) -> float:
    norm = program.norm(W)
    return norm if program.regularization is None else program.regularization * norm + 0.5 * p.misfit(W)


def _restore(program: LayerProgram, p: _Problem, W: Tensor, margin: float) -> Tensor | None:
    """``W − t·step`` with the smallest t in [0, 1] that keeps the budget; ``F(W − t·step)`` is a parabola in t."""
    budget = program.epsilon**2 * (1 - margin) ** 2  # type: ignore[operator]
    G = p.G.to(W.dtype)
    step = torch.empty_like(W)
    constant, slope, curvature = float(p.squares.sum()), 0.0, 0.0
    for rows in p.blocks():
        w = W[rows].double()
        wG = w @ p.G
        constant += float((w * (wG - 2 * p.C[rows])).sum())
        downhill = wG - p.C[rows]
        step[rows] = restricted_least_squares(G, downhill.to(W.dtype), W[rows] != 0)
        direction = step[rows].double()
        slope += float((direction * downhill).sum())
        curvature += float((direction * (direction @ p.G)).sum())
    if constant <= budget:
        return W
    discriminant = slope**2 - curvature * (constant - budget)
    if slope <= 0 or discriminant < 0:
        return None
    t = (constant - budget) / (slope + math.sqrt(discriminant))
    return W - t * step
