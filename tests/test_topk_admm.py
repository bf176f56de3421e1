"""Programs with a number of nonzeros: planted supports, the best of all supports, refits by normal equations, every pattern."""

import itertools
import math

import pytest
import torch

import nettrim
from nettrim import ArgumentError, LayerProgram, UnsupportedProgramError
from nettrim.grams import Gram, moments
from nettrim.metrics import Metric
from nettrim.patterns import UNSTRUCTURED, Supports
from nettrim.solvers import support, topk_admm
from nettrim.solvers.refits import refit
from nettrim.solvers.support import normalised, search


def layer(P: int = 80, N: int = 8, M: int = 3, seed: int = 0, noise: float = 0.3, relu: bool = False):
    """Correlated inputs and targets of dense weights, a few of which matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = normal(P, 3) @ normal(3, N) + normal(P, N)
    W = normal(M, N) * torch.where(torch.rand(M, N, generator=generator) < 0.3, 1.0, noise)
    Z = A @ W.T
    return A, (Z.clamp(min=0) if relu else Z), W


def best_of_all(A: torch.Tensor, Y: torch.Tensor, kept: int) -> float:
    """The least misfit over all supports of so many weights: per neuron the least squares of each subset, then the best split between neurons."""
    N, M = A.shape[1], Y.shape[1]
    least = torch.full((M, N + 1), math.inf, dtype=torch.float64)
    for size in range(N + 1):
        for subset in itertools.combinations(range(N), size):
            chosen = A[:, list(subset)]
            for m in range(M):
                residual = Y[:, m] if not subset else Y[:, m] - chosen @ torch.linalg.lstsq(chosen, Y[:, m].unsqueeze(1)).solution.flatten()
                least[m, size] = min(float(least[m, size]), float(residual.square().sum()))
    return min(
        sum(float(least[m, size]) for m, size in enumerate(sizes))
        for sizes in itertools.product(range(N + 1), repeat=M)
        if sum(sizes) == kept
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kept", [4, 8])
def test_close_to_the_best_of_all_supports(seed, kept):
    A, Y, _ = layer(N=6, M=2, seed=seed)
    solution = nettrim.solve(LayerProgram(A, Y, nonzeros=kept, activation=None))
    best = best_of_all(A, Y, kept)
    assert int((solution.weights != 0).sum()) == kept
    assert best * (1 - 1e-9) <= 2 * solution.objective <= 1.15 * best
    assert solution.status == "feasible"
    assert solution.violation == 0
    assert solution.lower_bound == 0
    assert solution.solver == "topk_admm"


@pytest.mark.parametrize("relu", [False, True])
def test_a_planted_support_is_found(relu):
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(400, 20, generator=generator, dtype=torch.float64)
    W = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    W[W.abs() < 1] = 0
    Y = A @ W.T
    program = LayerProgram(A, Y.clamp(min=0) if relu else Y, nonzeros=int((W != 0).sum()), activation="relu" if relu else None)
    solution = nettrim.solve(program, initial=W + 0.1 * torch.randn(6, 20, generator=generator, dtype=torch.float64))
    assert torch.equal(solution.weights != 0, W != 0)
    assert solution.discrepancy <= (1e-2 if relu else 1e-9) * float(Y.norm())


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "block:2x4", "block:1x8"])
@pytest.mark.parametrize("relu", [False, True])
def test_patterns_are_kept_exactly(pattern, relu):
    A, Y, W = layer(N=16, M=4, relu=relu, seed=2)
    kept = nettrim.patterns.parse(pattern).kept((4, 16), 0.5)
    program = LayerProgram(A, Y, nonzeros=kept, activation="relu" if relu else None, pattern=pattern)
    solution = nettrim.solve(program, initial=W)
    mask = solution.weights != 0
    assert int(mask.sum()) == kept
    assert program.excess(solution.weights) == 0
    if pattern.startswith("block"):
        R, C = (int(number) for number in pattern.removeprefix("block:").split("x"))
        blocks = mask.view(4 // R, R, 16 // C, C).double().mean((1, 3))
        assert set(blocks.unique().tolist()) <= {0.0, 1.0}


def test_a_column_that_does_not_count_is_kept_and_fitted():
    A, _, W = layer(N=7)
    A[:, -1] = 1
    Y = A @ W.T
    weights = torch.ones(7, dtype=torch.float64)
    weights[-1] = 0
    solution = nettrim.solve(LayerProgram(A, Y, nonzeros=0, activation=None, l1_weights=weights))
    torch.testing.assert_close(solution.weights[:, -1], Y.mean(0))
    assert not bool(solution.weights[:, :-1].any())


def inner_product(M: int, seed: int = 0) -> torch.Tensor:
    root = torch.randn(M, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(M, dtype=torch.float64)


def test_a_metric_moves_weights_to_the_neurons_that_matter():
    A, Y, _ = layer(P=200, N=12, M=4, seed=4)
    plain = nettrim.solve(LayerProgram(A, Y, nonzeros=16, activation=None)).weights
    metric = torch.tensor([100.0, 1, 1, 1], dtype=torch.float64)
    for given_as in (metric, torch.diag(metric)):
        tilted = nettrim.solve(LayerProgram(A, Y, nonzeros=16, activation=None, metric=given_as)).weights
        assert int((tilted[0] != 0).sum()) > int((plain[0] != 0).sum())
        assert int((tilted != 0).sum()) == 16


@pytest.mark.parametrize("seed", range(4))
def test_with_a_metric_the_weights_are_the_best_on_their_support_and_beat_those_chosen_without(seed):
    A, Y, _ = layer(P=200, N=12, M=4, seed=seed)
    S = inner_product(4, seed)
    program = LayerProgram(A, Y, nonzeros=16, activation=None, metric=S)
    solution = nettrim.solve(program)
    W = solution.weights
    D = A @ W.T - Y
    assert solution.objective == pytest.approx(0.5 * float(((D @ S) * D).sum()))
    assert float((S @ D.T @ A)[W != 0].abs().max()) <= 1e-6 * float((S @ Y.T @ A).abs().max())  # stationary on the support
    torch.testing.assert_close(program.gradient(W), 2 * S @ D.T @ A)
    plain = nettrim.solve(LayerProgram(A, Y, nonzeros=16, activation=None))
    assert solution.objective < program.objective(plain.weights)
    assert solution.discrepancy >= plain.discrepancy * 0.99  # each is best at its own


def test_a_step_of_the_search_solves_its_linear_system(monkeypatch):
    monkeypatch.setattr("nettrim.solvers.support._ITERATIONS", 1)
    A, Y, _ = layer(P=60, N=6, M=3, seed=1)
    problem, column, row = normalised(A.T @ A, Metric.leading(inner_product(3)), torch.float64)
    C = row * (Y.T @ A) / column
    supports = Supports(UNSTRUCTURED, 18, torch.ones(6, dtype=torch.bool), None)
    start = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask, W = search(problem, C, supports, start)  # all weights may stay: nothing is cut off
    assert bool(mask.all())
    sigma, U, common = problem.outputs  # S with its own diagonal at the mean: that is what a search sees of it
    S = common * torch.eye(3, dtype=torch.float64) + U @ ((sigma - common).unsqueeze(1) * U.T)
    torch.testing.assert_close(S, problem.S.matrix + (common - problem.S.own).diag())
    assert 0 < len(sigma) < 3
    torch.testing.assert_close(S @ W @ problem.G + 0.02 * W, S @ C + 0.02 * start)


def test_supports_found_in_half_precision_are_as_good(monkeypatch):
    A, Y, _ = layer(P=600, N=40, M=20, seed=3)
    problem, column, row = normalised(A.T @ A, Metric.leading(inner_product(20)), torch.float32)
    C = row * (Y.T @ A) / column
    supports = Supports(UNSTRUCTURED, 160, torch.ones(40, dtype=torch.bool), None)
    found, used = {}, {}
    times = support._Bases.times
    for rough in (None, torch.bfloat16):
        products = []
        monkeypatch.setattr(support, "rough_dtype", lambda Q, rough=rough: rough)

        def noted(bases, X, Y, out, products=products):
            products.append(bases.Q.dtype)
            return times(bases, X, Y, out)

        monkeypatch.setattr(support._Bases, "times", noted)
        mask, W = search(problem, C, supports, torch.zeros_like(C))
        found[rough], used[rough] = problem.excess(C - refit(problem, C, mask, W).W @ problem.G), products
    assert set(used[None]) == {torch.float32}
    assert set(used[torch.bfloat16]) == {torch.bfloat16}
    assert found[torch.bfloat16] <= 1.03 * found[None]


@pytest.mark.parametrize(("offset", "condition", "share"), [(0, 1, 0.8), (3, 1, 0.8), (3, 2, 0.95)])
def test_every_renewal_lowers_the_misfit(offset, condition, share, monkeypatch):
    """By conjugate gradients too, on inputs that are far from 0 in the mean."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(1000, 120, generator=generator)
    U = torch.linalg.qr(torch.randn(120, 120, generator=generator)).Q
    A = A @ (U * torch.logspace(0, -condition, 120)) @ U.T
    A = A + offset * A.std(0) * torch.randn(120, generator=generator).sign()
    Y = (A @ torch.randn(120, 80, generator=generator)).relu()
    found, settle = [], topk_admm._settle

    def noted(problem, fit, renewals):
        for _ in range(renewals):
            found.append(problem.program.misfit(problem.true(fit.W)))
            fit = settle(problem, fit, 1)
        return fit

    monkeypatch.setattr(topk_admm, "_settle", noted)
    nettrim.solve(LayerProgram(A, Y, nonzeros=round(share * 9600)))
    assert len(found) > 3
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(found))


def test_only_the_support_given_is_kept():
    A, Y, W = layer(N=8, M=3)
    support = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    solution = nettrim.solve(LayerProgram(A, Y, nonzeros=8, activation=None, support=support), initial=W)
    assert not bool((solution.weights != 0)[~support].any())
    assert int((solution.weights != 0).sum()) == 8


def test_inputs_that_no_row_has_seen_keep_their_weights_where_they_are_kept():
    A, Y, W = layer(N=6, M=2)
    A = torch.cat([A, torch.zeros(80, 2, dtype=torch.float64)], 1)
    W = torch.cat([W, torch.ones(2, 2, dtype=torch.float64)], 1)
    solution = nettrim.solve(LayerProgram(A, Y, nonzeros=14, activation=None), initial=W)
    assert int((solution.weights != 0).sum()) == 14


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_budget_is_kept_with_fewer_weights_than_the_l1_program(relu, share):
    A, Y, W = layer(P=300, N=20, M=8, seed=7, relu=relu, noise=0.1)
    options = {"epsilon": share * float(Y.norm()), "activation": "relu" if relu else None}
    solution = nettrim.solve(LayerProgram(A, Y, penalty="l0", **options), initial=W)
    shrunk = nettrim.solve(LayerProgram(A, Y, **options))
    nonzeros = int((solution.weights != 0).sum())
    assert solution.discrepancy <= options["epsilon"] * (1 + 1e-12)
    assert solution.status == "feasible"
    assert solution.objective == nonzeros < int((shrunk.weights != 0).sum())


def test_a_budget_at_which_nothing_is_needed_keeps_nothing():
    A, Y, _ = layer()
    solution = nettrim.solve(LayerProgram(A, Y, penalty="l0", epsilon=1.01 * float(Y.norm()), activation=None))
    assert not bool(solution.weights.any())


def test_a_budget_that_only_dense_weights_keep_keeps_them():
    A, Y, W = layer()
    solution = nettrim.solve(LayerProgram(A, Y, penalty="l0", epsilon=1e-6 * float(Y.norm()), activation=None), initial=W)
    assert solution.status == "feasible"
    assert int((solution.weights != 0).sum()) == W.numel()


def test_a_budget_that_nothing_keeps_is_not_called_kept():
    A, _, _ = layer()
    Y = torch.randn(80, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    solution = nettrim.solve(LayerProgram(A, Y, penalty="l0", epsilon=1e-3, activation=None))
    assert solution.status == "infeasible"
    assert solution.least_distance is not None and solution.least_distance > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonzeros": 3, "epsilon": 0.1}, "epsilon and nonzeros given; expected exactly one"),
        ({}, "nothing given"),
        ({"penalty": "l0", "regularization": 1.0}, "penalty='l0' was given with regularization"),
        ({"nonzeros": 3, "consistency": "paper", "activation": "relu"}, "consistency='paper'"),
        ({"epsilon": 1.0, "pattern": "2:4"}, "pattern was given; it belongs to"),
        ({"epsilon": 1.0, "metric": torch.ones(3)}, "metric was given"),
        ({"epsilon": 1.0, "penalty": "l0", "metric": torch.ones(3)}, "belongs to programs with nonzeros"),
        ({"nonzeros": 3, "metric": torch.zeros(3), "activation": None}, "no inner product"),
        ({"nonzeros": 3, "metric": torch.eye(3).flip(0) * 2 + torch.ones(3, 3).triu(), "activation": None}, "no inner product"),
        ({"nonzeros": 3, "metric": torch.ones(2), "activation": None}, r"expected \(3, 3\) or \(3,\)"),
        ({"nonzeros": 3, "support": torch.ones(3, 8)}, "expected a tensor or a numpy array of bool"),
        ({"nonzeros": 3, "l1_weights": torch.ones(3, 8)}, r"shape \(M, N\)"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    A, Y, _ = layer()
    with pytest.raises(ArgumentError, match=message):
        LayerProgram(A, Y.clamp(min=0), **{"activation": None, **options})


@pytest.mark.parametrize("solver", ["prox_admm", "gram_admm", "admm", "osqp", "cvxpy"])
def test_the_convex_solvers_refuse_them_and_it_refuses_the_convex_programs(solver):
    A, Y, _ = layer()
    with pytest.raises(UnsupportedProgramError, match="topk_admm"):
        nettrim.solve(LayerProgram(A, Y, nonzeros=3, activation=None), solver)
    with pytest.raises(UnsupportedProgramError, match="it is for nonzeros="):
        nettrim.solve(LayerProgram(A, Y, epsilon=1.0, activation=None), "topk_admm")


def test_supports_are_the_same_for_the_same_program():
    A, Y, W = layer(N=16, M=5)
    solutions = [nettrim.solve(LayerProgram(A, Y, nonzeros=20, activation=None), initial=W).weights for _ in range(2)]
    assert torch.equal(*solutions)
    assert Supports(UNSTRUCTURED, 20, torch.ones(16, dtype=torch.bool), None).count(solutions[0]) == 20


def test_where_float32_finds_no_eigenvalues_float64_does(monkeypatch):
    """LAPACK fails now and then in float32 on singular matrices: the eigenvalues are then those of float64."""
    A = torch.randn(60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A[:, 5:] = 0
    quadratic = normalised(A.T @ A, None, torch.float32)[0]
    eigh = torch.linalg.eigh

    def fails_in_float32(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    values, vectors = quadratic.inputs
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close((vectors * values) @ vectors.T, quadratic.G.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("epsilon", "status"), ((1.0, "infeasible"), (40.0, "feasible")))
def test_a_budget_is_judged_on_the_rows_though_their_sums_are_known(epsilon: float, status: str) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(200, 20, generator=generator)
    Y = A @ torch.randn(6, 20, generator=generator).T + torch.randn(200, 6, generator=generator)
    asked = {"epsilon": epsilon, "penalty": "l0", "activation": None}
    found, plain = (nettrim.solve(LayerProgram(A, Y, moments=known, **asked)) for known in (moments(Gram(), [(A, Y)]), None))
    assert found.status == plain.status == status
    assert found.objective == plain.objective


def test_weights_of_a_program_that_came_with_its_sums_are_left_to_who_stores_them() -> None:
    A = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    Y = A @ torch.randn(6, 20, generator=torch.Generator().manual_seed(1)).T
    found = nettrim.solve(LayerProgram(A, Y, nonzeros=30, activation=None, moments=moments(Gram(), [(A, Y)])))
    plain = nettrim.solve(LayerProgram(A, Y, nonzeros=30, activation=None))
    assert math.isnan(found.objective) and found.status == "feasible"
    torch.testing.assert_close(found.weights, plain.weights)


@pytest.mark.parametrize("share", [0.15, 0.4])
@pytest.mark.parametrize("seed", range(2, 5))
def test_inputs_of_falling_size_are_no_start_for_the_search_to_be_lost_from(seed, share):
    """Sums in float32 say nothing of the smallest directions; weights that were fitted to their rounding were 400 times as large as the dense ones,
    and the search did not come back from them: by chance of the rounding, and with that of the threads, 70 times the misfit was left."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator))[0]
    A = torch.randn(800, 200, generator=generator) @ (torch.logspace(0, -4, 200)[:, None] * basis)
    Y = A @ torch.randn(100, 200, generator=generator).T
    program = LayerProgram(A, Y, nonzeros=int(share * 100 * 200), activation=None)
    nothing = program.misfit(torch.zeros(100, 200))
    assert program.misfit(nettrim.solve(program).weights) <= {0.15: 0.02, 0.4: 1e-3}[share] * nothing
