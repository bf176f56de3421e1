"""The ℓ0 oracle against trying every support, and the report of ours against it."""

import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch

import nettrim
from benchmarks.neighbours import oracle, oracle_report
from nettrim.errors import ArgumentError, ConvergenceError


def example(seed: int, relu: bool) -> tuple[np.ndarray, np.ndarray]:
    """30 samples of 6 correlated inputs, and a neuron with two large weights."""
    draw = np.random.default_rng(seed)
    A = draw.standard_normal((30, 6)) + draw.standard_normal((30, 1))
    y = A @ np.array([2.0, 0.4, 0, -1.5, 0.2, 0.1]) + 0.1 * draw.standard_normal(30)
    return A, np.maximum(y, 0) if relu else y


def convex(A: np.ndarray, y: np.ndarray, support: tuple[int, ...], relu: bool) -> float:
    """The least relaxed misfit on a support, by a conic solver."""
    w = cp.Variable(A.shape[1])
    z = A @ w
    on = y > 0 if relu else np.ones(len(y), dtype=bool)
    terms = [cp.sum_squares(z[on] - y[on])] + ([cp.sum_squares(cp.pos(z[~on]))] if (~on).any() else [])
    off = [j for j in range(A.shape[1]) if j not in support]
    problem = cp.Problem(cp.Minimize(sum(terms)), [w[off] == 0] if off else [])
    return float(problem.solve(solver=cp.CLARABEL))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("support", [(0,), (0, 3), (1, 2, 4, 5)])
def test_the_least_misfit_on_a_support_is_a_conic_solvers(relu: bool, support: tuple[int, ...]) -> None:
    A, y = example(1, relu)
    weights, value = oracle.least_misfit(A, y, list(support), relu)
    assert set(np.flatnonzero(weights)) <= set(support)
    assert value == pytest.approx(oracle.misfit(A, y, weights, relu)) == pytest.approx(convex(A, y, support, relu), rel=1e-5)


def test_the_misfit_is_the_layer_programs() -> None:
    A, y = example(2, True)
    w = np.linspace(-1, 1, 6)
    program = nettrim.LayerProgram(torch.from_numpy(A), torch.from_numpy(y)[:, None], epsilon=1.0)
    assert oracle.misfit(A, y, w, True) == pytest.approx(float(program.measure(torch.from_numpy(w)[None]).distance) ** 2)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("epsilon", [0.1, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_smaller_support_keeps_the_budget(seed: int, epsilon: float, relu: bool) -> None:
    A, y = example(seed, relu)
    budget = epsilon * float(np.linalg.norm(y))
    found = oracle.fewest_within(A, y, budget, relu=relu)
    assert found.misfit <= budget**2 * (1 + 1e-6) and set(np.flatnonzero(found.weights)) <= found.support
    sizes = (size for size in range(7) for support in itertools.combinations(range(6), size) if _within(A, y, support, budget, relu))
    assert len(found.support) == next(sizes)


def _within(A: np.ndarray, y: np.ndarray, support: tuple[int, ...], budget: float, relu: bool) -> bool:
    return oracle.least_misfit(A, y, list(support), relu)[1] <= budget**2 * (1 + oracle.SLACK)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_best_of_a_size_is_the_best_of_all_supports(k: int) -> None:
    A, y = example(3, False)
    found = oracle.best_of_size(A, y, k)
    least = min(oracle.least_misfit(A, y, list(support), False)[1] for support in itertools.combinations(range(6), k))
    assert found.misfit == pytest.approx(least, rel=1e-6) and len(found.support) <= k


def test_cutting_planes_reach_the_optimum_under_all_relu_constraints() -> None:
    A, y = example(4, True)
    found = oracle.best_of_size(A, y, 3, relu=True)
    off = y == 0
    assert found.rounds > 1 and (A[off] @ found.weights).max() < 1e-3
    values = []
    for support in itertools.combinations(range(6), 3):
        w = cp.Variable(3)
        on = A[:, list(support)]
        values.append(cp.Problem(cp.Minimize(cp.sum_squares(on[~off] @ w - y[~off])), [on[off] @ w <= 0]).solve(solver=cp.CLARABEL))
    assert found.misfit == pytest.approx(min(values), rel=1e-3)


def test_bounds_on_the_weights_hold_for_every_support() -> None:
    A, y = example(5, False)
    bound = oracle.largest(A, np.ones_like(y), 2 * float(np.linalg.norm(y)))
    for size in range(1, 7):
        for support in itertools.combinations(range(6), size):
            assert (np.abs(oracle.least_misfit(A, y, list(support), False)[0]) <= bound).all()


def test_errors_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    A, y = example(6, False)
    with pytest.raises(ArgumentError, match="the least discrepancy of any weights"):
        oracle.fewest_within(A, y, 1e-3)
    with pytest.raises(ArgumentError, match="rank below 6"):
        oracle.best_of_size(A[:4], y[:4], 2)
    monkeypatch.setattr(oracle, "MOST", 1)
    with pytest.raises(ConvergenceError, match="1 rounds of cuts"):
        oracle.fewest_within(A, y, 0.3 * float(np.linalg.norm(y)))
    w = cp.Variable()
    with pytest.raises(ConvergenceError, match="'infeasible'"):
        oracle._solved(cp.Problem(cp.Minimize(w), [w >= 1, w <= 0]), cp.HIGHS)
    monkeypatch.setattr(cp, "installed_solvers", lambda: ["HIGHS"])
    with pytest.raises(ArgumentError, match=r"SCIP is not installed.*nettrim\[oracle\]"):
        oracle.best_of_size(A, y, 2)


def test_ours_are_never_below_the_optimum_and_the_table_says_how_far_above() -> None:
    runs = [{"settings": {"section": "oracle", "seed": seed}, **oracle_report.measure(seed)} for seed in (0, 3)]
    for run in runs:
        assert all(count >= run["fewest"] for count in run["ours"].values())
    assert runs[0]["topk"] >= runs[0]["least"] * (1 - 1e-9) and "topk" not in runs[1]
    rows = oracle_report.oracle_rows([*runs, {"settings": {"section": "oracle", "seed": 9}, "error": "none"}])
    assert [row[1:3] for row in rows[:3]] == [["ℓ1", "2"], ["reweighted ℓ1", "2"], ['`penalty="l0"`', "2"]]
    mean = np.mean([run["ours"]["l1"] - run["fewest"] for run in runs])
    assert rows[0][5] == f"{mean:.2f} weights"
