"""What every solver returns, and the one judge that fills it in: figures in float64 on the true data, one status vocabulary."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nettrim import sharing
from nettrim.programs import LayerProgram
from nettrim.residual import Measures

_ONE_THREAD_WORK = 2e7
_POINTS = 64  # kept of a solve: enough for a curve, whatever the number of iterations
STATUSES = ("optimal", "feasible", "infeasible", "iteration_limit")


class HistoryPoint(NamedTuple):
    """What a solver knew after some of its iterations.

    Attributes
    ----------
    iteration : int
    seconds : float
        Since the solver started.
    objective : float
        Of the best feasible weights met so far; infinite before there are any.
    lower_bound : float
        The best one proven so far.
    """

    iteration: int
    seconds: float
    objective: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """As in `Solution`."""
        return relative_gap(self.objective, self.lower_bound)


@dataclass
class History:
    """A solve as it goes on: its points, thinned out where there are many. Nothing is computed for it."""

    began: float = field(default_factory=time.perf_counter)
    points: list[HistoryPoint] = field(default_factory=list)
    noted: int = 0
    every: int = 1  # that is kept; the last one is kept until the next one comes

    def note(self, iteration: int, objective: float, lower_bound: float) -> None:
        if self.noted and (self.noted - 1) % self.every:
            self.points.pop()
        self.points.append(HistoryPoint(iteration, time.perf_counter() - self.began, objective, lower_bound))
        if self.noted % self.every == 0 and len(self.points) == _POINTS - 1:
            self.points = self.points[::2]  # an odd number: the first and the last stay
            self.every *= 2
        self.noted += 1


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights, and what is proven about them.

    Attributes
    ----------
    weights : Tensor, (M, N)
        In the program's dtype and on its device.
    status : {"optimal", "feasible", "infeasible", "iteration_limit"}
        ``optimal``: feasible, and the gap is proven to be at most ``tol``. ``feasible``: the constraints hold, the gap is larger.
        ``infeasible``: no weights satisfy the constraints, or only ones a thousand times as large as those that come nearest
        (``least_distance`` says how near). ``iteration_limit``: stopped before a feasible point was found.
    objective : float
        ``Σ ω|w|`` (budget) or ``λ Σ ω|w| + ½ misfit`` (penalised).
    lower_bound : float
        No feasible weights have an objective below it (weak duality; for the paper's set, none that meet ``z ≤ v`` exactly).
    gap : float
        ``|objective − lower_bound| / objective``; infinite where there is no feasible point.
    discrepancy : float
        ``‖relu(A Wᵀ) − Y‖_F`` (without the ReLU for ``activation=None``).
    violation : float
        Largest relative excess over a constraint.
    iterations : int
    seconds : float
    solver : str
    least_distance : float or None
        For an infeasible program, the ``‖D‖_F`` of the weights that come nearest, to 0.1 %: a budget ``epsilon`` above it is feasible.
    history : tuple of HistoryPoint
        How objective and bound came together, at most 64 points; of ``topk_admm``, how the number of weights fell. Empty for solvers that say
        nothing on the way, and for blocks or groups of neurons.
    """

    weights: Tensor
    status: str
    objective: float
    lower_bound: float
    gap: float
    discrepancy: float
    violation: float
    iterations: int
    seconds: float
    solver: str
    least_distance: float | None = None
    history: tuple[HistoryPoint, ...] = ()


@dataclass(frozen=True)
class Solver:
    """A solver by name: what it refuses, and how it is called.

    ``refuses(program)`` is the reason why the solver does not take a program, or None. ``run(program, tol, max_iter, initial)`` solves it;
    ``default_max_iter`` is the iteration limit where the caller gives none; ``drops_dead_inputs`` that it needs no copy of the rows without them.
    """

    name: str
    refuses: Callable[[LayerProgram], str | None]
    run: Callable[[LayerProgram, float, int, Tensor | None], Solution]
    default_max_iter: int
    drops_dead_inputs: bool = False


@dataclass
class Best:
    """The best feasible point (None: no weights yet, or 0), what the rows say of it if they were asked, and the best bound met so far."""

    W: Tensor | None
    objective: float
    bound: float
    measures: Measures | None = None
    history: History = field(default_factory=History)

    @property
    def gap(self) -> float:
        return relative_gap(self.objective, self.bound)

    def note(self, iteration: int) -> None:
        """Write down where the solve is."""
        self.history.note(iteration, self.objective, self.bound)


def relative_gap(objective: float, lower_bound: float) -> float:
    """``|objective − lower_bound| / objective``, 0 when both are 0.

    An objective below the bound is no better than one above it: one-sided constraints are met to a tolerance, and what it buys counts here.
    """
    if not math.isfinite(objective):
        return math.inf
    return abs(objective - lower_bound) / objective if objective > 0 else 0.0 if lower_bound == 0 else math.inf


@contextlib.contextmanager
def threads_for(work: float) -> Iterator[None]:
    """One thread for small matrices, ``work`` being that of a product of them (P·N·M).

    More gain little there, and where other processes want the cores too they wait for each other, a hundredfold.
    """
    if sharing.thread_count() == 1 or work >= _ONE_THREAD_WORK:
        yield
        return
    with sharing.one_thread():
        yield


def unit_scale(program: LayerProgram) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray]:
    """``A/(s c)``, ``Y/s``, ``V/s`` (zeros where there is none) as float64 arrays, ``s = max|y|`` and ``c`` (N,).

    For solvers with absolute tolerances: W is unchanged when A, Y, V and ε are divided by one number, and λ by its square. ``c`` then gives columns
    of unit mean square: ``W c`` is solved for, with the ℓ1 weights ``ω/c``.
    """
    A, Y, V = program.arrays
    scale = float(Y.abs().max()) or 1.0
    upper = torch.zeros_like(Y) if V is None else V
    norms = A.norm(dim=0)
    column = torch.where(norms > 0, norms / (scale * math.sqrt(program.rows)), 1.0)
    return (A / column / scale).cpu().numpy(), (Y / scale).cpu().numpy(), (upper / scale).cpu().numpy(), scale, column.cpu().numpy()


def exact_zero(program: LayerProgram, W: Tensor) -> Tensor:
    """0 where it is feasible and no worse than ``W``, else ``W``: numbers of 1e-13 are how some solvers write it."""
    zero = torch.zeros_like(W)
    return zero if program.is_feasible(zero) and program.objective(zero) <= program.objective(W) else W


def judge(
    program: LayerProgram,
    W: Tensor,
    lower_bound: float,
    *,
    tol: float,
    iterations: int,
    seconds: float,
    solver: str,
    infeasible: bool = False,
    least_distance: float | None = None,
    measures: Measures | None = None,
    history: History | None = None,
) -> Solution:
    """The solution that ``W`` (M, N) is, every figure computed in float64 by the program itself, unless its ``measures`` of W are at hand."""
    W = W.detach().to(program.device, program.dtype)
    measures = measures or program.measure(W)
    objective = program.value(program.norm(W), program.misfit_of(measures))
    excess = program.excess(W)
    feasible = excess == 0 and program.feasible_by(measures)
    gap = relative_gap(objective, lower_bound) if feasible else math.inf
    if feasible:
        status = "optimal" if gap <= tol else "feasible"
    else:
        status = "infeasible" if infeasible else "iteration_limit"
    return Solution(
        weights=W,
        status=status,
        objective=objective,
        lower_bound=lower_bound,
        gap=gap,
        discrepancy=measures.discrepancy,
        violation=max(excess, program.violation_of(measures)),
        iterations=iterations,
        seconds=seconds,
        solver=solver,
        least_distance=least_distance,
        history=() if history is None else tuple(history.points),
    )


def stacked(solutions: list[Solution], tol: float) -> Solution:
    """The solutions of programs of some neurons each as one: weights one below the other, figures of all together, the worst status."""
    if len(solutions) == 1:
        return solutions[0]
    objective, bound = sum(s.objective for s in solutions), sum(s.lower_bound for s in solutions)
    status = next((status for status in ("infeasible", "iteration_limit") if any(s.status == status for s in solutions)), None)
    gap = relative_gap(objective, bound) if status is None else math.inf
    least = [s.least_distance if s.least_distance is not None else s.discrepancy for s in solutions]
    return dataclasses.replace(
        solutions[0],
        weights=torch.cat([s.weights for s in solutions]),
        status=status or ("optimal" if gap <= tol else "feasible"),
        objective=objective,
        lower_bound=bound,
        gap=gap,
        discrepancy=math.hypot(*(s.discrepancy for s in solutions)),
        violation=max(s.violation for s in solutions),
        iterations=sum(s.iterations for s in solutions),
        seconds=sum(s.seconds for s in solutions),
        least_distance=math.hypot(*least) if status == "infeasible" else None,
        history=(),  # they ran one after the other
    )
