"""Data that leave a solver nothing but rounding: no bound is proven by it, no factorisation fails, nothing feasible is called infeasible."""

import pytest
import torch
from networks import seeded
from torch import Tensor, nn

import nettrim
from nettrim import ArgumentError, LayerProgram, solve


def constant_rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every row the same, so that the unpenalised bias alone gives the targets: the optimum is 0."""
    A = torch.tensor([0.1, 0.2, 0.3, 0.9, 1.0]).expand(50, -1).contiguous()
    W = torch.randn(3, 5, generator=seeded(seed))
    return A, W, A @ W.T


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("seed", range(4))
def test_a_bias_that_does_it_alone(seed, activation):
    A, W, Y = constant_rows(seed)
    Y = Y.clamp(min=0) if activation else Y
    omega = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    budget = LayerProgram(A, Y, activation=activation, l1_weights=omega, epsilon=0.01 * float(Y.norm()))
    solution = solve(budget, initial=W)
    assert (solution.objective, solution.lower_bound, solution.status) == (0.0, 0.0, "optimal")
    penalised = LayerProgram(A, Y, activation=activation, l1_weights=omega, regularization=0.1)
    for solver in ("auto", "prox_admm"):
        solution = solve(penalised, solver)
        assert solution.lower_bound <= solution.objective + 1e-12
        assert solution.objective < 1e-9


def test_constant_inputs_through_prune():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    report = nettrim.prune(model, torch.randn(1, 10).expand(50, -1), epsilon=0.1, penalty="l1", bias_weight=0).report
    assert [(layer.nonzeros, layer.status) for layer in report.layers] == [(0, "optimal"), (0, "optimal")]


@pytest.mark.parametrize("seed", range(10))
def test_an_optimum_of_zero_with_a_free_bias_is_proven(seed):
    A = torch.cat([torch.randn(60, 5, generator=seeded(seed)), torch.ones(60, 1)], 1)
    W = torch.randn(3, 6, generator=seeded(seed + 100))
    W[:, :5] = 0
    omega = torch.tensor([1.0] * 5 + [0.0])
    Y = A @ W.T
    solution = solve(LayerProgram(A, Y, activation=None, l1_weights=omega, epsilon=0.02 * float(Y.norm())))
    assert (solution.objective, solution.gap, solution.status) == (0.0, 0.0, "optimal")


def test_almost_collinear_free_columns_prove_nothing():
    u, x = torch.randn(2, 50, 1, dtype=torch.float64, generator=seeded(0))
    A = torch.cat([torch.ones_like(u), 1 + 1e-8 * u, x], 1)
    W = torch.tensor([[1 - 1e8, 1e8, 0.0]], dtype=torch.float64)
    Y = A @ W.T
    program = LayerProgram(
        A, Y, activation=None, l1_weights=torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), epsilon=0.05 * float(Y.norm())
    )
    assert program.is_feasible(W) and program.objective(W) == 0
    for solver in ("auto", "prox_admm", "cvxpy"):
        solution = solve(program, solver)
        assert solution.status != "infeasible"
        assert solver == "cvxpy" or solution.lower_bound <= 1e-9  # no weights that are optimal cost anything


def test_a_neuron_without_any_penalty():
    A, Y = torch.randn(60, 6, generator=seeded(0)), torch.randn(60, 3, generator=seeded(1))
    omega = torch.ones(3, 6)
    omega[0] = 0
    for activation, targets in ((None, Y), ("relu", Y.clamp(min=0))):
        program = LayerProgram(A, targets, activation=activation, l1_weights=omega, regularization=2)
        solution, reference = solve(program), solve(program, "cvxpy", tol=1e-5)
        assert solution.status == "optimal"
        assert solution.objective == pytest.approx(reference.objective, rel=1e-4)


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_duplicated_columns_never_fail_to_factorise(seed, dtype, activation):
    for P, N, M in ((1, 3, 2), (20, 4, 5), (12, 12, 2)):
        A = torch.randn(P, N, dtype=dtype, generator=seeded(seed))
        A[:, -1] = A[:, 0]
        Y = torch.randn(P, M, dtype=dtype, generator=seeded(seed + 50))
        Y = Y.clamp(min=0) if activation else Y
        for epsilon in (0.3, 0.9):
            program = LayerProgram(A, Y, epsilon=epsilon * float(Y.norm()) + 1e-9, activation=activation)
            solution = solve(program, max_iter=600)
            assert (solution.status in ("optimal", "feasible")) == program.is_feasible(solution.weights)


def test_nothing_feasible_is_called_infeasible():
    A, W = torch.randn(40, 8, dtype=torch.float64, generator=seeded(0)), torch.randn(3, 8, dtype=torch.float64, generator=seeded(1))
    Y = A @ W.T
    for max_iter in (1, 5, 50, None):
        for epsilon in (1e-5, 1e-8):
            program = LayerProgram(A, Y, epsilon=epsilon * float(Y.norm()), activation=None)
            assert solve(program, max_iter=max_iter).status != "infeasible"
    omega = torch.ones(8, dtype=torch.float64)
    omega[0] = 1e-9
    Z = Y.clamp(min=0)
    assert solve(LayerProgram(A, Z, epsilon=0.1 * float(Z.norm()), l1_weights=omega), max_iter=100).status != "infeasible"


def test_a_gram_matrix_that_overstates_the_least_misfit():
    """Two columns 1e-5 apart whose difference is what matters: the rows decide, and the answer is the optimum."""
    a, b = torch.randn(2, 30, dtype=torch.float64, generator=seeded(3))
    A, W = torch.stack([a, a + 1e-5 * b], 1), torch.tensor([[1 - 1e5, 1e5]], dtype=torch.float64)
    Y = A @ W.T
    solution = solve(LayerProgram(A, Y, epsilon=0.1 * float(Y.norm()), activation=None))
    assert solution.status == "optimal"
    layer = nn.Linear(6, 4).double()
    X = torch.randn(100, 6, generator=seeded(4)).double()
    X[:, 0] += 1e6
    assert nettrim.prune(layer, X, epsilon=0.1, penalty="l1").report.layers[0].status == "optimal"


@pytest.mark.parametrize("epsilon", [1e-200, 1e200])
def test_a_budget_whose_square_float64_does_not_hold(epsilon):
    with pytest.raises(ArgumentError, match="expected one whose square float64 holds"):
        LayerProgram(torch.ones(2, 1), torch.ones(2, 1), epsilon=epsilon)


# -- the user's model ---------------------------------------------------------------------------------------------------------------


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def test_a_model_that_counts_its_calls():
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.net = small_model()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.total = self.total + x.sum()
            return self.net(x)

    model = Counting()
    result = nettrim.prune(model, torch.randn(60, 8), epsilon=0.1)
    for network in (model, result.model):
        assert float(network.calls) == 0 and float(network.total) == 0


def test_pruning_under_inference_mode_gives_parameters_that_train():
    model = small_model()
    with torch.inference_mode():
        result = nettrim.prune(model, torch.randn(60, 8), epsilon=0.1)
    result.model(torch.randn(2, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


def test_a_model_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        model = small_model()
    with pytest.raises(ArgumentError, match=r"made under torch.inference_mode\(\)"):
        nettrim.prune(model, torch.randn(20, 8), epsilon=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_objective_and_gap_are_those_of_the_stored_weights(dtype):
    model = small_model().to(dtype)
    for epsilon in (0.1, 0.3):
        result = nettrim.prune(model, torch.randn(200, 8).to(dtype), epsilon=epsilon, mode="parallel", tol=1e-4, penalty="l1")
        for layer in result.report.layers:
            module = result.model.get_submodule(layer.name)
            norm = sum(float(parameter.double().abs().sum()) for parameter in module.parameters())
            assert layer.objective == pytest.approx(norm, rel=1e-6)
            assert layer.gap == pytest.approx(abs(norm - layer.lower_bound) / norm, rel=1e-3, abs=1e-7)
            assert (layer.status == "optimal") == (layer.gap <= 1e-4)
