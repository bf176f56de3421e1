"""Writing a solution into its layer, and keeping it only if the stored layer keeps the promise."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch

from nettrim.budgets import Budget, distance
from nettrim.certificate import Promise, measure, output_norm, rounding, stored_discrepancy
from nettrim.errors import ArgumentError
from nettrim.layers import Matrix
from nettrim.observing import Layer
from nettrim.solvers import Solution, solve
from nettrim.solvers.base import relative_gap, stacked

# How much of the budget each attempt leaves to rounding, in roundoffs of ‖Y‖, besides what the last one measured: the nearest stored weights
# may stay the same ones while the budget shrinks by less than that.
_MARGINS = (0.0, 0.125, 0.5, 2.0, 8.0)


@dataclass(frozen=True)
class Stored:
    """What became of a solution.

    Attributes
    ----------
    solution : Solution
        The one that was stored, or the one that could not be. Of a stored one, objective and gap are those of the weights as stored, the bound is
        that of the budget promised, and iterations and seconds are those of all attempts.
    discrepancy : float
        Measured by running the stored layer; infinite if nothing was stored.
    promise : float
        What it may be.
    failure : str or None
        Why the layer is as it was.
    sizes : Promise or None
        Of the stored weights, where they were measured on the way.
    """

    solution: Solution
    discrepancy: float
    promise: float
    failure: str | None
    sizes: Promise | None = None


def store(matrix: Matrix, layer: Layer, budget: Budget, solution: Solution, solver: str, tol: float, max_iter: int | None) -> Stored:
    """Write a solution into ``matrix`` and measure it on all rows; where that costs the promise, solve within what is left.

    Rounding to the parameter's dtype adds a part to the squared discrepancy that hardly depends on the solution, so the next attempt's squared budget
    is lowered by it, and by a margin that grows. Rows that the program did not see add a part in proportion to the budget, which is lowered so.
    After any failure the module holds what it held.
    """
    if solution.status not in ("optimal", "feasible"):
        return Stored(solution, math.inf, math.nan, _explain(solution, budget))
    if budget.promise is None:
        return _store_as_is(matrix, layer, budget, solution, tol)
    before = matrix.as_matrix()
    lower_bound, discrepancy = solution.lower_bound, math.inf
    promised = epsilon = budget.epsilon
    roundoff = torch.finfo(before.dtype).eps * output_norm(layer) / layer.lipschitz
    for margin in _MARGINS:
        try:
            layer.write(matrix, solution.weights)
        except ArgumentError as error:  # beyond the range of the dtype; the module is as it was
            return Stored(_unstored(solution), math.inf, budget.promise, str(error))
        discrepancy = stored_discrepancy(matrix, layer)
        if discrepancy <= budget.promise:
            as_stored = _as_stored(solution, layer.read(matrix), budget, lower_bound, tol)
            return Stored(as_stored, discrepancy, budget.promise, None)
        matrix.write_back(before)
        if layer.drawn is not None:
            epsilon = epsilon * max(0.1, 0.98 * budget.promise / discrepancy)
        else:
            # in the program's own scale: an activation may make a discrepancy smaller, so that what is over is what counts
            excess = (discrepancy**2 - min(layer.lipschitz * solution.discrepancy, budget.promise) ** 2) / layer.lipschitz**2
            left = epsilon**2 - 1.2 * excess - 1e-9 * epsilon**2
            if not left > 0:
                break
            lowered = promised - margin * roundoff
            epsilon = min(math.sqrt(left), lowered) if lowered > 0 else math.sqrt(left)
        again = _solve_within(layer, budget, epsilon / promised, solver, tol, max_iter)
        solution = dataclasses.replace(
            again, iterations=solution.iterations + again.iterations, seconds=solution.seconds + again.seconds
        )
        if solution.status not in ("optimal", "feasible"):
            break
    dtype = str(before.dtype).removeprefix("torch.")
    way_out = "raise epsilon, or give the model in a wider dtype"
    if layer.drawn is not None:
        way_out = f"raise max_rows (now {len(layer.drawn[0])} of {layer.rows}), or epsilon"
    return Stored(
        _unstored(solution),
        math.inf,
        budget.promise,
        f"stored in {dtype}, the layer's discrepancy is {discrepancy:.9g}, above the {budget.promise:.9g} promised; expected rounding"
        f"{'' if layer.drawn is None else ', and the rows left out,'} to cost less: {way_out}",
    )


def _solve_within(layer: Layer, budget: Budget, share: float, solver: str, tol: float, max_iter: int | None) -> Solution:
    """The programs again, every budget multiplied by ``share``."""
    starts = layer.dense.split(len(layer.dense) // layer.groups)
    programs = [dataclasses.replace(program, epsilon=(program.epsilon or 0.0) * share) for program in budget.programs]
    pairs = zip(programs, starts, strict=True)
    return stacked([solve(program, solver, tol=tol, max_iter=max_iter, initial=start) for program, start in pairs], tol)


def _store_as_is(matrix: Matrix, layer: Layer, budget: Budget, solution: Solution, tol: float) -> Stored:
    """Write a solution that promises what it leaves: ``√F`` of the stored weights, and what rounding can add to it when the layer is run."""
    before = matrix.as_matrix()
    try:
        layer.write(matrix, solution.weights)
    except ArgumentError as error:
        return Stored(_unstored(solution), math.inf, math.nan, str(error))
    aim = budget.aim if layer.drawn is None else None  # else it is about the rows drawn
    promise, discrepancy, weighed = measure(matrix, layer, partial(distance, layer), aim)
    epsilon = promise.epsilon + rounding(matrix, promise.rows, promise.output_norm, promise.sums_norm)
    if discrepancy <= epsilon:
        stored, objective = layer.read(matrix).to(solution.weights), solution.objective
        misfit = None if aim is None else aim.misfit(stored, weighed)
        if misfit is not None:
            objective = budget.programs[0].value(0.0, misfit)
        elif math.isnan(objective) or not torch.equal(stored, solution.weights):
            blocks = stored.split(len(stored) // len(budget.programs))
            objective = sum(program.objective(block) for program, block in zip(budget.programs, blocks, strict=True))
        gap = relative_gap(objective, solution.lower_bound)
        rounded = dataclasses.replace(solution, objective=objective, gap=gap, status="optimal" if gap <= tol else "feasible")
        return Stored(rounded, discrepancy, epsilon, None, promise)
    matrix.write_back(before)
    reason = f"the stored layer's discrepancy is {discrepancy:.9g}; expected at most {epsilon:.9g}: is the layer what it computes?"
    return Stored(_unstored(solution), math.inf, epsilon, reason)


def _unstored(solution: Solution) -> Solution:
    """A solution of a feasible program that could not be stored: as good as none."""
    return dataclasses.replace(solution, status="iteration_limit")


def _as_stored(solution: Solution, matrix: torch.Tensor, budget: Budget, lower_bound: float, tol: float) -> Solution:
    """The solution as the parameter's dtype holds it, judged against the bound of the budget promised, not of one that left room for rounding."""
    blocks = matrix.to(solution.weights).split(len(matrix) // len(budget.programs))
    objective = sum(program.norm(block) for program, block in zip(budget.programs, blocks, strict=True))
    gap = relative_gap(objective, lower_bound)
    status = "optimal" if gap <= tol else "feasible"
    return dataclasses.replace(solution, objective=objective, lower_bound=lower_bound, gap=gap, status=status)


def _explain(solution: Solution, budget: Budget) -> str:
    """Why a solver has no solution, and what would give one."""
    epsilon, least = budget.epsilon, solution.least_distance
    if solution.status == "infeasible":
        text = f"no weights keep the budget {epsilon:.6g}"
        if least is None or not epsilon:
            return f"{text}; raise it"
        times = f"{least / epsilon:.4g} times as large"
        if budget.inflation is None:
            return f"{text}: the least there can be is {least:.6g}; raise the layer's epsilon to more than {times}"
        squared = f"{(least / epsilon) ** 2:.4g}"
        return f"{text}: the least there can be is {least:.6g}; more than {times} is feasible: raise kappa, or gamma, by a factor above {squared}"
    return (
        f"{solution.solver} found no weights within the budget {epsilon:.6g} in {solution.iterations} iterations (the last exceed a constraint by "
        f"{solution.violation:.3g} of it); raise max_iter or epsilon, or choose another solver"
    )
