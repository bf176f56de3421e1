"""``cvxpy``: every program as the papers write it, handed to a conic solver (Clarabel unless told otherwise). The oracle of the tests."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettrim import sharing
from nettrim.programs import LayerProgram
from nettrim.solvers.base import Solution, exact_zero, judge, unit_scale
from nettrim.solvers.feasibility import restore_budget

NAME = "cvxpy"
NEGLIGIBLE = 1e-6  # of the largest weight


def refuses(program: LayerProgram) -> str | None:
    return "it needs all rows in memory, and they are streamed" if program.streamed else None


def run(program: LayerProgram, tol: float, max_iter: int, initial: Tensor | None, *, backend: str = "CLARABEL") -> Solution:
    """Solve by ``backend``; the multipliers of its rows are the dual point. ``initial`` is of no use to an interior-point method."""
    import cvxpy as cp

    start = time.perf_counter()
    A, Y, V, scale, column = unit_scale(program)
    omega = program.l1_weights.double().cpu().numpy() / column  # type: ignore[union-attr]
    inside = program.omega.cpu().numpy()
    W, R = cp.Variable(program.shape), cp.Variable(Y.shape)  # R: the residual D, or more off Ω
    Z = A @ W.T
    high = ~inside & (np.full_like(inside, False) if program.ceiling is None else Y >= program.ceiling.double().cpu().numpy() / scale)
    low = ~inside & ~high
    on, off, over = R[inside] == Z[inside] - Y[inside], R[low] >= Z[low] - V[low], R[high] <= Z[high] - Y[high]
    constraints: list[Any] = [on, *([off] if low.any() else []), *([over] if high.any() else [])]
    if program.one_sided:
        constraints.append(R[low] <= 0)
    norm = cp.sum(cp.multiply(np.broadcast_to(omega, program.shape), cp.abs(W)))
    misfit = cp.vec(R, order="F") if not program.one_sided else R[inside]
    if program.epsilon is not None:
        constraints.append(cp.norm(misfit, 2) <= program.epsilon / scale)
        problem = cp.Problem(cp.Minimize(norm / (omega.max() or 1.0)), constraints)
    else:
        assert program.regularization is not None
        problem = cp.Problem(cp.Minimize(program.regularization / scale**2 * norm + 0.5 * cp.sum_squares(misfit)), constraints)
    with sharing.quiet(Warning):  # inaccuracy is judged from the solution itself, below
        try:
            problem.solve(solver=backend, **(_clarabel_options(tol, max_iter) if backend == "CLARABEL" else {}))
        except cp.error.SolverError:
            pass
    found = W.value if W.value is not None else np.zeros(program.shape)
    negligible = np.abs(found) <= NEGLIGIBLE * np.abs(found).max()
    candidates = [torch.from_numpy(w / column).to(program.device) for w in (np.where(negligible, 0.0, found), found)]
    bound = 0.0
    if W.value is not None and on.dual_value is not None:
        # the sign convention of an equality's multiplier is the modelling language's: the wrong one proves nothing
        theta = np.zeros_like(Y)
        if low.any():
            theta[low] = off.dual_value
        if high.any():
            theta[high] = -over.dual_value
        for sign in (1.0, -1.0):
            theta[inside] = sign * on.dual_value
            bound = max(bound, program.lower_bound(torch.from_numpy(theta).to(program.device)))
    iterations = problem.solver_stats.num_iters if problem.solver_stats is not None else 0
    return judge(
        program,
        exact_zero(program, _inside(program, candidates)),
        bound,
        tol=tol,
        iterations=int(iterations or 0),
        seconds=time.perf_counter() - start,
        solver=NAME,
        infeasible=problem.status in ("infeasible", "infeasible_inaccurate"),
    )


def _clarabel_options(tol: float, max_iter: int) -> dict[str, Any]:
    accuracy = min(1e-10, 1e-4 * tol)
    return {"max_iter": max_iter, "tol_gap_abs": accuracy, "tol_gap_rel": accuracy, "tol_feas": accuracy}


def _inside(program: LayerProgram, candidates: list[Tensor]) -> Tensor:
    """The first candidate that is inside the constraints, or can be brought there on its own support; else the last as it is.

    Interior-point answers hold no exact zero, and keep constraints to about 1e-8 only: what is negligible is dropped first, and what is missing is
    made up by the restricted least-squares step.
    """
    A = program.arrays[0]
    for candidate in candidates:
        if not program.is_feasible(candidate.to(program.dtype)) and program.epsilon is not None:
            restored = restore_budget(program, A.T @ A, candidate.to(A))
            candidate = candidate if restored is None else restored
        if program.is_feasible(candidate.to(program.dtype)):
            return candidate
    return candidates[-1]
