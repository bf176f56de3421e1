"""Is any solution called optimal that is not? Programs made to deceive float64, judged in exact arithmetic.

``python -m benchmarks.soak_certificates --programs 1000`` prints the figures; :func:`soak` returns them.

A solution that says ``"optimal"`` claims that its weights are feasible and that none have an objective below ``(1 − tol)`` times its own.
Here both are proven again in rational numbers: feasibility from the weights as they are, and the bound from a dual point that is found by other
means (:mod:`nettrim.checking.bound`) and then scaled, neuron by neuron, until it is feasible *exactly*. Weak duality does the rest, without rounding.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from fractions import Fraction
from typing import Any

import click
import numpy as np
import torch

import nettrim
from nettrim import LayerProgram, Solution
from nettrim.checking.bound import Problem, bound
from nettrim.errors import NetTrimError
from nettrim.residual import ONE_SIDED_TOLERANCE, ROUNDING

Array = np.ndarray
TOLERANCES = (1e-3, 1e-4)
KINDS = (
    ("relu", "relaxed", True), ("relu", "paper", True), (None, "relaxed", True),
    ("relu", "relaxed", False), ("relu", "paper", False), (None, "relaxed", False),
)  # fmt: skip
STRUCTURES = (
    "plain", "scales", "collinear", "rank one", "near infeasible", "near zero", "one row", "wide", "dead", "cascade", "free bias", "tiny", "huge",
)  # fmt: skip
_BITS = 160  # behind the point, of square roots


class Exact:
    """A float64 array as integers times a power of two: products and sums have no rounding."""

    def __init__(self, array: Array) -> None:
        mantissas, exponents = np.frexp(np.asarray(array, dtype=np.float64))
        exponents = exponents - 53
        used = exponents[mantissas != 0]
        self.exponent = int(used.min()) if used.size else 0
        whole = (mantissas * 2.0**53).astype(np.int64).astype(object)
        shifts = np.maximum(exponents - self.exponent, 0).astype(object)
        self.integers = np.where(mantissas != 0, whole * 2**shifts, 0)

    def fractions(self) -> Array:
        unit = Fraction(2) ** self.exponent
        return np.vectorize(lambda n: Fraction(int(n)) * unit, otypes=[object])(self.integers)


def product(a: Array, b: Array) -> Array:
    """``a @ b`` of float64 matrices, in fractions."""
    left, right = Exact(a), Exact(b)
    unit = Fraction(2) ** (left.exponent + right.exponent)
    return np.vectorize(lambda n: Fraction(int(n)) * unit, otypes=[object])(np.dot(left.integers, right.integers))


def root(value: Fraction, *, up: bool) -> Fraction:
    """The square root, rounded up or down in the last of its bits."""
    shifted = (value.numerator << (2 * _BITS)) // value.denominator
    return Fraction(math.isqrt(shifted) + up, 1 << _BITS)


def generate(index: int, seed: int = 0) -> tuple[LayerProgram, str]:
    """Program number ``index``: the kinds and structures in turn; and its name."""
    activation, consistency, budgeted = KINDS[index % len(KINDS)]
    structure = STRUCTURES[(index // len(KINDS)) % len(STRUCTURES)]
    rng = np.random.default_rng([seed, index])
    P, N, M = int(rng.integers(15, 36)), int(rng.integers(3, 9)), int(rng.integers(1, 4))
    P = {"one row": 1, "wide": int(rng.integers(2, 5))}.get(structure, P)
    A = rng.standard_normal((P, N)) + rng.choice((0.0, 0.5, 3.0))
    W = rng.standard_normal((M, N)) * (rng.random((M, N)) < 0.6)
    omega = np.ones(N)
    if structure == "scales":
        size = 10.0 ** rng.uniform(-7, 7, N)
        A, W = A * size, W / size
        omega = size if rng.random() < 0.5 else omega
    elif structure == "collinear":
        A[:, 1:] = A[:, :1] + 10.0 ** -rng.integers(1, 9) * A[:, 1:]
    elif structure == "rank one":
        A = np.outer(A[:, 0], rng.standard_normal(N))
    elif structure == "dead":
        A[:, 0], A[: P // 2] = 0.0, 0.0
        W[0] = -np.abs(W[0])
    elif structure == "free bias":
        A[:, -1], omega[-1] = 1.0, 0.0
    elif structure in ("tiny", "huge"):
        A = A * (1e-25 if structure == "tiny" else 1e15)
    Z = A @ W.T
    if structure == "near infeasible":  # targets that nothing meets, and a budget a hair above the least distance
        Z = Z + rng.standard_normal(Z.shape) * np.abs(Z).max()
    Y = np.maximum(Z, 0.0) if activation else Z
    dtype = torch.float32 if rng.random() < 0.3 and structure in ("plain", "wide", "one row", "cascade") else torch.float64
    inputs, targets = (torch.from_numpy(array).to(dtype) for array in (A, Y))
    options: dict[str, Any] = {"activation": activation, "l1_weights": torch.from_numpy(omega).to(dtype)}
    if activation:
        options["consistency"] = consistency
    if structure == "cascade":
        inputs = inputs + 0.1 * torch.from_numpy(rng.standard_normal(A.shape)).to(dtype)
        if consistency == "paper" and activation:
            options["upper"] = inputs @ torch.from_numpy(W).to(dtype).T
    norm = float(targets.double().norm()) or 1.0
    share = float(rng.choice((0.5, 0.2, 0.05, 1e-2, 1e-3)))
    if structure == "near zero":
        share = 1 + float(rng.choice((-1, 1))) * 10.0 ** -float(rng.integers(1, 9))
    level = share * norm
    if structure == "near infeasible" and budgeted:
        least = nettrim.solve(LayerProgram(inputs, targets, epsilon=1e-9 * norm, **options), max_iter=200).least_distance
        level = (least or level) * (1 + 10.0 ** -float(rng.integers(1, 5)))
    if not budgeted:
        correlation = np.abs(Y.T @ A)
        level = min(share, 2.0) * (float((correlation[:, omega > 0] / omega[omega > 0]).max()) or 1.0)
    name = f"{'budget' if budgeted else 'penalty'}, {activation or 'no ReLU'}, {consistency}, {structure}, {dtype}, number {index}"
    return LayerProgram(inputs, targets, **{"epsilon" if budgeted else "regularization": level}, **options), name


@dataclasses.dataclass(frozen=True)
class Claim:
    """A program's data as float64 arrays, and what its solution claims."""

    program: LayerProgram
    problem: Problem
    weights: Array
    tol: float

    @classmethod
    def of(cls, program: LayerProgram, solution: Solution, tol: float) -> Claim:
        A, Y, V = (None if array is None else array.numpy() for array in program.arrays)
        assert A is not None and Y is not None and isinstance(program.l1_weights, torch.Tensor)
        V = np.zeros_like(Y) if program.one_sided and V is None else V
        problem = Problem(A, Y, program.l1_weights.double().numpy(), program.epsilon or 0.0, program.relu, V if program.one_sided else None)
        return cls(program, problem, solution.weights.double().numpy(), tol)

    @property
    def on(self) -> Array:
        return self.problem.Y > 0 if self.problem.relu else np.ones(self.problem.Y.shape, dtype=bool)

    def residuals(self, weights: Array) -> tuple[Fraction, Fraction]:
        """``Σ_Ω (z − y)²`` and ``Σ_{Ωᶜ} max(z − v, 0)²``, exactly."""
        Z, Y = product(self.problem.A, weights.T), Exact(self.problem.Y).fractions()
        V = np.full(Y.shape, Fraction(0)) if self.problem.V is None else Exact(self.problem.V).fractions()
        inside = sum(((z - y) ** 2 for z, y in zip(Z[self.on], Y[self.on], strict=True)), Fraction(0))
        outside = sum((max(z - v, Fraction(0)) ** 2 for z, v in zip(Z[~self.on], V[~self.on], strict=True)), Fraction(0))
        return inside, outside

    def value(self, weights: Array) -> Fraction:
        """The objective, exactly."""
        omega = Exact(self.problem.omega).fractions()
        norm = sum((abs(w) * o for row in Exact(weights).fractions() for w, o in zip(row, omega, strict=True)), Fraction(0))
        if self.program.regularization is None:
            return norm
        inside, outside = self.residuals(weights)
        return Fraction(self.program.regularization) * norm + (inside + (0 if self.program.one_sided else outside)) / 2

    def feasible(self, weights: Array, slack: float, one_sided: float) -> bool:
        """Within the budget but for the share ``slack``, and off Ω below the constraints but for the share ``one_sided`` of it."""
        inside, outside = self.residuals(weights)
        scale = self.program.epsilon
        size = Fraction(scale) if scale is not None else root(sum((y**2 for y in Exact(self.problem.Y).fractions().ravel()), Fraction(0)), up=True)
        if self.program.one_sided and outside > (Fraction(one_sided) * size) ** 2:
            return False
        return scale is None or inside + outside <= (size * (1 + Fraction(slack))) ** 2

    def bound(self, theta: Array) -> Fraction:
        """What a dual point proves when it has been made feasible exactly; at least 0."""
        omega = Exact(self.problem.omega).fractions()
        level = Fraction(1) if self.program.regularization is None else Fraction(self.program.regularization)
        A = Exact(self.problem.A).fractions()
        Y = Exact(self.problem.Y).fractions()
        V = None if self.problem.V is None else Exact(self.problem.V).fractions()
        free = np.flatnonzero(self.problem.omega == 0)
        lines, squares = [], []
        for m in range(theta.shape[1]):
            inside = self.on[:, m]
            t = Exact(np.where(inside, theta[:, m], np.maximum(theta[:, m], 0.0))).fractions()
            for j in free:  # one free column at most is made: its correction is exact
                square = sum((a * a for a in A[inside, j]), Fraction(0))
                shift = np.dot(A[:, j], t) / square if square else Fraction(0)
                t[inside] -= A[inside, j] * shift
            correlations = np.dot(t, A)
            if any(correlations[j] != 0 for j in free):
                continue
            limits = [level * omega[j] / abs(correlations[j]) for j in range(len(omega)) if omega[j] and correlations[j]]
            t = t * min([Fraction(1), *limits])
            line = -np.dot(t[inside], Y[inside, m]) if inside.any() else Fraction(0)
            if V is not None and (~inside).any():
                line -= np.dot(t[~inside], V[~inside, m])
            counted = t[inside] if self.program.one_sided else t
            lines.append(line)
            squares.append(np.dot(counted, counted) if len(counted) else Fraction(0))
        if self.program.regularization is not None:
            return max(Fraction(0), sum((max(Fraction(0), line - square / 2) for line, square in zip(lines, squares, strict=True)), Fraction(0)))
        size = root(sum(squares, Fraction(0)), up=True)
        return max(Fraction(0), sum(lines, Fraction(0)) - Fraction(self.program.epsilon or 0.0) * size)

    def judge(self, lower_bound: float) -> tuple[str, float]:
        """``"true"``, ``"false"``, ``"agreed"`` (see below) or ``"open"``, and the gap that is proven exactly."""
        value = self.value(self.weights)
        if not self.feasible(self.weights, ROUNDING, ONE_SIDED_TOLERANCE * (1 + ROUNDING)):
            return "false", math.inf
        if value == 0:
            return "true", 0.0
        found = bound(self.problem, self.weights, stated=math.inf, penalty=self.program.regularization)
        proven = self.bound(found.theta)
        gap = float((value - proven) / value)
        if gap <= self.tol * (1 + 1e-6):
            return "true", gap
        # only weights that keep every constraint exactly refute: for the papers' set a solution may break z ≤ v a little, and gain by it
        undercut = [self.value(weights) for weights in (self.weights, found.weights) if self.feasible(weights, 0.0, 0.0)]
        if any(Fraction(lower_bound) > better * (1 + Fraction(1, 10**9)) for better in undercut):
            return "false", gap
        return "agreed" if self._interior_point_agrees(float(value)) else "open", gap

    def _interior_point_agrees(self, value: float) -> bool:
        """Where the exact bound is not tight enough: whether Clarabel, to a hundredth of the tolerance, finds no better objective."""
        given = self.program
        inputs, targets, upper = given.arrays
        assert isinstance(given.l1_weights, torch.Tensor)
        program = dataclasses.replace(given, inputs=inputs, targets=targets, upper=upper, l1_weights=given.l1_weights.double())
        other = nettrim.solve(program, "cvxpy", tol=self.tol / 100)
        return other.gap <= self.tol / 10 and value <= other.objective * (1 + self.tol)


def soak(programs: int, seed: int = 0) -> dict[str, Any]:
    """Solve and judge.

    Returns
    -------
    dict
        ``programs``, ``statuses`` (how often each), ``optimal``, and of those ``true``, ``agreed``, ``open`` and ``false`` (the last three as lists
        of names).
    """
    statuses: collections.Counter[str] = collections.Counter()
    true = 0
    others: dict[str, list[str]] = {"agreed": [], "open": [], "false": []}
    for index in range(programs):
        tol = TOLERANCES[index % len(TOLERANCES)]
        try:
            program, name = generate(index, seed)
            solution = nettrim.solve(program, tol=tol)
        except NetTrimError as error:
            statuses[type(error).__name__] += 1
            continue
        statuses[solution.status] += 1
        if solution.status != "optimal":
            continue
        verdict, gap = Claim.of(program, solution, tol).judge(solution.lower_bound)
        true += verdict == "true"
        if verdict != "true":
            others[verdict].append(f"{verdict}: {name}: claimed {solution.gap:.3g} within {tol:g}, proven exactly {gap:.3g}")
    return {"programs": programs, "statuses": dict(statuses), "optimal": statuses["optimal"], "true": true, **others}


@click.command()
@click.option("--programs", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(programs: int, seed: int) -> None:
    """Print how many programs were solved, called optimal, and proven to be in exact arithmetic; exit with 1 if a certificate is false."""
    figures = soak(programs, seed)
    click.echo(
        f"programs: {figures['programs']}, called optimal: {figures['optimal']}, proven exactly: {figures['true']}, "
        f"agreed by an interior point: {len(figures['agreed'])}, open: {len(figures['open'])}, "
        f"false certificates: {len(figures['false'])}; {figures['statuses']}"
    )
    for line in (*figures["false"], *figures["open"], *figures["agreed"]):
        click.echo(line)
    raise SystemExit(1 if figures["false"] else 0)


if __name__ == "__main__":
    main()
