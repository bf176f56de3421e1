"""``admm``: the journal paper's algorithm, step by step (Aghasi, Abdi, Romberg, SIAM J. Math. Data Sci. 2020, Algorithm 1).

    min ‖W₂‖₁ + I(W₁)   s.t.  W₁ = A W₃ᵀ,  W₂ = W₃

with ``I`` the indicator of the set, one penalty ρ and scaled multipliers U₁, U₂ (samples are rows here; the paper has the transpose). Three things
differ from the authors' code: over-relaxation (α = 1.7), ρ balanced so that both residuals fall together (Boyd et al., 2011, section 3.4.1), and the
end. Theirs returns the iterate of the last step, which may lie far over the budget; this one stops on both residuals *and* feasibility, brings
the sparse iterate inside the budget on its own support, and otherwise says ``iteration_limit``.

The iteration sees ``A`` by its products alone, so the least squares of step (d) may be by a factorisation (here) or, as in the paper's section on
convolutions, by conjugate gradients (:mod:`nettrim.solvers.cg_admm`).
"""

from __future__ import annotations

import math
import time
from typing import Protocol

import torch
from torch import Tensor

from nettrim.programs import LayerProgram
from nettrim.proximal import shrink_to_ball, soft_threshold
from nettrim.solvers.base import History, Solution, judge, relative_gap
from nettrim.solvers.feasibility import restore_budget

NAME = "admm"
_CHECK_EVERY = 25
_BALANCE = 10.0  # residuals further apart than this factor move ρ


class Products(Protocol):
    """What the iteration asks of ``A``; ``scale`` is the authors' normalisation c₀, by which ``A`` is divided."""

    scale: float

    def forward(self, W: Tensor) -> Tensor:
        """``A Wᵀ``, (P, M)."""

    def least_squares(self, Z: Tensor, S: Tensor, W: Tensor, AW: Tensor) -> tuple[Tensor, Tensor]:
        """``argmin_X ‖A Xᵀ − Z‖² / c₀² + ‖X − S‖²``, (M, N), from ``W``, with ``A Xᵀ``; ``AW`` is ``A Wᵀ``."""

    def restore(self, W: Tensor) -> Tensor | None:
        """The nearest point to ``W`` on its own support that keeps the budget, or None."""


class _Factorised:
    """``A`` in memory, float64: the inverse of ``AᵀA/c₀² + I`` is computed once."""

    def __init__(self, program: LayerProgram, A: Tensor) -> None:
        self._program, self._A = program, A
        self._G = A.T @ A
        # the authors' normalisation: AᵀA/c₀² + I has a moderate condition number
        self.scale = 0.3 * math.sqrt(float(self._G.max())) or 1.0
        identity = torch.eye(len(self._G), dtype=A.dtype, device=A.device)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._G / self.scale**2 + identity))

    def forward(self, W: Tensor) -> Tensor:
        return self._A @ W.T

    def least_squares(self, Z: Tensor, S: Tensor, W: Tensor, AW: Tensor) -> tuple[Tensor, Tensor]:
        found = (Z.T @ self._A / self.scale**2 + S) @ self._inverse
        return found, self.forward(found)

    def restore(self, W: Tensor) -> Tensor | None:
        return restore_budget(self._program, self._G, W)


def refuses(program: LayerProgram) -> str | None:
    if program.streamed:
        return "it needs all rows in memory, and they are streamed"
    if program.floor is not None or program.ceiling is not None:
        return "it takes the ReLU at 0, not at a floor of each neuron, and no ceiling"
    if program.epsilon is None:
        return "the paper's algorithm takes a budget (epsilon=), not a penalty"
    if program.relu and not program.one_sided:
        return "the paper's algorithm takes the paper's set (consistency='paper') or a layer without a ReLU"
    return None


def run(
    program: LayerProgram,
    tol: float,
    max_iter: int,
    initial: Tensor | None,
    *,
    rho: float | None = None,
    relaxation: float = 1.7,
    verify: bool = True,
) -> Solution:
    """Solve a budget program on the paper's set or without a ReLU.

    Parameters
    ----------
    program, tol, max_iter, initial
        As for every solver.
    rho : float, optional
        A fixed penalty, in the authors' scaling (they use 100); by default it starts there and is balanced.
    relaxation : float
        α in (0, 2); the authors' code has 1.
    verify : bool
        False runs exactly ``max_iter`` iterations and judges the sparse iterate as it is: the authors' protocol, for comparisons.
    """
    start = time.perf_counter()
    A, Y, V = program.arrays
    W = torch.zeros(program.shape, dtype=torch.float64, device=A.device) if initial is None else initial.to(A)
    return iterate(program, _Factorised(program, A), Y, V, W, NAME, tol, max_iter, start, rho=rho, relaxation=relaxation, verify=verify)


def iterate(
    program: LayerProgram,
    products: Products,
    Y: Tensor,
    V: Tensor | None,
    W: Tensor,
    name: str,
    tol: float,
    max_iter: int,
    start: float,
    *,
    rho: float | None = None,
    relaxation: float = 1.7,
    verify: bool = True,
) -> Solution:
    """The iteration from ``W`` (M, N), in its precision and that of the targets ``Y`` and bounds ``V`` (P, M); ``start`` is when the solver began.

    The relaxed set is the ball ``‖D‖_F ≤ ε`` in all entries of the residual, where the paper's has a ball on Ω and half-spaces off it.
    """
    assert program.epsilon is not None
    omega = program.l1_weights.to(W)  # type: ignore[union-attr]
    c0, epsilon, W3 = products.scale, program.epsilon, W
    W2, U2 = W3.clone(), torch.zeros_like(W3)
    AW3 = products.forward(W3)
    W1, U1, normal = AW3, torch.zeros_like(AW3), torch.zeros_like(AW3)
    penalty = 100.0 if rho is None else rho
    best: tuple[float, Tensor] = (math.inf, W2)
    bound, iteration, history = 0.0, 0, History()
    for start_from in (torch.zeros_like(W3), W3):
        if verify and program.is_feasible(start_from.to(program.dtype)) and program.norm(start_from) < best[0]:
            best = (program.norm(start_from), start_from.clone())
    while iteration < max_iter and best[0] > 0:
        iteration += 1
        # (a), (b)  W₁: projection of A W₃ᵀ − U₁ on the set: shrink the residual into the ball (on Ω, and cut at V off it)
        B = AW3 - U1
        D = program.residual(B, Y, V)
        inside, _ = shrink_to_ball(torch.where(program.on_support(Y), D, 0.0) if program.one_sided else D, epsilon)
        normal = D - inside
        W1 = B - normal
        # (c)  W₂: soft threshold of W₃ − U₂
        previous = W2
        W2 = soft_threshold(W3 - U2, omega / penalty)
        # (d)  W₃: least squares, with the over-relaxed W₁ and W₂
        H1, H2 = torch.lerp(AW3, W1, relaxation), torch.lerp(W3, W2, relaxation)
        W3, AW3 = products.least_squares(H1 + U1, H2 + U2, W3, AW3)
        # (e)  multipliers
        U1, U2 = U1 + H1 - AW3, U2 + H2 - W3
        if not verify or (iteration % _CHECK_EVERY and iteration != max_iter):
            continue
        primal = math.hypot(float((W1 - AW3).norm()) / c0, float((W2 - W3).norm()))
        primal /= max(float(W1.norm()) / c0, float(W2.norm()), 1e-300)
        dual = float((W2 - previous).norm()) / max(float(U2.norm()), 1e-300)
        if rho is None:
            factor = 2.0 if primal > _BALANCE * dual else 0.5 if dual > _BALANCE * primal else 1.0
            penalty, U1, U2 = penalty * factor, U1 / factor, U2 / factor
        bound = max(bound, program.lower_bound(normal))
        restored = products.restore(W2)
        feasible = restored is not None and program.is_feasible(restored.to(program.dtype))
        if restored is not None and feasible:
            norm = program.norm(restored)
            if abs(norm - bound) < abs(best[0] - bound):
                best = (norm, restored)
        history.note(iteration, best[0], bound)
        if feasible and (relative_gap(best[0], bound) <= tol or max(primal, dual) <= 1e-3 * tol):
            break
    return judge(
        program,
        best[1] if verify and best[0] < math.inf else W2,
        bound if verify else program.lower_bound(normal),
        tol=tol,
        iterations=iteration,
        seconds=time.perf_counter() - start,
        solver=name,
        history=history,
    )
