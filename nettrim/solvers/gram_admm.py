"""``gram_admm``: alternating directions for layers without a ReLU, whose iterations never see a row (:mod:`nettrim.solvers.gram`).

``½F(W) + λ Σ ω|w|`` is solved with the single split ``S = W`` (weight σ, scaled multipliers ``E``; Boyd et al., 2011, section 6.4, a neuron a row):

1. ``W ← (C + σ (S − E)) (G + σI)⁻¹``: one product with a cached inverse is all that an iteration costs.
2. ``S ← soft-threshold(W + E, λω/σ)``, ``E ← W + E − S``, seeing the over-relaxed ``W``.

A budget moves λ: on a fixed support ``F − min F`` grows with λ², so ``λ ← λ √((ε² − min F)/(F(W) − min F))``, and ``F(W)`` costs no product, since
step 1 says that ``W G = C + σ (S − E − W)``. The dual point is the residual of the dense iterate ``W``, whose correlations with the columns
are ``σ (W − S + E)``, the multipliers; the bound that is reported is recomputed from ``G`` and ``C`` in float64. The sparse iterate is brought inside
the budget on its own support.

Columns are scaled to equal norm. ``T = S + E`` is all that an iteration leaves behind. Where ``G`` and ``C`` cannot tell a misfit from rounding, the
rows are asked: ``prox_admm`` takes over, and the solution says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.programs import LayerProgram
from nettrim.proximal import soft_threshold
from nettrim.solvers import prox_admm
from nettrim.solvers.base import Best, Solution, judge
from nettrim.solvers.feasibility import rounding_margin
from nettrim.solvers.gram import Gram, gather
from nettrim.solvers.splitting import SUPPORT_RANGE

NAME = "gram_admm"
OVER_RELAXATION = 1.7
SUPPORT_WEIGHT = 0.1  # σ over the mean diagonal of G, to start with
_BALANCE = 5.0  # residuals further apart than this move σ, at the price of one factorisation
_CHECK_EVERY = 20
_FLOAT32_WORK = 1e9  # N²M from which the iterates are kept in single precision
_STALLED_CHECKS = 10
_HOPELESS = 8.0  # a bound from this many times the tolerance: the sparse iterate is not worth bringing inside its budget yet
_MARGINS = 4
_RESOLVED = 1e-9  # a misfit below this share of ‖Y‖² is a difference of numbers too large for float64: the rows themselves are needed


@dataclass
class _State:
    """The iterates in one precision and scaled columns (``W = W_true · column``)."""

    column: Tensor
    omega: Tensor  # ω / column
    inverse: Tensor
    sigma: float
    level: float  # λ
    least: float  # min F, to the accuracy of the factorisation
    T: Tensor  # S + E

    def sparse(self, rows: slice) -> Tensor:
        """``S`` of a block of neurons."""
        omega = self.omega if self.omega.ndim == 1 else self.omega[rows]
        return soft_threshold(self.T[rows], self.level / self.sigma * omega)


def refuses(program: LayerProgram) -> str | None:
    return "it needs a layer without a ReLU (activation=None)" if program.relu else None


def run(program: LayerProgram, tol: float, max_iter: int, initial: Tensor | None) -> Solution:
    """Solve a no-ReLU program from one pass over its rows; another pass measures the answer on them."""
    began = time.perf_counter()
    gram = gather(program)
    unresolved = _RESOLVED * float(gram.squares.sum())
    if program.epsilon is not None and program.epsilon**2 < unresolved:
        return prox_admm.run(program, tol, max_iter, initial)
    best, iterations = _start(program, gram, initial), 0
    if best.objective > 0:
        state = _first_state(program, gram, _precision(program, tol), initial)
        if program.epsilon is not None and program.epsilon**2 < state.least * (1 + 1e-6):  # which a singular G may have overstated
            return prox_admm.run(program, tol, max_iter, initial)
        iterations = _iterate(program, gram, state, best, tol, max_iter)
        del state
    if program.epsilon is None and gram.misfit(_weights(program, best)) < unresolved:
        return prox_admm.run(program, tol, max_iter, initial)
    del gram
    answer = _weights(program, best)
    measures = best.measures or program.measure(answer)
    if not math.isfinite(best.objective) or not program.feasible_by(measures):
        # G and C are rounded too, and no margin tried was wide enough for what they hold of the budget to hold on the rows
        return prox_admm.run(program, tol, max_iter, initial)
    seconds = time.perf_counter() - began
    return judge(
        program,
        answer,
        best.bound,
        tol=tol,
        iterations=iterations,
        seconds=seconds,
        solver=NAME,
        measures=measures,
        history=best.history,
    )


def _weights(program: LayerProgram, best: Best) -> Tensor:
    return torch.zeros(program.shape, dtype=program.dtype, device=program.device) if best.W is None else best.W.to(program.dtype)


def _start(program: LayerProgram, gram: Gram, initial: Tensor | None) -> Best:
    """0 and the given weights, where they are feasible."""
    misfit = float(gram.squares.sum())
    best = Best(None, math.inf, 0.0)
    if program.epsilon is None:
        best.objective = 0.5 * misfit
    elif misfit <= program.epsilon**2:
        best.objective = 0.0
    if initial is not None:
        objective = program.value(program.norm(initial), gram.misfit(initial))
        if objective < best.objective and program.is_feasible(initial):
            best.W, best.objective = initial, objective
    return best


def _precision(program: LayerProgram, tol: float) -> torch.dtype:
    M, N = program.shape
    return torch.float32 if program.dtype == torch.float32 and N * N * M >= _FLOAT32_WORK and tol >= 1e-6 else torch.float64


def _first_state(program: LayerProgram, gram: Gram, dtype: torch.dtype, initial: Tensor | None) -> _State:
    sigma, omega = SUPPORT_WEIGHT * gram.mean, program.l1_weights.double() / gram.column  # type: ignore[union-attr]
    T, least = gram.least_squares(dtype)
    if initial is not None:
        T = (initial.double() * gram.column).to(dtype)
    level = program.regularization
    if level is None:  # the threshold is a twentieth of the weights, in the mean that the ℓ1 norm takes
        square = sum(float(T[rows].double().square().sum()) for rows in gram.blocks())
        size = float((omega.to(T) * T.abs()).sum())
        level = 0.05 * sigma * square / size if size > 0 else 1.0
    return _State(gram.column.to(dtype), omega.to(dtype), gram.inverse(sigma, dtype), sigma, level, least, T)


def _iterate(program: LayerProgram, gram: Gram, s: _State, best: Best, tol: float, limit: int) -> int:
    """Up to ``limit`` iterations; stops early at the tolerance, once the rows have confirmed what ``G`` and ``C`` say of the best point."""
    margin, margins, stalled, smallest = rounding_margin(program, s.T.dtype), 0, 0, math.inf
    iteration = 0
    while iteration < limit:
        iteration += 1
        if iteration % _CHECK_EVERY and iteration != limit:
            _step(program, gram, s)
            continue
        ratio = _step(program, gram, s, watched=True)
        best.bound = max(best.bound, gram.bound(program, _dense(gram, s)))
        _offer(program, gram, s, best, margin, math.inf if iteration == limit else _HOPELESS * tol)
        best.note(iteration)
        if best.gap <= tol:
            best.measures = program.measure(_weights(program, best))
            if program.feasible_by(best.measures):
                break
            margins += 1
            if margins > _MARGINS:
                break
            margin *= 10
            best.W, best.objective, best.measures = None, math.inf, None
            continue
        if not _BALANCE > ratio > 1 / _BALANCE:
            _change_sigma(gram, s, 3.0 if ratio > 1 else 1 / 3.0)
        stalled = 0 if best.gap < 0.98 * smallest else stalled + 1
        smallest = min(smallest, best.gap)
        if stalled >= _STALLED_CHECKS and s.T.dtype == torch.float32:
            _refine(program, gram, s)
            stalled = 0
    return iteration


def _step(program: LayerProgram, gram: Gram, s: _State, watched: bool = False) -> float:
    """One iteration for all neurons; if watched, the ratio of relative residuals, primal ``‖W − S‖/‖W‖`` over dual ``‖S − S_before‖/‖E‖``."""
    misfit = float(gram.squares.sum())
    apart = moved = size = multipliers = 0.0
    for rows, S, pull, C, W in _first_half(gram, s):
        # F(W) from W G = C + σ (S − E − W), without a product
        misfit += float((W * (pull - s.sigma * W - C)).sum(dtype=torch.float64))
        s.T[rows] += OVER_RELAXATION * (W - S)  # lerp(S, W) + E, with E = T − S
        if watched:
            after = s.sparse(rows)
            apart += float((W - after).square().sum())
            moved += float((after - S).square().sum())
            size += float(W.square().sum())
            multipliers += float((s.T[rows] - after).square().sum())
    if program.epsilon is not None:
        wanted, found = program.epsilon**2 - s.least, misfit - s.least
        ratio = math.sqrt(max(wanted, 0.0) / found) if found > 0 else 2.0
        _change_level(gram, s, s.level * min(max(ratio, 0.5), 2.0))
    return math.sqrt(apart * multipliers / max(size * moved, 1e-300)) if watched else 1.0


def _first_half(gram: Gram, s: _State) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Step 1, a block of neurons at a time: ``(rows, S, σ (S − E), C, W)``."""
    for rows in gram.blocks():
        S = s.sparse(rows)
        pull = s.sigma * (2 * S - s.T[rows])
        C = (gram.C[rows] / gram.column).to(s.T.dtype)
        yield rows, S, pull, C, (C + pull) @ s.inverse


def _dense(gram: Gram, s: _State) -> Iterator[tuple[slice, Tensor]]:
    """The next ``W`` in true columns, block by block."""
    for rows, _, _, _, W in _first_half(gram, s):
        yield rows, W / s.column


def _change_sigma(gram: Gram, s: _State, factor: float) -> None:
    """Multiply σ, within a range of G's mean diagonal; the multipliers ``σE`` stay what they are."""
    wanted = min(max(s.sigma * factor, gram.mean / SUPPORT_RANGE), gram.mean * SUPPORT_RANGE)
    factor = wanted / s.sigma
    for rows in gram.blocks():
        S = s.sparse(rows)
        s.T[rows] = S + (s.T[rows] - S) / factor
    s.sigma = wanted
    s.inverse = s.inverse.new_empty(0)  # gone before the next is made
    s.inverse = gram.inverse(s.sigma, s.T.dtype)


def _change_level(gram: Gram, s: _State, level: float) -> None:
    """Change λ; the multipliers ``E`` are of its size and change with it."""
    if level <= 0:
        return
    for rows in gram.blocks():
        S = s.sparse(rows)
        s.T[rows] = S + (s.T[rows] - S) * (level / s.level)
    s.level = level


def _refine(program: LayerProgram, gram: Gram, s: _State) -> None:
    """Go on in float64."""
    s.column, s.omega = gram.column, program.l1_weights.double() / gram.column  # type: ignore[union-attr]
    s.inverse, s.T = gram.inverse(s.sigma, torch.float64), s.T.double()


def _offer(program: LayerProgram, gram: Gram, s: _State, best: Best, margin: float, hopeless: float) -> None:
    """Keep the sparse iterate, brought inside its budget, if it is better than what is known.

    While the bound is further than ``hopeless`` below what the iterate costs even outside its budget, it is not looked at.
    """
    W = torch.empty_like(s.T)
    for rows in gram.blocks():
        W[rows] = s.sparse(rows) / s.column
    if program.epsilon is not None:
        if best.bound < (1 - hopeless) * program.norm(W):
            return
        inside = gram.restore(W, program.epsilon**2 * (1 - margin) ** 2)
        if inside is None:
            return
        W = inside
    W = W.to(program.dtype)
    objective = program.value(program.norm(W), 0.0 if program.regularization is None else gram.misfit(W))
    if objective < best.objective:
        best.W, best.objective, best.measures = W, objective, None
