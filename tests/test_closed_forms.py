"""Programs whose solution is known: on paper, or because it was planted."""

import math

import numpy as np
import pytest
import torch
from problems import KINDS, TRAINED_PROGRAMS, random_layer, trained_layer, trained_program

from nettrim import LayerProgram, solve
from nettrim.proximal import soft_threshold
from nettrim.solvers import SOLVERS

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def takers(program: LayerProgram) -> list[str]:
    return [name for name, solver in SOLVERS.items() if solver.refuses(program) is None]


def orthonormal(seed: int, P: int = 30, N: int = 8, M: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with ``AᵀA = I``, and positive targets (so that Ω is everything, and all sets are the same)."""
    rng = np.random.default_rng(seed)
    A = torch.from_numpy(np.linalg.qr(rng.standard_normal((P, N)))[0])
    return A, torch.from_numpy(0.1 + 3 * rng.random((P, M)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.budget])
def test_orthonormal_inputs_give_soft_thresholding(name, share, weighted):
    A, Y = orthonormal(0)
    omega = torch.linspace(0.5, 2.0, A.shape[1], dtype=torch.float64) if weighted else 1.0
    C = Y.T @ A
    penalty = share * float(C.abs().max())
    kind = KINDS[name]
    program = LayerProgram(A, Y, regularization=penalty, activation=kind.activation, consistency=kind.consistency, l1_weights=omega)
    expected = soft_threshold(C, penalty * program.l1_weights)
    for solver in takers(program):
        solution = solve(program, solver, tol=1e-9)
        assert torch.allclose(solution.weights, expected, atol=1e-4 * float(C.abs().max())), solver
        assert solution.objective == pytest.approx(program.objective(expected), rel=1e-6)


@pytest.mark.parametrize("inflation", [1.001, 1.05, 1.3])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.budget])
def test_orthonormal_inputs_and_a_budget_give_the_threshold_that_spends_it(name, inflation):
    A, Y = orthonormal(1)
    C = Y.T @ A
    least = float((Y - A @ C.T).norm())
    epsilon = min(inflation * least, 0.99 * float(Y.norm()))
    low, high = 0.0, float(C.abs().max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((A @ soft_threshold(C, middle).T - Y).norm()) < epsilon else (low, middle)
    expected = soft_threshold(C, low)
    kind = KINDS[name]
    program = LayerProgram(A, Y, epsilon=epsilon, activation=kind.activation, consistency=kind.consistency)
    for solver in takers(program):
        solution = solve(program, solver, tol=1e-8)
        assert solution.objective == pytest.approx(float(expected.abs().sum()), rel=1e-5), solver
        assert torch.allclose(solution.weights, expected, atol=2e-3 * float(C.abs().max())), solver


def test_one_input_one_neuron():
    """``min |w| s.t. (w − 2)² ≤ ε²`` is 2 − ε; with an off row of weight −1 nothing changes, with one of weight 1 the sets differ."""
    for solver in ("prox_admm", "cvxpy"):
        for last, relaxed, paper in ((-1.0, 1.5, 1.5), (None, 1.5, 1.5)):
            A = torch.tensor([[1.0]] if last is None else [[1.0], [last]], dtype=torch.float64)
            Y = torch.tensor([[2.0]] if last is None else [[2.0], [0.0]], dtype=torch.float64)
            for consistency, expected in (("relaxed", relaxed), ("paper", paper)):
                solution = solve(LayerProgram(A, Y, epsilon=0.5, consistency=consistency), solver, tol=1e-7)
                assert float(solution.weights) == pytest.approx(expected, rel=1e-5)
        # z = w on a row with target 2 and off on another: relaxed needs (w − 2)² + w² ≤ ε², the paper's set has w ≤ 0 alone
        A, Y = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[2.0], [0.0]], dtype=torch.float64)
        epsilon = 1.5
        solution = solve(LayerProgram(A, Y, epsilon=epsilon), solver, tol=1e-7)
        assert float(solution.weights) == pytest.approx((2 - math.sqrt(2 * epsilon**2 - 4)) / 2, rel=1e-4)
        assert solve(LayerProgram(A, Y, epsilon=epsilon, consistency="paper"), solver).status == "infeasible"


@kinds
@pytest.mark.parametrize("index", range(3))
def test_zero_is_optimal_exactly_from_the_level_on_that_says_so(kind, index):
    """``ε ≥ ‖Y‖``, or ``λ ≥ max |Aᵀy|/ω``: 0, exactly, proven; a little below, not 0."""
    A, _, W = trained_layer(index)
    Y = A @ W.T if kind.activation is None else (A @ W.T).clamp(min=0)
    zero = kind.program(A, Y, share=1.0 + 1e-9)
    nearly = kind.program(A, Y, share=0.98)
    for solver in takers(zero):
        solution = solve(zero, solver)
        assert solution.status == "optimal" and solution.objective == pytest.approx(zero.objective(torch.zeros(zero.shape)), rel=1e-9), solver
        assert not bool(solution.weights.any()), solver
        if not kind.one_sided:
            assert bool(solve(nearly, solver, tol=1e-7).weights.any()), solver


@pytest.mark.parametrize("name", ["relaxed-budget", "paper-budget", "linear-budget"])
def test_a_budget_of_next_to_nothing_leaves_the_dense_weights(name):
    """With full column rank on every neuron's Ω, only the dense weights meet the targets exactly."""
    kind = KINDS[name]
    A, W, _, _ = random_layer(3, "always_active")
    W = W.abs() + 0.05  # positive inputs: every row is in Ω
    Y = A @ W.T
    program = kind.program(A, Y, share=1e-5)
    for solver in takers(program):
        solution = solve(program, solver, tol=1e-4)
        assert solution.status == "optimal", solver
        assert torch.allclose(solution.weights, W, atol=1e-3 * float(W.max())), solver
        assert solution.objective <= float(W.sum())


@kinds
def test_no_budget_at_all_is_answered_honestly(kind):
    if not kind.budget:
        return
    A, W, _, _ = random_layer(0)
    Y = A @ W.T if kind.activation is None else (A @ W.T).clamp(min=0)
    program = LayerProgram(A, Y, epsilon=0.0, activation=kind.activation, consistency=kind.consistency)
    for solver in takers(program):
        solution = solve(program, solver, max_iter=60)
        assert (solution.status in ("optimal", "feasible")) == program.is_feasible(solution.weights)
        if solution.status == "infeasible":
            pytest.fail(f"{solver} calls infeasible what the dense weights meet")


@pytest.mark.parametrize("index", range(TRAINED_PROGRAMS))
def test_the_dense_weights_of_a_trained_layer_bound_its_optimum(index):
    """They are feasible, so no optimum is above them; and pruning finds something sparser."""
    W = trained_layer(index)[2]
    for name, kind in KINDS.items():
        program = trained_program(kind, index)
        assert program.is_feasible(W)
        solution = solve(program)
        assert solution.objective <= program.objective(W), name
        assert int((solution.weights != 0).sum()) < W.numel(), name


# -- Theorem 3 of the 2017 paper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "admm", "cvxpy"])
@pytest.mark.parametrize("sparsity", [2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_sparse_weights_are_recovered_from_gaussian_samples(sparsity, seed, solver):
    """``P = (11 s + 7) log N`` Gaussian samples of ``relu(A w)`` determine an s-sparse ``w``: both sets, and the algorithm of the paper."""
    N, M = 40, 2
    rng = np.random.default_rng([sparsity, seed])
    P = math.ceil((11 * sparsity + 7) * math.log(N))
    W = np.zeros((M, N))
    for m in range(M):
        W[m, rng.choice(N, sparsity, replace=False)] = rng.choice([-1, 1], sparsity) * rng.uniform(0.5, 2.0, sparsity)
    planted = torch.from_numpy(W)
    A = torch.from_numpy(rng.standard_normal((P, N)))
    Y = (A @ planted.T).clamp(min=0)
    for consistency in ("paper",) if solver == "admm" else ("paper", "relaxed"):
        solution = solve(LayerProgram(A, Y, epsilon=1e-4 * float(Y.norm()), consistency=consistency), solver)
        assert solution.status == "optimal"
        assert float((solution.weights - planted).norm()) <= 1e-3 * float(planted.norm())
        large = solution.weights.abs() > 1e-2
        assert torch.equal(large, planted != 0)
