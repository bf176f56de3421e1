"""``prox_admm``: alternating directions with the misfit's own proximal operator; every program, stopped by a proven duality gap.

With ``Z = A Wᵀ`` (weight β, scaled multipliers ``U``) and ``S = W`` (weight βr, scaled multipliers ``E``), an iteration is

1. ``Z ← prox of the misfit at V = A Wᵀ + U`` entry by entry: ``V − D(V)/(1 + β)``, or all of ``D(V)`` where an inequality is hard. ``U ← V − Z``.
2. ``S ← soft-threshold(W + E, λω/(βr))``. Then ``E ← W + E − S``.
3. ``W ← ((Z − U)ᵀ A + r (S − E)) (AᵀA + r I)⁻¹``: one product with a cached inverse; the two products with ``A`` are all that depends on P.

1 and 2 see the over-relaxed ``A Wᵀ`` and ``W``. A budget first moves λ: ``λ ← λ ε/√misfit(Z)``, and the multipliers, which are of its size,
with it; so it costs what a penalty does. Once λ has settled, or won't, step 1 is the projection onto the budget's set, and λ stays: it is then
but the ratio of two step sizes, as in the papers. Splitting and step 3 are the journal paper's (SIAM J. Math. Data Sci. 2020, Algorithm 1), with
two weights instead of one, the relaxed set beside the paper's, and penalised programs beside budgets. What is new is the end: ``θ = βU/λ`` is a
dual point (``U`` is 0 where the misfit is flat, and never negative off Ω), so each check knows the bound that it proves; and the sparse iterate
``S`` is brought inside the budget on its own support. docs/solvers.md has the measurements behind the constants.

Columns are scaled to equal norm, which makes one ``r`` right for inputs of any units.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from nettrim.duality import best_bound
from nettrim.programs import LayerProgram
from nettrim.residual import ONE_SIDED_TOLERANCE, Measures
from nettrim.solvers.base import Best, Solution, judge, relative_gap
from nettrim.solvers.feasibility import restore_budget
from nettrim.solvers.splitting import State, change_support_weight, refine, scale_weights, start, step, watched_step
from nettrim.solvers.working_set import WorkingSet

NAME = "prox_admm"
_TINY_PENALTY = 1e-9  # over the one from which 0 is optimal
_EXCLUDED = 1e3  # no feasible weights below so many times the norm of the nearest point, or of any that matter
SPLIT_WEIGHT = 0.1  # β over the misfit's curvature
ONE_SIDED_SPLIT_WEIGHT = 0.5  # for the paper's set: hard inequalities want a large β, the bound a small one
_UNMET = 1.5  # by which β grows while unmet hard inequalities are all that is left; faster is sooner done, with more small weights left
SUPPORT_WEIGHT = 1.0  # r over the mean diagonal of AᵀA
_BALANCE_EVERY = 20
_SETTLED_FOR = 10
_FLOAT32_WORK = 2e7  # P·N·M from which single precision pays; below it float64 costs nothing
_STALLED_CHECKS = 24
_BALANCE_FROM = 200  # what is not solved by then has its residuals balanced
_APART = 4.0  # residuals further apart than this are; and the most by which a weight changes for it
_START_OVER = 1000  # what is not solved by then gets its first weights again, but for a lighter r
_LIGHTER = 0.1
_BALANCE_AGAIN = 400  # and so many iterations before they are balanced
_HOPELESS = 1.2  # gaps from this many times the tolerance don't end a run: the point is not worth bringing inside its budget yet


def refuses(program: LayerProgram) -> str | None:
    if program.streamed and program.one_sided:
        return "its one-sided constraints need the targets at hand, and the rows are streamed; give arrays (a numpy.memmap will do)"
    return None


def run(program: LayerProgram, tol: float, max_iter: int, initial: Tensor | None) -> Solution:
    """Solve any layer program; see the module's docstring for the method and :class:`Solution` for what comes back."""
    began = time.perf_counter()
    best = Best(None, math.inf, 0.0)
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
            seconds=time.perf_counter() - began,
            solver=NAME,
            infeasible=infeasible,
            least_distance=least_distance,
            measures=best.measures,
            history=best.history,
        )

    if best.objective == 0:
        return finish(0)
    iterations, last = _iterate(program, best, tol, max_iter, initial)
    if best.W is None and program.epsilon is not None:
        least = least_distance(program, max_iter)
        return finish(iterations, infeasible=least is not None, least_distance=least, last=last)
    return finish(iterations, last=last)


def _precision(program: LayerProgram, tol: float) -> torch.dtype:
    work = program.rows * program.shape[0] * program.shape[1]
    return torch.float32 if program.dtype == torch.float32 and work >= _FLOAT32_WORK and tol >= 1e-6 else torch.float64


def _offer(program: LayerProgram, best: Best, W: Tensor) -> tuple[float, Measures]:
    """Keep ``W`` if it is feasible, as it will be stored, and better than what is known; returns its objective and measures."""
    W = W.detach().to(program.device, program.dtype)
    measures = program.measure(W)
    objective = program.value(program.norm(W), program.misfit_of(measures))
    if program.feasible_by(measures) and abs(objective - best.bound) < abs(best.objective - best.bound):
        best.W, best.objective, best.measures = W, objective, measures
    return objective, measures


def _iterate(program: LayerProgram, best: Best, tol: float, limit: int, initial: Tensor | None) -> tuple[int, Tensor]:
    """Run up to ``limit`` iterations, in float64 once single precision makes no more progress; stops early at the tolerance."""
    state = start(program, _precision(program, tol), initial, _first_split_weight(program), SUPPORT_WEIGHT)
    working_set = WorkingSet(program, state)
    state = working_set.without_dead(state)
    iteration, stalled, smallest = 0, 0, math.inf
    while iteration < limit:
        iteration += 1
        ratios = None
        if iteration % _START_OVER == 0:
            _start_over(program, state)
        since = iteration % _START_OVER
        if iteration % _BALANCE_EVERY == 0 and since >= (_BALANCE_FROM if since == iteration else _BALANCE_AGAIN):
            ratios = watched_step(program, state)
        else:
            step(program, state)
        if state.settled >= _SETTLED_FOR or since == _BALANCE_FROM:
            state.projecting = program.epsilon is not None
        if iteration % (20 if iteration < 40 else 10) and iteration != limit:
            continue
        bound, correlation = best_bound(program, state.U)
        best.bound = max(best.bound, bound)
        unmet = _end(program, working_set, best, state, tol, last=iteration == limit)
        best.note(iteration)
        if best.gap <= tol:
            break
        if unmet:
            scale_weights(state, _UNMET)
        elif ratios is not None:
            _balance_residuals(state, *ratios)
        progress = best.gap if math.isfinite(best.gap) else 1.0 - best.bound / max(program.norm(working_set.expand(state.weights)), 1e-300)
        stalled = 0 if progress < 0.98 * smallest else stalled + 1
        smallest = min(smallest, progress)
        if stalled >= _STALLED_CHECKS and state.W.dtype == torch.float32:
            refine(program, state)
            stalled = 0
        state = working_set.update(state, correlation)
    return iteration, working_set.expand(state.weights)


def _first_split_weight(program: LayerProgram) -> float:
    return ONE_SIDED_SPLIT_WEIGHT if program.one_sided else SPLIT_WEIGHT


def _start_over(program: LayerProgram, s: State) -> None:
    """Iterates and multipliers stay; the weights, which balancing may have led astray, are those of the start, and a budget's λ moves again."""
    scale_weights(s, _first_split_weight(program) / s.beta)
    change_support_weight(s, _LIGHTER * SUPPORT_WEIGHT * s.mean / s.r)
    s.projecting, s.settled = False, 0


def _balance_residuals(s: State, of_Z: float, of_S: float) -> None:
    """For programs on which the weights above have not served: bring primal and dual residuals together, each split by its own weight."""
    if not _APART > of_S > 1 / _APART:
        change_support_weight(s, _balancing(of_S))
    if not _APART > of_Z > 1 / _APART:
        factor = _balancing(of_Z)
        scale_weights(s, factor)
        change_support_weight(s, 1 / factor)


def _balancing(ratio: float) -> float:
    return min(max(math.sqrt(ratio), 1 / _APART), _APART)


def _end(program: LayerProgram, working_set: WorkingSet, best: Best, s: State, tol: float, *, last: bool) -> bool:
    """Offer the sparse iterate, brought inside its budget; returns whether only hard inequalities keep it from being the answer.

    While the bound is far below what it costs even outside its budget, it is not looked at, but the last time.
    """
    W = s.weights
    if program.epsilon is not None:
        if not (last or program.one_sided) and best.bound < (1 - _HOPELESS * tol) * program.norm(working_set.expand(W)):
            return False
        restored = restore_budget(program, s.G.to(W.dtype), W, s.columns)
        if restored is None:
            return False
        W = restored
    objective, measures = _offer(program, best, working_set.expand(W))
    return program.one_sided_excess(measures) > ONE_SIDED_TOLERANCE and relative_gap(objective, best.bound) < tol


def least_distance(program: LayerProgram, max_iter: int) -> float | None:
    """The distance of the nearest point found, if weights within the budget would have to be a thousand times as large; None where there may be some.

    For ``λ → 0`` a penalised program's bound ``b ≤ λ‖W‖ + ½ misfit`` says that no weights with ``‖W‖ ≤ (b − ½ε²)/λ`` keep the budget. That is
    taken for infeasible when it is proven of weights far larger than those of the nearest point, and that point is proven to be the nearest.
    """
    assert program.epsilon is not None
    slope = program.gradient(torch.zeros(program.shape, dtype=torch.float64, device=program.device)).abs()
    steepest = float(slope.max()) / max(float(program.l1_weights.double().max()), 1e-300)  # type: ignore[union-attr]
    tiny = LayerProgram(
        program.inputs,
        program.targets,
        regularization=_TINY_PENALTY * steepest or 1.0,
        activation=program.activation,
        consistency=program.consistency,
        upper=program.upper,
        floor=program.floor,
        ceiling=program.ceiling,
        l1_weights=program.l1_weights,
    )
    solution = run(tiny, 1e-3, min(max_iter, 1000), None)
    assert tiny.regularization is not None
    excluded = (solution.lower_bound - 0.5 * program.epsilon**2 * (1 + 1e-3)) / tiny.regularization
    large = _EXCLUDED * max(tiny.norm(solution.weights), _reach(program))
    distance = tiny.measure(solution.weights).distance
    return distance if solution.status == "optimal" and distance > program.epsilon and excluded > large else None


def _reach(program: LayerProgram) -> float:
    """The ℓ1 norm of weights on the largest column alone that give outputs as large as the targets: the size of weights that matter."""
    squares = torch.zeros(program.shape[1], dtype=torch.float64, device=program.device)
    for _, A, _, _ in program.row_chunks():
        squares += A.square().sum(0)
    return program.target_norm * float(program.l1_weights.double().max()) / math.sqrt(max(float(squares.max()), 1e-300))  # type: ignore[union-attr]
