"""The best supports there are, certified: ``ℓ0`` programs of a neuron (Phan, Nguyen, Nguyen, Kalagnanam: Pruning deep neural networks with
ℓ0-constrained optimization, ICDM 2020), solved to optimality by mixed-integer solvers through cvxpy.

* General activation: ``min_w ‖A w − y‖²  s.t. ‖w‖₀ ≤ k``. Quadratic, with binaries ``|w_j| ≤ M_j b_j``, ``Σ b ≤ k``: SCIP.
* ReLU: ``min_w Σ_{y>0} (a·w − y)²  s.t. a·w ≤ 0 where y = 0, ‖w‖₀ ≤ k``. The constraints, one a sample, are cutting planes: solve, add those that are
  violated most, until none is.
* Turned round, what our budgets ask: ``min ‖w‖₀  s.t. F(w) ≤ ε²`` with the relaxed misfit F of `nettrim.LayerProgram`. Linear in binaries, for HiGHS,
  and cuts: where the support S that it proposes cannot keep the budget, S is grown to a largest S' that cannot, and ``Σ_{j∉S'} b_j ≥ 1`` is added.

The first two need a bound on the weights, ``|w_j| ≤ M_j b_j``. It is proven, not guessed: ``|w_j| ≤ R √((AᵀA)⁻¹_jj)`` wherever ``‖A w‖ ≤ R``, and
what is optimal has ``‖A_Ω w − y‖ ≤ ‖y‖``, so R = 2‖y‖.
"""

from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from nettrim.errors import ArgumentError, ConvergenceError

Array = np.ndarray
WORST = 10  # ReLU constraints added at a time
MOST = 5000  # rounds of cuts; the sets of supports and of samples are finite, so it ends before that
SLACK = 1e-7  # relative: what counts as within a budget, or as a constraint that holds


@dataclass(frozen=True)
class Optimum:
    """A certified optimum.

    Attributes
    ----------
    weights : ndarray, shape (N,)
        The best weights of the support.
    support : frozenset of int
    misfit : float
        ``F``, the squared discrepancy.
    rounds : int
        Mixed-integer programs solved.
    """

    weights: Array
    support: frozenset[int]
    misfit: float
    rounds: int


def largest(A: Array, y: Array, reach: float) -> Array:
    """Bounds ``M_j`` on ``|w_j|`` wherever ``‖A_Ω w‖ ≤ reach``.

    Raises
    ------
    ArgumentError
        The rows on Ω do not span the inputs: no bound follows.
    """
    on = A[y > 0] if (y >= 0).all() and (y == 0).any() else A
    if len(on) < A.shape[1] or np.linalg.matrix_rank(on) < A.shape[1]:
        raise ArgumentError(f"the {len(on)} samples that are not 0 have rank below {A.shape[1]}, the number of inputs; expected more samples")
    return reach * np.sqrt(np.diag(np.linalg.inv(on.T @ on)))


def _solved(problem: cp.Problem, solver: str) -> None:
    """Solve to optimality, or say that it was not.

    Raises
    ------
    ArgumentError
        The solver is not installed.
    ConvergenceError
        Any other status than optimal.
    """
    if solver not in cp.installed_solvers():
        raise ArgumentError(f"{solver} is not installed; get it with pip install 'nettrim[oracle]'")
    problem.solve(solver=solver)
    if problem.status != cp.OPTIMAL:
        raise ConvergenceError(f"{solver} ended with status {problem.status!r}; expected 'optimal': the program's bounds may be wrong")


def misfit(A: Array, y: Array, w: Array, relu: bool) -> float:
    """``F(w) = Σ_Ω (a·w − y)² + Σ_{Ωᶜ} max(a·w, 0)²``; without a ReLU every sample is in Ω."""
    return float((_residual(A, y, w, relu) ** 2).sum())


def _residual(A: Array, y: Array, w: Array, relu: bool) -> Array:
    z = A @ w
    return np.where(y > 0, z - y, np.maximum(z, 0)) if relu else z - y


def least_misfit(A: Array, y: Array, support: list[int], relu: bool) -> tuple[Array, float]:
    """``argmin F(w)`` over the weights on the support: semismooth Newton with a line search, each step a least-squares problem.

    Returns
    -------
    tuple of (ndarray (N,), float)
    """
    w = np.zeros(A.shape[1])
    if not support:
        return w, misfit(A, y, w, relu)
    on = A[:, support]
    value = misfit(A, y, w, relu)
    for _ in range(200):
        active = (y > 0) | (on @ w[support] > 0) if relu else np.ones(len(y), dtype=bool)
        target = np.zeros_like(w)
        target[support] = np.linalg.lstsq(on[active], y[active], rcond=None)[0]
        step = 1.0
        while step > 1e-12 and misfit(A, y, w + step * (target - w), relu) >= value:
            step /= 2
        if step <= 1e-12:
            break
        w = w + step * (target - w)
        value = misfit(A, y, w, relu)
    return w, value


def best_of_size(A: Array, y: Array, k: int, *, relu: bool = False) -> Optimum:
    """Phan et al.: the least discrepancy with at most k weights, for a general activation or, with ``relu``, under ``a·w ≤ 0`` where ``y = 0``.

    Parameters
    ----------
    A : ndarray, shape (P, N)
    y : ndarray, shape (P,)
        At least 0 with ``relu``.
    k : int
    relu : bool

    Returns
    -------
    Optimum
        ``misfit`` is the objective: over Ω with ``relu``.

    Raises
    ------
    ArgumentError
        Too few samples for a bound on the weights.
    ConvergenceError
        The solver did not prove an optimum.
    """
    scale = np.linalg.norm(y)
    on = y > 0 if relu else np.ones(len(y), dtype=bool)
    bound = largest(A, y if relu else np.ones_like(y), 2.0)
    w, b = cp.Variable(A.shape[1]), cp.Variable(A.shape[1], boolean=True)
    constraints = [cp.abs(w) <= cp.multiply(bound, b), cp.sum(b) <= k]
    objective = cp.Minimize(cp.sum_squares(A[on] @ w - y[on] / scale))
    added: set[int] = set()
    for round_ in range(1, MOST + 1):
        problem = cp.Problem(objective, constraints)
        _solved(problem, cp.SCIP)
        support = [j for j in range(A.shape[1]) if b.value[j] > 0.5]
        if not relu:
            weights, value = least_misfit(A, y, support, relu=False)
            return Optimum(weights, frozenset(support), value, round_)
        z = A @ w.value
        violated = [p for p in np.argsort(-z) if not on[p] and z[p] > 1e-5 * np.abs(A[p]).sum() and p not in added][:WORST]
        if not violated:
            return Optimum(scale * w.value * b.value.round(), frozenset(support), scale**2 * float(problem.value), round_)
        added.update(violated)
        constraints.append(A[violated] @ w <= 0)
    raise ConvergenceError(f"{MOST} rounds of cuts were not enough")


def fewest_within(A: Array, y: Array, epsilon: float, *, relu: bool = False) -> Optimum:
    """The fewest weights with ``F(w) ≤ ε²``.

    Parameters
    ----------
    A : ndarray, shape (P, N)
    y : ndarray, shape (P,)
        At least 0 with ``relu``.
    epsilon : float
        Absolute.
    relu : bool

    Returns
    -------
    Optimum

    Raises
    ------
    ArgumentError
        No weights keep the budget.
    ConvergenceError
        The solver did not prove an optimum.
    """
    N = A.shape[1]
    budget = epsilon**2 * (1 + SLACK)
    _, least = least_misfit(A, y, list(range(N)), relu)
    if least > budget:
        raise ArgumentError(f"got epsilon={epsilon:.4g}; the least discrepancy of any weights is {least**0.5:.4g}")
    b = cp.Variable(N, boolean=True)
    constraints = [b >= 0]
    for round_ in range(1, MOST + 1):
        _solved(cp.Problem(cp.Minimize(cp.sum(b)), constraints), cp.HIGHS)
        support = [j for j in range(N) if b.value[j] > 0.5]
        weights, value = least_misfit(A, y, support, relu)
        if value <= budget:
            return Optimum(weights, frozenset(support), value, round_)
        for j in range(N):
            if j not in support and least_misfit(A, y, [*support, j], relu)[1] > budget:
                support.append(j)
        constraints.append(cp.sum(b[[j for j in range(N) if j not in support]]) >= 1)
    raise ConvergenceError(f"{MOST} rounds of cuts were not enough")
