"""``prox_admm``: alternating directions with the misfit's own proximal operator; every program, stopped by a proven duality gap.

With ``Z = A Wᵀ`` (weight β, scaled multipliers ``U``) and ``S = W`` (weight βr, scaled multipliers ``E``), an iteration is

1. ``Z ← prox of the misfit at V = A Wᵀ + U``  entry by entry; for a budget, the projection onto the set. Then ``U ← V − Z``.
2. ``S ← soft-threshold(W + E, λω/(βr))``. Then ``E ← W + E − S``.
3. ``W ← ((Z − U)ᵀ A + r (S − E)) (AᵀA + r I)⁻¹``: one product with a cached inverse; the two products with ``A`` are all that depends on P.

1 and 2 see the over-relaxed ``A Wᵀ`` and ``W``. All three are the journal paper's steps (SIAM J. Math. Data Sci. 2020, Algorithm 1) with two
weights instead of one, the relaxed set beside the paper's, and penalised programs beside budgets. What is new is the end: ``θ = βU`` is a dual
point (``U`` is 0 where the misfit is flat, and never negative off Ω), so each check knows the bound that it proves; and the sparse iterate ``S``
is brought inside the budget on its own support. docs/solvers.md has the measurements behind the constants.

Columns are scaled to equal norm, which makes one ``r`` right for inputs of any units.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.programs import ONE_SIDED_TOLERANCE, LayerProgram, residual
from nettrim.proximal import soft_threshold
from nettrim.solvers.base import Solution, judge, relative_gap
from nettrim.solvers.feasibility import restore_budget

NAME = "prox_admm"
OVER_RELAXATION = 1.7
SPLIT_WEIGHT = 0.1  # β over the misfit's curvature
ONE_SIDED_SPLIT_WEIGHT = 0.5  # where it starts for the paper's set, to be balanced: hard inequalities want a large β, the bound a small one
_BALANCE = 1.5
SUPPORT_WEIGHT = 1.0  # r over the mean diagonal of AᵀA
_CHECK_EVERY = 20
_ADAPT_UNTIL = 60
_FLOAT32_WORK = 2e7  # P·N·M from which single precision pays; below it float64 costs nothing
_STALLED_CHECKS = 12
_START_ROUNDS = 20
_BETA_RANGE = 100.0
_HOPELESS = 8.0  # gaps from this many times the tolerance don't end a run: the point is not worth bringing inside its budget yet


@dataclass
class _State:
    """The iterates in one precision; ``W``, ``S``, ``E`` are in scaled columns (``W = W_true · column``)."""

    column: Tensor
    G: Tensor  # Gram matrix of the unscaled columns
    inverse: Tensor
    r: float
    beta: float
    start: float  # the first β
    W: Tensor
    S: Tensor
    E: Tensor
    Z: Tensor  # (P, M)
    U: Tensor  # (P, M)


@dataclass
class _Best:
    """The best feasible point and the best bound so far."""

    W: Tensor | None
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        return math.inf if self.W is None else relative_gap(self.objective, self.bound)


def refuses(program: LayerProgram) -> str | None:
    if program.streamed and program.one_sided:
        return "its one-sided constraints need the targets at hand, and the rows are streamed; give arrays (a numpy.memmap will do)"
    return None


def run(program: LayerProgram, tol: float, max_iter: int, initial: Tensor | None) -> Solution:
    """Solve any layer program; see the module's docstring for the method and :class:`Solution` for what comes back."""
    start = time.perf_counter()
    best = _Best(None, math.inf, 0.0)
    for W in (torch.zeros(program.shape, dtype=torch.float64, device=program.device), initial):
        if W is not None:
            _offer(program, best, W)

    def finish(iterations: int, *, infeasible: bool = False, least_distance: float | None = None, last: Tensor | None = None) -> Solution:
        W = best.W if best.W is not None else last if last is not None else torch.zeros(program.shape, device=program.device)
        return judge(
            program,
            W,
            best.bound,
            tol=tol,
            iterations=iterations,
            seconds=time.perf_counter() - start,
            solver=NAME,
            infeasible=infeasible,
            least_distance=least_distance,
        )

    if best.objective == 0:
        return finish(0)
    iterations, last = 0, None
    for dtype in _precisions(program, tol):
        done, last = _iterate(program, best, dtype, tol, max_iter - iterations, initial if last is None else last)
        iterations += done
        if best.gap <= tol or iterations >= max_iter:
            break
    if best.W is None:
        least = least_distance(program, run, max_iter)
        return finish(iterations, infeasible=least is not None, least_distance=least, last=last)
    return finish(iterations)


def _precisions(program: LayerProgram, tol: float) -> tuple[torch.dtype, ...]:
    work = program.rows * program.shape[0] * program.shape[1]
    if program.dtype == torch.float32 and work >= _FLOAT32_WORK and tol >= 1e-6:
        return (torch.float32, torch.float64)
    return (torch.float64,)


def _offer(program: LayerProgram, best: _Best, W: Tensor) -> None:
    """Keep ``W`` if it is feasible, as it will be stored, and better than what is known."""
    W = W.detach().to(program.device, program.dtype)
    measures = program.measure(W)
    if not program.feasible_by(measures):
        return
    objective = program.norm(W)
    if program.regularization is not None:
        objective = program.regularization * objective + 0.5 * program.misfit_of(measures)
    if abs(objective - best.bound) < abs(best.objective - best.bound):
        best.W, best.objective = W, objective


def _iterate(
    program: LayerProgram, best: _Best, dtype: torch.dtype, tol: float, limit: int, initial: Tensor | None
) -> tuple[int, Tensor]:
    """Run up to ``limit`` iterations in ``dtype``; stops early at the tolerance or when this precision makes no more progress."""
    state = _start(program, dtype, initial)
    stalled, smallest, balanced = 0, math.inf, False
    iteration = 0
    while iteration < limit:
        iteration += 1
        gain = _step(program, state)
        if program.epsilon is not None and not balanced and _adapts(iteration):
            _adapt(state, gain, _split_weight(program))
        if iteration % _CHECK_EVERY and iteration != limit:
            continue
        W = _check(program, best, state, math.inf if iteration == limit else _HOPELESS * tol)
        if best.gap <= tol:
            break
        if program.one_sided:
            balanced = balanced or iteration >= _ADAPT_UNTIL
            _balance(program, best, state, W, tol)
        progress = best.gap if math.isfinite(best.gap) else 1.0 - best.bound / max(program.norm(state.S / state.column), 1e-300)
        stalled = 0 if progress < 0.98 * smallest else stalled + 1
        smallest = min(smallest, progress)
        if dtype == torch.float32 and stalled >= _STALLED_CHECKS:
            break
    return iteration, state.S / state.column


def _start(program: LayerProgram, dtype: torch.dtype, initial: Tensor | None) -> _State:
    G, C = _gram(program)
    diagonal = G.diagonal()
    mean = float(diagonal.mean()) or 1.0
    column = torch.where(diagonal > 1e-12 * diagonal.max(), (diagonal / mean).sqrt(), 1.0)
    scaled = G / column / column[:, None]
    r = SUPPORT_WEIGHT * (float(scaled.diagonal().mean()) or 1.0)
    # AᵀA is positive semidefinite to rounding, and r is of the size of its mean diagonal: this cannot fail
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled + r * torch.eye(len(G), dtype=G.dtype, device=G.device)))
    if initial is None:
        initial = ((C / column) @ inverse) / column
        if program.epsilon is not None:
            # from far outside the set, multipliers would gather that say nothing of the optimum
            inside = restore_budget(program, G, initial, rounds=_START_ROUNDS)
            initial = initial if inside is None else inside
    W = (initial.double() * column).to(dtype)
    beta = _split_weight(program)
    if program.epsilon is not None:
        # the first threshold is a twentieth of the mean weight; the gain then says how to correct it
        beta = 1.0 / (r * 0.05 * max(float(W.abs().mean()), torch.finfo(dtype).tiny * 1e6))
    state = _State(
        column=column.to(dtype),
        G=G.to(dtype),
        inverse=inverse.to(dtype),
        r=r,
        beta=beta,
        start=beta,
        W=W,
        S=W.clone(),
        E=torch.zeros_like(W),
        Z=torch.empty((program.rows, program.shape[0]), dtype=dtype, device=W.device),
        U=torch.zeros((program.rows, program.shape[0]), dtype=dtype, device=W.device),
    )
    weights = (W / state.column).T
    for rows, A, _, _ in program.row_chunks(dtype):
        state.Z[rows] = A @ weights
    return state


def _gram(program: LayerProgram) -> tuple[Tensor, Tensor]:
    """``AᵀA`` (N, N) and ``YᵀA`` (M, N), accumulated in float64."""
    M, N = program.shape
    G = torch.zeros((N, N), dtype=torch.float64, device=program.device)
    C = torch.zeros((M, N), dtype=torch.float64, device=program.device)
    for _, A, Y, _ in program.row_chunks():
        G.addmm_(A.T, A)
        C.addmm_(Y.T, A)
    return G, C


def _step(program: LayerProgram, s: _State) -> float:
    """One iteration; the returned gain in [0, 1] is the share of the residual that the budget leaves (1: inactive)."""
    kept, cut, gain = _project(program, s)
    T = torch.lerp(s.S, s.W, OVER_RELAXATION).add_(s.E)
    level = 1.0 if program.regularization is None else program.regularization
    omega = program.l1_weights.to(s.W)  # type: ignore[union-attr]
    s.S = soft_threshold(T, level * omega / s.column / (s.beta * s.r))
    s.E = T - s.S
    s.W = ((kept - cut) / s.column + s.r * (s.S - s.E)) @ s.inverse
    return gain


def _project(program: LayerProgram, s: _State) -> tuple[Tensor, Tensor, float]:
    """Step 1 for all rows, and the two halves of step 3's right-hand side: ``(Z − U)ᵀA = kept − cut``.

    How much of the residual ``D`` a budget leaves depends on the norm of all of it. Rows in memory are read twice, with one product each time. A
    stream is read once: the right-hand side is linear in that share, so ``VᵀA`` and ``DᵀA`` are gathered apart.
    """
    weights = (s.W / s.column).T
    kept, cut = torch.zeros_like(s.W), torch.zeros_like(s.W)
    known = None if program.regularization is None else s.beta / (1 + s.beta)
    total = 0.0
    for rows, A, Y, V0 in program.row_chunks(s.W.dtype):
        V = torch.lerp(s.Z[rows], A @ weights, OVER_RELAXATION).add_(s.U[rows])
        D = residual(V, Y, V0, relu=program.relu)
        if known is not None:
            U = _removed(program, D, Y, known)
            s.U[rows], s.Z[rows] = U, V.sub_(U)
            kept.addmm_((s.Z[rows] - U).T, A)
            continue
        total += float((torch.where(Y > 0, D, 0.0) if program.one_sided else D).square().sum())
        s.Z[rows], s.U[rows] = V, D
        if program.streamed:
            kept.addmm_(V.T, A)
            cut.addmm_(D.T, A)
    if known is not None:
        return kept, cut, known
    assert program.epsilon is not None
    norm = math.sqrt(total)
    gain = 1.0 if norm <= program.epsilon else program.epsilon / norm
    if program.streamed:
        s.U *= 1 - gain
        s.Z -= s.U
        return kept, cut.mul_(2 * (1 - gain)), gain
    for rows, A, Y, _ in program.row_chunks(s.W.dtype):
        U = _removed(program, s.U[rows], Y, gain)
        s.U[rows] = U
        s.Z[rows] -= U
        kept.addmm_((s.Z[rows] - U).T, A)
    return kept, cut, gain


def _removed(program: LayerProgram, D: Tensor, Y: Tensor, gain: float) -> Tensor:
    """``U``: what the proximal operator takes from the residual, ``(1 − gain) D``; all of it where an inequality is hard."""
    if not program.one_sided:
        return D * (1 - gain)
    return torch.where(Y > 0, D * (1 - gain), D)


def _adapts(iteration: int) -> bool:
    return iteration % 3 == 0 and (iteration <= _ADAPT_UNTIL or math.log2(iteration / 3).is_integer())


def _split_weight(program: LayerProgram) -> float:
    return ONE_SIDED_SPLIT_WEIGHT if program.one_sided else SPLIT_WEIGHT


def _adapt(s: _State, gain: float, wanted: float) -> None:
    """Choose β so that the projection acts as the prox of a penalised misfit with the same λ would: ``gain = β'/(1 + β')``, ``β'`` as wanted.

    The multipliers ``βU`` and ``βrE`` stay what they are.
    """
    ratio = gain / (1 - gain) / wanted if gain < 1 else math.inf
    # far from the set the residual says how far, not how β fits: the range keeps that from running away
    lowest, highest = s.start / _BETA_RANGE, s.start * _BETA_RANGE
    factor = s.beta / min(max(s.beta / min(max(ratio, 0.2), 5.0), lowest), highest)
    s.beta /= factor
    s.U *= factor
    s.E *= factor


def _check(program: LayerProgram, best: _Best, s: _State, hopeless: float) -> Tensor:
    """Offer the bound of the multipliers and the sparse iterate, inside its budget; returns that iterate.

    While the bound is further than ``hopeless`` below what the sparse iterate costs even outside its budget, that one is not looked at.
    """
    best.bound = max(best.bound, program.lower_bound(s.U))
    W = s.S / s.column
    if program.epsilon is not None:
        if not program.one_sided and best.bound < (1 - hopeless) * program.norm(W):
            return W
        restored = restore_budget(program, s.G, W)
        if restored is None:
            return W
        W = restored
    _offer(program, best, W)
    return W


def _balance(program: LayerProgram, best: _Best, s: _State, W: Tensor, tol: float) -> None:
    """Move β by what keeps the paper's set from its end: larger for unmet inequalities, smaller for a loose bound."""
    measures = program.measure(W)
    norm = program.norm(W)
    objective = norm if program.regularization is None else program.regularization * norm + 0.5 * program.misfit_of(measures)
    unmet = program.one_sided_excess(measures) / ONE_SIDED_TOLERANCE
    loose = relative_gap(objective, best.bound) / tol
    factor = _BALANCE if unmet > 2 * loose else 1 / _BALANCE if loose > 2 * unmet else 1.0
    s.beta *= factor
    s.U /= factor
    s.E /= factor


def least_distance(program: LayerProgram, solver: Callable[[LayerProgram, float, int, Tensor | None], Solution], max_iter: int) -> float | None:
    """The smallest ``‖D‖_F`` there is, if it is proven to lie above the budget; None where there may be feasible weights.

    For ``λ → 0`` a penalised program's bound ``b ≤ λ‖W‖ + ½ misfit`` says that no weights with ``‖W‖ ≤ (b − ½ε²)/λ`` keep the budget.
    """
    assert program.epsilon is not None
    scale = program.target_norm**2
    tiny = LayerProgram(
        program.inputs,
        program.targets,
        regularization=1e-9 * max(scale, 1e-300) / program.shape[0],
        activation=program.activation,
        consistency=program.consistency,
        upper=program.upper,
        l1_weights=program.l1_weights,
    )
    solution = solver(tiny, 1e-3, min(max_iter, 1000), None)
    if not solution.lower_bound > 0.5 * program.epsilon**2 * (1 + 1e-3):
        return None
    return tiny.measure(solution.weights).distance
