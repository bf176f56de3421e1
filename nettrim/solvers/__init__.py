"""The solvers by name, behind one contract: a program in, a :class:`Solution` out."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from nettrim.errors import ArgumentError, UnsupportedProgramError
from nettrim.programs import LayerProgram
from nettrim.rows import as_rows
from nettrim.solvers import admm, blocks, cg_admm, cvxpy, gram_admm, osqp, prox_admm, topk_admm
from nettrim.solvers.base import STATUSES, HistoryPoint, Solution, Solver, judge, threads_for
from nettrim.solvers.presolve import presolve
from nettrim.surroundings import left_out

__all__ = ["SOLVERS", "STATUSES", "HistoryPoint", "Solution", "Solver", "check_solver", "solve"]

SOLVERS: dict[str, Solver] = {
    prox_admm.NAME: Solver(prox_admm.NAME, prox_admm.refuses, prox_admm.run, 5000, drops_dead_inputs=True),
    gram_admm.NAME: Solver(gram_admm.NAME, gram_admm.refuses, gram_admm.run, 5000),
    admm.NAME: Solver(admm.NAME, admm.refuses, admm.run, 5000),
    cg_admm.NAME: Solver(cg_admm.NAME, cg_admm.refuses, cg_admm.run, 5000),
    osqp.NAME: Solver(osqp.NAME, osqp.refuses, osqp.run, 20000),
    cvxpy.NAME: Solver(cvxpy.NAME, cvxpy.refuses, cvxpy.run, 200),
    topk_admm.NAME: Solver(topk_admm.NAME, topk_admm.refuses, topk_admm.run, 100),
}


def check_solver(name: str) -> None:
    """Refuse a name that is no solver's.

    Raises
    ------
    ArgumentError
        It is neither ``"auto"`` nor a key of :data:`SOLVERS`.
    """
    if name != "auto" and name not in SOLVERS:
        raise ArgumentError(f"solver={name!r}; expected 'auto' or one of {', '.join(map(repr, SOLVERS))}")


def _choose(name: str, program: LayerProgram) -> Solver:
    """The solver called ``name``; for ``"auto"`` the one measured to be fastest for the kind of program (docs/solvers.md)."""
    check_solver(name)
    if name == "auto":
        name = topk_admm.NAME if program.supports is not None else prox_admm.NAME if program.relu else gram_admm.NAME
        if program.one_sided and program.streamed and cg_admm.refuses(program) is None:
            name = cg_admm.NAME  # slower than the others, which don't take the papers' set of rows that are not held
    return SOLVERS[name]


def _refusal(solver: Solver, program: LayerProgram) -> str | None:
    """Why a solver does not take a program, or None."""
    if program.supports is not None and solver.name != topk_admm.NAME:
        return "it is for convex programs"
    return solver.refuses(program)


def _by_convex_program(program: LayerProgram, none: Solution, tol: float, start: Tensor | None) -> Solution:
    """What the ℓ1 program says of a budget for which no support was found: that there is none, or weights within it."""
    convex = solve(dataclasses.replace(program, penalty="l1"), tol=tol, initial=start)
    iterations, seconds = none.iterations + convex.iterations, none.seconds + convex.seconds
    if convex.status == "infeasible":
        return dataclasses.replace(convex, iterations=iterations, seconds=seconds)
    return judge(program, convex.weights, 0.0, tol=tol, iterations=iterations, seconds=seconds, solver=convex.solver)


@left_out()
def solve(
    program: LayerProgram,
    solver: str = "auto",
    *,
    tol: float = 1e-4,
    max_iter: int | None = None,
    initial: Tensor | np.ndarray | None = None,
    neurons: int | None = None,
    executor: Executor | None = None,
) -> Solution:
    """Solve a layer program.

    Parameters
    ----------
    program : LayerProgram
        What to solve; (P, N) inputs, (P, M) targets.
    solver : str
        ``"auto"`` (one of the next two), ``"prox_admm"`` (every program), ``"gram_admm"`` (no ReLU: one pass over the rows), ``"admm"`` (the
        journal paper's: budgets, paper's set or no ReLU), ``"cg_admm"`` (the same on a :class:`nettrim.operators.Convolution`), ``"osqp"``
        (penalised programs) or ``"cvxpy"`` (every convex program, by Clarabel: slow, the oracle). ``"topk_admm"`` takes those that are not convex
        (``nonzeros=``, ``penalty="l0"``), and so does ``"auto"`` then.
    tol : float
        Relative duality gap at which the solution is called optimal.
    max_iter : int, optional
        Iteration limit; each solver has its own default.
    initial : Tensor or ndarray, (M, N), optional
        Where to start. A feasible start is also the answer of last resort.
    neurons : int, optional
        Solve for at most so many neurons at a time. What a solve holds beside the program is about four matrices of P × neurons; all neurons at
        once are faster.
    executor : concurrent.futures.Executor, optional
        Where to solve blocks of ``neurons`` side by side. A program that is streamed cannot leave its process: give threads.

    Returns
    -------
    Solution

    Raises
    ------
    ArgumentError
        Unknown solver, ``tol``, ``max_iter`` or ``neurons`` out of range, ``initial`` of another shape or not finite, an executor without blocks.
    UnsupportedProgramError
        The solver does not take this kind of program; the message names those that do.
    """
    chosen = _choose(solver, program)
    if not (isinstance(tol, (int, float)) and math.isfinite(tol) and tol > 0):
        raise ArgumentError(f"tol={tol!r}; expected a finite number above 0")
    for what, count in (("max_iter", max_iter), ("neurons", neurons)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ArgumentError(f"{what}={count!r}; expected a whole number, at least 1")
    if executor is not None and neurons is None:
        raise ArgumentError("executor was given without neurons; expected how many of them it solves for at a time")
    start = None if initial is None else as_rows(initial, "initial", torch.empty(0, dtype=program.dtype, device=program.device))
    if start is not None and tuple(start.shape) != program.shape:
        raise ArgumentError(f"initial has shape {tuple(start.shape)}; expected (M, N) = {program.shape}")
    reason = _refusal(chosen, program)
    if reason is not None:
        able = [name for name, other in SOLVERS.items() if _refusal(other, program) is None]
        raise UnsupportedProgramError(
            f"solver={chosen.name!r} does not take a {program.description}: {reason}. These do: {', '.join(able)}"
        )
    if neurons is not None and neurons < program.shape[0]:
        reason = blocks.refuses(program)
        if reason is not None:
            raise UnsupportedProgramError(f"neurons={neurons}: blocks of neurons don't do for a {program.description}: {reason}")
        return blocks.run(program, solve, solver, float(tol), max_iter, start, neurons, executor)
    smaller = presolve(program, inputs_too=not chosen.drops_dead_inputs)
    inside = None if start is None else smaller.restrict(start)
    with threads_for(smaller.program.rows * smaller.program.shape[0] * smaller.program.shape[1]):
        solution = chosen.run(smaller.program, float(tol), max_iter or chosen.default_max_iter, inside)
    if solution.status == "iteration_limit" and program.supports is not None and program.epsilon is not None and program.support is None:
        solution = _by_convex_program(smaller.program, solution, float(tol), inside)
    if inside is not None and not math.isfinite(solution.gap) and smaller.program.is_feasible(inside):
        # the answer of last resort, for solvers that have no use for a start
        spent, known = (solution.iterations, solution.seconds), solution.history
        solution = judge(
            smaller.program, inside, solution.lower_bound, tol=float(tol), iterations=spent[0], seconds=spent[1], solver=solution.solver
        )
        solution = dataclasses.replace(solution, history=known)
    return dataclasses.replace(solution, weights=smaller.expand(solution.weights))
