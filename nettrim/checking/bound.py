"""A lower bound of the verifier's own on a layer's optimum, and a feasible point of its own beside it: what can prove a stated bound, or refute it.

No dual point is stored in a report (it is as large as the layer's outputs). But at the optimum it is ``τ D``, a multiple of the residual, so weights
that are near the optimum lead to one. From the stored weights the penalised problem

    min Σ ω|w| + ½ τ Σ_Ω (z − y)² + ½ τ Σ_{Ωᶜ} max(z, 0)²

is solved to the end by Newton steps on each neuron's support, ``τ`` being moved until the budget is used up. Whatever the weights are by then,
``θ = τ D``, scaled into ``|Aᵀθ| ≤ ω``, bounds the optimum from below (weak duality, docs/method.md), and weights within the budget from above.
For the paper's set the constraints ``z ≤ v`` off Ω have multipliers of their own, found by the augmented Lagrangian:
``½ max(u + ρ(z − v), 0)²/ρ`` takes the place of the last term, and what is squared there is the next ``u``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nettrim.checking.streams import Array

_OUTER = 25  # values of τ
_INNER = 20  # Newton steps at each, for every neuron that still needs them
_ROUNDS = 12  # of multipliers at each
_KKT = 1e-8  # a neuron's largest breach of the optimality conditions, relative
_EXACT = 1e-12  # relative, of the budget that is used up
_SHIFTS = (1e-14, 1e-8, 1e-4, 1e-1, 10.0)  # of the diagonal
_STEPS = tuple(0.5**k for k in range(14))
_WORTH = 1e-4  # of the decrease that the slope promises: what a step must bring
_SUMS = 1e-15  # relative rounding of an objective
_TINY = 1e-9  # of the largest weight: what counts as zero where a step would change its sign
_INACTIVE = 1e-3  # of what the curvature would be with every row active
_NOTHING = 1e-11  # a cosine below it is rounding


@dataclass(frozen=True, eq=False)
class Bound:
    """Between ``lower`` and ``upper`` lies the optimum; ``slope`` is how much a budget larger by 1 lowers it.

    ``theta`` (P, M) is the dual point that proves the first (to rounding), ``weights`` (M, N) are the last ones met.
    """

    lower: float
    upper: float
    slope: float
    theta: Array
    weights: Array


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer's program with a budget.

    Attributes
    ----------
    A : Array, (P, N)
    Y : Array, (P, M)
    omega : Array, (N,)
    epsilon : float
    relu : bool
    V : Array or None, (P, M)
        Of the paper's set.
    """

    A: Array
    Y: Array
    omega: Array
    epsilon: float
    relu: bool
    V: Array | None

    def scaled(self) -> tuple[Problem, Array, float]:
        """The same program and optimum in units of the largest target, every ``ω`` 1 or 0; what weights are then multiplied with, and that unit."""
        unit = float(np.abs(self.Y).max(initial=0.0)) or 1.0
        sizes = np.linalg.norm(self.A / unit, axis=0)
        columns = np.where(self.omega > 0, self.omega, np.where(sizes > 0, sizes, 1.0))
        V = None if self.V is None else self.V / unit
        omega = (self.omega > 0).astype(np.float64)
        return Problem(self.A / unit / columns, self.Y / unit, omega, self.epsilon / unit, self.relu, V), columns, unit


def bound(problem: Problem, start: Array, *, stated: float, penalty: float | None = None) -> Bound:
    """The verifier's own bounds on the optimum, from weights ``start`` (M, N); it stops as soon as they prove or refute the ``stated`` lower one.

    With a ``penalty`` ``λ`` the program is ``min λ Σ ω|w| + ½ · misfit`` instead: then ``theta`` and ``weights`` are what is found, and no bounds are
    kept.
    """
    with np.errstate(all="ignore"):
        scaled, columns, unit = problem.scaled()
        ascent = _Ascent(scaled, start * columns)
        if penalty is None:
            ascent.run(stated)
            theta = ascent.best
        else:
            ascent.tau = unit * unit / penalty
            ascent.rho = 10 * ascent.tau
            ascent.meet(math.inf)
            theta = penalty * ascent.theta(scaled.A @ ascent.W.T)
            ascent.lower, ascent.upper = 0.0, math.inf
    return Bound(ascent.lower, ascent.upper, ascent.slope / unit, theta / unit, ascent.W / columns)


class _Ascent:
    def __init__(self, problem: Problem, W: Array) -> None:
        self.problem = problem
        self.squares = np.square(problem.A).sum(0)
        self.W = np.where(self.squares > 0, W, 0.0)
        self.on = problem.Y > 0 if problem.relu else np.ones_like(problem.Y, dtype=bool)
        self.gram = None if problem.relu else problem.A.T @ problem.A
        self.u = np.zeros_like(problem.Y) if problem.V is not None else None
        self.tau, self.rho = 1.0, 1.0
        self.lower, self.upper, self.slope = 0.0, math.inf, 0.0
        self.best = np.zeros_like(problem.Y)

    # -- the problem at one τ --------------------------------------------------------------------------------------------------

    def theta(self, Z: Array) -> Array:
        """The derivative of the misfit by ``Z``: the dual point."""
        problem = self.problem
        on = self.tau * (Z - problem.Y)
        if not problem.relu:
            return on
        if self.u is None:
            return np.where(self.on, on, self.tau * np.maximum(Z, 0.0))
        assert problem.V is not None
        return np.where(self.on, on, np.maximum(self.u + self.rho * (Z - problem.V), 0.0))

    def value(self, m: int, w: Array, z: Array) -> float:
        """What is minimised, of one neuron."""
        theta = self._theta_of(m, z)
        on = self.on[:, m]
        curvature = self.tau if self.u is None else self.rho
        smooth = float(np.square(theta[on]).sum()) / self.tau + float(np.square(theta[~on]).sum()) / curvature
        return float((self.problem.omega * np.abs(w)).sum()) + 0.5 * smooth

    def _theta_of(self, m: int, z: Array) -> Array:
        on = self.tau * (z - self.problem.Y[:, m])
        if not self.problem.relu:
            return on
        if self.u is None:
            return np.where(self.on[:, m], on, self.tau * np.maximum(z, 0.0))
        assert self.problem.V is not None
        return np.where(self.on[:, m], on, np.maximum(self.u[:, m] + self.rho * (z - self.problem.V[:, m]), 0.0))

    def newton(self, m: int, gradient: Array, theta: Array) -> None:
        """One step for neuron ``m`` within an orthant, on its support and the inputs that want to join it."""
        A, omega, w = self.problem.A, self.problem.omega, self.W[m]
        slope = _slope(w, gradient, omega)
        joins = (w == 0) & (slope != 0)
        most = max(16, int((w != 0).sum()))
        if joins.sum() > most:  # the worst first
            joins &= np.abs(slope) >= np.partition(np.abs(slope[joins]), -most)[-most]
        S = np.flatnonzero((w != 0) | joins)
        if not S.size:
            return
        if self.gram is not None:
            H = self.tau * self.gram[np.ix_(S, S)]
        else:
            curvature = np.where(self.on[:, m], self.tau, np.where(theta > 0, self.tau if self.u is None else self.rho, 0.0))
            rows = np.flatnonzero(curvature)
            B = A[np.ix_(rows, S)] * np.sqrt(curvature[rows])[:, None]
            H = B.T @ B
            # an input that hardly any active row has would ask for an endless step, over rows that are not active yet
            np.fill_diagonal(H, np.maximum(H.diagonal(), _INACTIVE * max(self.tau, self.rho if self.u is not None else 0.0) * self.squares[S]))
        sign = np.where(w[S] != 0, np.sign(w[S]), -np.sign(slope[S]))
        free = omega[S] == 0
        z = A[:, S] @ w[S]
        before = self.value(m, w, z)
        tiny = np.abs(w[S]) <= _TINY * float(np.abs(w).max(initial=0.0))
        for shift in _SHIFTS:  # Newton's step; where that leads nowhere (collinear inputs), ever more a gradient's
            direction, inside = np.zeros(len(S)), np.ones(len(S), dtype=bool)
            for _ in range(len(S)):
                direction[:] = 0.0
                direction[inside] = -_solve(H[np.ix_(inside, inside)], slope[S][inside], shift)
                leaves = inside & tiny & (direction * sign < 0) & ~free  # would leave the orthant at once
                if not leaves.any():
                    break
                inside &= ~leaves
            expected = -float((slope[S] * direction).sum())
            if not (math.isfinite(expected) and expected > 0):
                continue
            crosses = (direction * sign < 0) & ~free & inside
            first = float((np.abs(w[S]) / np.abs(direction))[crosses].min()) if crosses.any() else 1.0
            for step in (*_STEPS, first):  # to the first weight that becomes zero: what the slope promises holds until there
                moved = w[S] + step * direction
                moved[((moved * sign <= 0) | (tiny & ~inside) | (crosses & (np.abs(moved) <= 1e-12 * np.abs(w[S])))) & ~free] = 0.0
                tried = w.copy()
                tried[S] = moved
                if before - self.value(m, tried, A[:, S] @ moved) > _WORTH * step * expected - _SUMS * before:
                    self.W[m] = tried
                    return

    def descend(self, stated: float) -> bool:
        """Newton steps for all neurons that need them, every ``θ`` on the way tried as a bound; whether none needs one any more."""
        A, omega = self.problem.A, self.problem.omega
        sizes = np.sqrt(self.squares)
        for _ in range(_INNER):
            theta = self.theta(A @ self.W.T)
            gradient = theta.T @ A
            self.prove(theta, gradient)
            if self.lower >= stated:
                return True
            reach = omega + 1e-5 * np.outer(np.linalg.norm(theta, axis=0), sizes)
            slopes = np.stack([_slope(w, g, omega) for w, g in zip(self.W, gradient, strict=True)])
            worst = (np.abs(slopes) / np.maximum(reach, 1e-300)).max(1)
            busy = np.flatnonzero(worst > _KKT)
            if not busy.size:
                return True
            for m in busy:
                self.newton(int(m), gradient[m], theta[:, m])
        return False

    # -- what a point proves ---------------------------------------------------------------------------------------------------

    def prove(self, theta: Array, gradient: Array) -> None:
        """Keep the bound that ``θ`` proves, scaled neuron by neuron into ``|Aᵀθ| ≤ ω``, if it is the best so far."""
        problem = self.problem
        free = problem.omega == 0
        if free.any():
            theta, gradient = self._orthogonal(theta, free)
        linear = -(np.where(self.on, theta, 0.0) * problem.Y).sum(0)
        if problem.V is not None:
            linear -= np.where(self.on, 0.0, theta * problem.V).sum(0)
        counted = np.where(self.on, theta, 0.0) if problem.V is not None else theta
        square = np.square(counted).sum(0)
        reach = np.outer(np.linalg.norm(theta, axis=0), np.linalg.norm(problem.A, axis=0))
        worst = np.max(np.abs(gradient[:, ~free]) / problem.omega[~free], axis=1, initial=1e-300)
        broken = (np.abs(gradient[:, free]) > _NOTHING * reach[:, free]).any(1)
        largest = np.where(broken, 0.0, 1.0 / np.maximum(worst, 1e-300))
        for scale in (np.minimum(largest, 1.0), np.full_like(largest, largest.min())):
            usable = scale[scale > 0]
            if not usable.size:
                continue
            scale = scale * min(float((largest[scale > 0] / usable).min()), 1e6)  # a common factor keeps what is linear in it
            size = math.sqrt(float((np.square(scale) * square).sum()))
            value = float((scale * linear).sum()) - problem.epsilon * size
            if math.isfinite(value) and value > self.lower:
                self.lower, self.slope, self.best = value, size, theta * scale

    def _orthogonal(self, theta: Array, free: Array) -> tuple[Array, Array]:
        """``θ`` changed on Ω until the columns without a penalty are orthogonal to it."""
        theta = theta.copy()
        B = self.problem.A[:, free]
        for m in range(theta.shape[1]):
            rows = self.on[:, m]
            inside = B[rows]
            shift = np.linalg.lstsq(inside.T @ inside, B.T @ theta[:, m], rcond=None)[0]
            theta[rows, m] -= inside @ shift
        return theta, theta.T @ self.problem.A

    def accept(self, Z: Array) -> float:
        """The misfit that the budget is for; weights within it bound the optimum from above."""
        problem = self.problem
        D = np.where(self.on, Z - problem.Y, np.maximum(Z - (0.0 if problem.V is None else problem.V), 0.0))
        on = float(np.square(D[self.on]).sum())
        off = float(np.square(D[~self.on]).sum())
        misfit = on if problem.V is not None else on + off
        if misfit <= problem.epsilon**2 and (problem.V is None or off == 0):
            self.upper = min(self.upper, float((problem.omega * np.abs(self.W)).sum()))
        return misfit

    # -- the search for τ -----------------------------------------------------------------------------------------------------

    def _first_tau(self) -> float:
        """The multiplier that the optimality conditions of the start come nearest to."""
        theta = self.theta(self.problem.A @ self.W.T)
        if self.u is not None:
            theta = np.where(self.on, theta, 0.0)
        gradient, signs = theta.T @ self.problem.A, self.problem.omega * np.sign(self.W)
        support = signs != 0
        square = float(np.square(gradient[support]).sum())
        tau = -float((signs * gradient)[support].sum()) / square if square > 0 else 0.0
        if tau > 0 and math.isfinite(tau):
            return tau
        steepest = float(np.abs(gradient).max(initial=0.0))
        return 2 * float(self.problem.omega.max(initial=0.0)) / steepest if steepest > 0 else 1.0

    def run(self, stated: float) -> None:
        target = self.problem.epsilon**2
        self.accept(self.problem.A @ self.W.T)
        self.tau = self._first_tau()
        self.rho = 10 * self.tau
        low = high = None  # logarithms of τ, and of the misfit over the budget
        stride = 1.0
        for _ in range(_OUTER):
            self.meet(stated)
            misfit = self.accept(self.problem.A @ self.W.T)
            if self.lower >= stated or self.upper < stated < math.inf or not math.isfinite(misfit):
                break
            excess = math.log(max(misfit, 1e-300) / max(target, 1e-300))
            if abs(excess) <= _EXACT:
                break
            point = (math.log(self.tau), excess)
            low, high = (point, high) if excess > 0 else (low, point)
            if low is None or high is None:
                x = point[0] + min(max(0.52 * stride * excess, -4.0), 4.0)
                stride *= 2
            else:
                share = low[1] / (low[1] - high[1])
                x = low[0] + min(max(share, 0.02), 0.98) * (high[0] - low[0])
                if abs(high[0] - low[0]) < 1e-13 * abs(x):
                    break
            factor = math.exp(min(max(x, -600.0), 600.0)) / self.tau
            self.tau *= factor
            self.rho = 10 * self.tau
            if self.u is not None:
                self.u = self.u * factor

    def meet(self, stated: float) -> None:
        """The problem at one τ: Newton steps, and for the paper's set rounds of multipliers until ``z ≤ v`` is met."""
        before = math.inf
        for _ in range(_ROUNDS if self.u is not None else 1):
            done = self.descend(stated)
            if self.u is None or self.lower >= stated:
                return
            assert self.problem.V is not None
            Z = self.problem.A @ self.W.T
            excess = np.where(self.on, 0.0, np.maximum(Z - self.problem.V, -self.u / self.rho))  # what complementarity lacks
            left = float(np.linalg.norm(excess))
            if not done:  # multipliers of a point that is none
                continue
            self.u = np.where(self.on, 0.0, self.theta(Z))
            if left <= 1e-10 * math.sqrt(Z.size):
                return
            if left > 0.25 * before and self.rho < 1e4 * self.tau:
                self.rho *= 8
            before = left


def _slope(w: Array, gradient: Array, omega: Array) -> Array:
    """The smallest subgradient of one neuron's objective."""
    return np.where(w != 0, gradient + omega * np.sign(w), np.sign(gradient) * np.maximum(np.abs(gradient) - omega, 0.0))


def _solve(H: Array, g: Array, shift: float) -> Array:
    """``H⁻¹ g`` of a positive semidefinite matrix, its diagonal raised by the share ``shift``, or as much as a factorisation needs."""
    from scipy import linalg  # an eighth of a second, which who only prunes need not wait

    if not g.size:
        return g
    diagonal = np.sqrt(np.maximum(H.diagonal(), 1e-300))
    H = H / np.outer(diagonal, diagonal)
    for _ in range(12):
        try:
            factor = linalg.cho_factor(H + shift * np.eye(len(H)), check_finite=False)
            return linalg.cho_solve(factor, g / diagonal, check_finite=False) / diagonal
        except linalg.LinAlgError:
            shift *= 10
    return np.full_like(g, math.nan)
