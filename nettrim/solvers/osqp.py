"""``osqp``: the penalised programs (Net-Trim v1, NIPS 2017, eq. (11)) as a quadratic program a neuron, set up once and updated.

For one neuron, with ``u ≥ |w|`` and a slack ``r`` for every row::

    min  λ ωᵀu + ½‖r‖²   s.t.  −u ≤ w ≤ u,   a_iᵀw − r_i = y_i on Ω,   a_iᵀw − r_i ≤ v_i off Ω

and ``r_i = 0`` off Ω for the paper's set; on the relaxed set the slack off Ω is ``max(a_iᵀw, 0)``. The matrices are the same for every neuron, only
the bounds change: one factorisation, and each neuron starts from the last one's solution.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from nettrim.programs import LayerProgram
from nettrim.solvers.base import Solution, exact_zero, judge, unit_scale

NAME = "osqp"


def refuses(program: LayerProgram) -> str | None:
    if program.streamed:
        return "it needs all rows in memory, and they are streamed"
    if program.floor is not None or program.ceiling is not None:
        return "it takes the ReLU at 0, not at a floor of each neuron, and no ceiling"
    if program.epsilon is not None:
        return "it takes quadratic programs, and a budget (epsilon=) is a second-order cone; pass regularization= instead"
    return None


def run(program: LayerProgram, tol: float, max_iter: int, initial: Tensor | None) -> Solution:
    """Neuron after neuron; ``iterations`` is their sum, and the multipliers of the rows are the dual point."""
    import osqp
    from scipy import sparse

    start = time.perf_counter()
    assert program.regularization is not None
    A, Y, V, scale, column = unit_scale(program)
    inside = program.omega.cpu().numpy()
    (M, N), P = program.shape, program.rows
    weights = np.broadcast_to(program.l1_weights.double().cpu().numpy(), (M, N)) / column * (program.regularization / scale**2)  # type: ignore[union-attr]
    eye, zero = sparse.identity(N), sparse.csc_matrix((P, N))
    quadratic = sparse.block_diag([sparse.csc_matrix((2 * N, 2 * N)), sparse.identity(P)], format="csc")
    matrix = sparse.bmat(
        [
            [eye, -eye, None],
            [eye, eye, None],
            [sparse.csc_matrix(A), zero, -sparse.identity(P)],
            [None, None, sparse.identity(P)],
        ],
        format="csc",
    )
    W, theta = np.zeros((M, N)), np.zeros((P, M))
    iterations = 0
    solver = osqp.OSQP()
    for m in range(M):
        on = inside[:, m]
        lower = np.concatenate([np.full(N, -np.inf), np.zeros(N), np.where(on, Y[:, m], -np.inf), np.full(P, -np.inf)])
        upper = np.concatenate([np.zeros(N), np.full(N, np.inf), np.where(on, Y[:, m], V[:, m]), np.full(P, np.inf)])
        if program.one_sided:
            lower[2 * N + P :][~on] = upper[2 * N + P :][~on] = 0.0
        linear = np.concatenate([np.zeros(N), weights[m], np.zeros(P)])
        if m == 0:
            accuracy = max(min(1e-2 * tol, 1e-5), 1e-9)
            solver.setup(
                P=quadratic,
                q=linear,
                A=matrix,
                l=lower,
                u=upper,
                verbose=False,
                eps_abs=accuracy,
                eps_rel=accuracy,
                max_iter=max_iter,
                polishing=True,
            )
        else:
            solver.update(q=linear, l=lower, u=upper)
        if initial is not None:
            w = initial[m].double().cpu().numpy() * column
            solver.warm_start(x=np.concatenate([w, np.abs(w), A @ w - np.where(on, Y[:, m], np.minimum(A @ w, V[:, m]))]))
        result = solver.solve(raise_error=False)
        iterations += int(result.info.iter)
        if np.isfinite(result.x).all():
            # |w| below the polished u is an interior point's way of saying zero
            w, u = result.x[:N], result.x[N : 2 * N]
            W[m] = np.where(np.abs(w) > 1e-7 * max(np.abs(u).max(), 1e-300), w, 0.0)
            theta[:, m] = result.y[2 * N : 2 * N + P] * scale
    found = exact_zero(program, torch.from_numpy(W / column).to(program.device))
    bound = program.lower_bound(torch.from_numpy(theta).to(program.device))
    return judge(program, found, bound, tol=tol, iterations=iterations, seconds=time.perf_counter() - start, solver=NAME)
