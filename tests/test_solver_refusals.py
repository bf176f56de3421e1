"""What solvers say of programs that have no feasible point, and of calls that they do not take."""

import math

import numpy as np
import pytest
import torch
from problems import KINDS, trained_layer, trained_program
from test_solvers import TOL, check_honest, takers

from nettrim import ArgumentError, LayerProgram, UnsupportedProgramError, solve
from nettrim.solvers import STATUSES

# -- infeasible programs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "gram_admm", "prox_admm", "cvxpy"])
def test_targets_that_no_weights_meet_are_reported_with_the_distance_that_would_do(solver):
    rng = np.random.default_rng(0)
    A, Y = torch.from_numpy(rng.standard_normal((30, 5))), torch.from_numpy(rng.standard_normal((30, 2)))
    least = float((Y - A @ torch.linalg.lstsq(A, Y).solution).norm())
    solution = solve(LayerProgram(A, Y, epsilon=0.9 * least, activation=None), solver)
    assert solution.status == "infeasible" and solution.gap == math.inf
    if solver != "cvxpy":
        assert solution.least_distance == pytest.approx(least, rel=2e-3) and solution.least_distance >= least * (1 - 1e-9)
        assert solve(LayerProgram(A, Y, epsilon=1.001 * solution.least_distance, activation=None), solver).status in ("optimal", "feasible")


@pytest.mark.parametrize("solver", ["auto", "prox_admm", "cvxpy"])
@pytest.mark.parametrize("consistency", ["relaxed", "paper"])
def test_a_relu_program_with_no_feasible_point(consistency, solver):
    """Two equal rows, one with target 1, one off: relaxed, ½ each is nearest (‖D‖² = ½); in the paper's set z ≤ 0 leaves ‖D‖ = 1."""
    A, Y = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    least = 1.0 if consistency == "paper" else math.sqrt(0.5)
    solution = solve(LayerProgram(A, Y, epsilon=0.9 * least, consistency=consistency), solver)
    assert solution.status == "infeasible"
    if solver != "cvxpy":
        assert solution.least_distance == pytest.approx(least, rel=2e-3)


@pytest.mark.parametrize("solver", ["auto", "prox_admm", "cvxpy"])
def test_an_upper_bound_that_contradicts_the_targets(solver):
    """The same input must give 1 within ε and at most −1: ε = 2 would do."""
    A = torch.tensor([[1.0, 0.3], [1.0, 0.3], [0.2, 1.0]], dtype=torch.float64)
    Y = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)
    V = torch.tensor([[0.0], [-1.0], [0.0]], dtype=torch.float64)
    solution = solve(LayerProgram(A, Y, epsilon=1.0, consistency="paper", upper=V), solver)
    assert solution.status == "infeasible"
    if solver != "cvxpy":
        assert solution.least_distance == pytest.approx(2.0, rel=2e-3)
    assert solve(LayerProgram(A, Y, epsilon=2.01, consistency="paper", upper=V), solver).status in ("optimal", "feasible")


@pytest.mark.parametrize("kind", [KINDS["paper-budget"], KINDS["paper-penalised"]], ids=lambda kind: kind.name)
def test_upper_bounds_that_contradict_each_other(kind):
    """``w ≤ −1`` and ``−w ≤ −1``: no budget helps, and none is said to."""
    A = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64)
    Y = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    V = torch.tensor([[-1.0], [-1.0], [0.0]], dtype=torch.float64)
    level = {"epsilon": 0.5} if kind.budget else {"regularization": 0.1}
    program = LayerProgram(A, Y, consistency="paper", upper=V, **level)
    for solver in takers(program):
        solution = solve(program, solver)
        check_honest(program, solution, 1e-4)
        assert solution.status in ("infeasible", "iteration_limit")
        assert solution.least_distance is None or not math.isfinite(solution.least_distance), solver


def test_a_penalised_program_whose_zero_is_infeasible():
    """``V < 0`` makes 0 infeasible: the start is nowhere, the answer is still the optimum."""
    rng = np.random.default_rng(4)
    A = torch.from_numpy(np.c_[rng.standard_normal((30, 4)), np.ones(30)])
    program = LayerProgram(A, torch.zeros(30, 1), regularization=0.1, consistency="paper", upper=-torch.ones(30, 1, dtype=torch.float64))
    reference = solve(program, "cvxpy", tol=TOL)
    assert reference.status == "optimal" and reference.objective == pytest.approx(0.1, rel=1e-4)
    for solver in ("prox_admm", "osqp"):
        solution = solve(program, solver, tol=TOL)
        check_honest(program, solution, TOL)
        assert solution.objective == pytest.approx(reference.objective, rel=1e-3), solver
        assert solve(program, solver, max_iter=1).status in STATUSES


# -- refusals ---------------------------------------------------------------------------------------------------------------------


def test_a_solver_refuses_by_name_and_says_which_can():
    relaxed, penalised = trained_program(KINDS["relaxed-budget"], 0), trained_program(KINDS["paper-penalised"], 0)
    with pytest.raises(UnsupportedProgramError, match=r"'admm' does not take a budget program on the relaxed set: .*These do: prox_admm, cvxpy"):
        solve(relaxed, "admm")
    with pytest.raises(UnsupportedProgramError, match=r"'admm' does not take a penalised program on the paper set: .*prox_admm, osqp, cvxpy"):
        solve(penalised, "admm")
    with pytest.raises(UnsupportedProgramError, match=r"solver='osqp' does not take a budget program.*pass regularization= instead"):
        solve(relaxed, "osqp")
    with pytest.raises(UnsupportedProgramError, match=r"solver='gram_admm' .*activation=None"):
        solve(relaxed, "gram_admm")


def test_argument_errors_of_solve():
    program = trained_program(KINDS["linear-budget"], 0)
    with pytest.raises(ArgumentError, match=r"solver='scs'; expected 'auto' or one of 'prox_admm'"):
        solve(program, "scs")
    for tol in (0, -1e-3, math.nan, math.inf, "small"):
        with pytest.raises(ArgumentError, match=r"tol=.*expected a finite number above 0"):
            solve(program, tol=tol)
    for max_iter in (0, -5, 2.5, True):
        with pytest.raises(ArgumentError, match=rf"max_iter={max_iter}; expected a whole number, at least 1"):
            solve(program, max_iter=max_iter)
    M, N = program.shape
    with pytest.raises(ArgumentError, match=rf"initial has shape \({N}, {M}\); expected \(M, N\) = \({M}, {N}\)"):
        solve(program, initial=torch.zeros(N, M))
    with pytest.raises(ArgumentError, match="initial holds NaN or infinity; expected finite"):
        solve(program, initial=torch.full((M, N), math.nan))
    with pytest.raises(ArgumentError, match="initial is a list"):
        solve(program, initial=[[0.0] * N] * M)


def test_a_numpy_start_is_as_good_as_a_tensor():
    program = trained_program(KINDS["linear-budget"], 0)
    dense = trained_layer(0)[2]
    assert torch.equal(solve(program, initial=dense.numpy()).weights, solve(program, initial=dense).weights)


def test_a_small_program_is_solved_on_one_thread_and_the_setting_comes_back():
    seen = []
    A, _, W = trained_layer(0)

    def chunks():
        seen.append(torch.get_num_threads())
        return iter(A.split(20))

    program = LayerProgram(chunks, (A @ W.T).clamp(min=0), epsilon=1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen.clear()
        solve(program, max_iter=20)
        assert set(seen) == {1} and torch.get_num_threads() == 2
        with pytest.raises(ArgumentError):
            solve(program, tol=-1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
