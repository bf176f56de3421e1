"""Lower bounds: valid for every dual point, tight at the optimum, and the conjugates that they come from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import KINDS, STRUCTURES, random_layer, random_program, trained_program
from scipy.optimize import minimize_scalar

from nettrim import LayerProgram, solve
from nettrim.residual import residual

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def feasible_weights(program: LayerProgram, rng: np.random.Generator, dense: torch.Tensor) -> torch.Tensor | None:
    """The dense weights moved as far from optimal as the constraints let them be, in a random direction."""
    direction = torch.from_numpy(rng.standard_normal(program.shape)) * dense.abs().mean()
    for size in (1.0, 0.3, 0.1, 0.03, 0.01, 0.001, 0.0):
        if program.is_feasible(dense + size * direction):
            return dense + size * direction
    return None


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(KINDS)),
    structure=st.sampled_from(STRUCTURES),
    seed=st.integers(0, 10_000),
    near=st.sampled_from(["noise", "residual", "huge", "tiny"]),
)
def test_weak_duality_for_any_dual_point_and_any_feasible_weights(name, structure, seed, near):
    program = random_program(KINDS[name], seed, structure)
    rng = np.random.default_rng(seed)
    W = feasible_weights(program, rng, random_layer(seed, structure)[1])
    assert W is not None
    noise = torch.from_numpy(rng.standard_normal(program.targets.shape))
    point = torch.from_numpy(rng.standard_normal(program.shape)) * W.abs().mean()
    theta = {
        "noise": noise,
        "residual": residual(program.inputs @ point.T, program.targets, program.upper, relu=program.relu),
        "huge": 1e12 * noise,
        "tiny": 1e-12 * noise,
    }[near]
    bound = program.lower_bound(theta)
    # one-sided constraints hold to a tolerance here, and what it buys is at most ⟨θ, excess⟩: the dense weights meet them exactly
    allowance = 1e-3 if program.one_sided else 1e-9
    assert 0 <= bound <= program.objective(W) * (1 + allowance)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(KINDS)), seed=st.integers(0, 300), free=st.sampled_from(["column", "mixed", "two", "all"]))
def test_weak_duality_with_unpenalised_entries(name, seed, free):
    """Free for all neurons, for some, several columns at once, or everywhere."""
    A, W, _, _ = random_layer(seed)
    kind = KINDS[name]
    Y = A @ W.T if kind.activation is None else (A @ W.T).clamp(min=0)
    weights = torch.ones(W.shape, dtype=torch.float64)
    if free == "column":
        weights[:, -1] = 0
    elif free == "mixed":
        weights[0, -1] = weights[1, 0] = 0
    elif free == "two":
        weights[:, :2] = 0
    else:
        weights[:] = 0
    program = kind.program(A, Y, share=0.1, l1_weights=weights)
    rng = np.random.default_rng(seed)
    for scale in (1e-3, 1.0):
        theta = scale * residual(A @ torch.from_numpy(rng.standard_normal(W.shape)).T, Y, relu=program.relu)
        assert program.lower_bound(theta) <= program.objective(W) * (1 + 1e-9)


def test_an_entry_that_is_free_for_one_neuron_alone_is_no_licence_to_ignore_it():
    """One neuron explains its targets by a free entry at no cost: nothing above the other's optimum can be proven."""
    A = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.5]], dtype=torch.float64)
    Y = torch.stack([torch.full((3,), 5.0, dtype=torch.float64), A[:, 1] * 0.1], 1)
    weights = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    program = LayerProgram(A, Y, epsilon=0.01, activation=None, l1_weights=weights)
    best = torch.tensor([[5.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    assert program.is_feasible(best)
    assert program.lower_bound(-Y) <= program.objective(best) * (1 + 1e-12)
    for solver in ("prox_admm", "gram_admm", "cvxpy"):
        solution = solve(program, solver, tol=1e-6)
        assert solution.status == "optimal"
        assert solution.lower_bound <= program.objective(best) * (1 + 1e-9)


@pytest.mark.parametrize("free", [False, True])
def test_a_dead_neuron_with_a_free_bias_and_a_negative_upper_bound(free):
    """``z ≤ −1`` everywhere costs nothing with a free bias, and something without: the bound knows which."""
    rng = np.random.default_rng(0)
    A = torch.from_numpy(np.c_[rng.standard_normal((20, 3)), np.ones(20)])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0 if free else 1.0], dtype=torch.float64)
    upper = -torch.ones(20, 1, dtype=torch.float64)
    program = LayerProgram(A, torch.zeros(20, 1), epsilon=1.0, consistency="paper", upper=upper, l1_weights=weights)
    bound = program.lower_bound(torch.ones(20, 1, dtype=torch.float64))
    bias = torch.tensor([[0.0, 0.0, 0.0, -1.0]], dtype=torch.float64)
    assert program.is_feasible(bias)
    assert bound <= program.objective(bias)
    if not free:
        assert bound > 0.1


@kinds
@pytest.mark.parametrize("index", range(3))
def test_the_bound_does_not_depend_on_the_scale_of_the_dual_point(kind, index):
    program = trained_program(kind, index)
    rng = np.random.default_rng(index)
    W = torch.from_numpy(rng.standard_normal(program.shape)) * 0.1
    theta = residual(program.inputs @ W.T, program.targets, program.upper, relu=program.relu)
    bound = program.lower_bound(theta)
    for scale in (1e-6, 1e6):
        assert program.lower_bound(scale * theta) == pytest.approx(bound, rel=1e-6, abs=1e-12)
    assert program.lower_bound(torch.zeros_like(theta)) == 0
    assert program.lower_bound(-theta) >= 0


@kinds
def test_the_bound_is_tight_at_the_optimal_multipliers(kind):
    """Strong duality: the residual at the optimum proves it (paper's set: with the multipliers of its inequalities, so by the oracle)."""
    program = random_program(kind, 1)
    solution = solve(program, "cvxpy", tol=1e-8)
    assert solution.lower_bound == pytest.approx(solution.objective, rel=1e-6)
    if not kind.one_sided:
        theta = residual(program.inputs @ solution.weights.T, program.targets, relu=program.relu)
        assert program.lower_bound(theta) == pytest.approx(solution.objective, rel=1e-3)


def test_the_bounds_formula_entry_by_entry():
    """One neuron, small enough to write out: the largest of the dual function over the scale of θ."""
    A = torch.tensor([[2.0], [1.0], [1.0]], dtype=torch.float64)
    Y = torch.tensor([[4.0], [1.0], [0.0]], dtype=torch.float64)
    theta = torch.tensor([[-1.0], [0.5], [0.25]], dtype=torch.float64)
    correlation = abs(-2.0 + 0.5 + 0.25)
    linear, square = 4.0 - 0.5, 1 + 0.25 + 0.0625
    s = 1 / correlation
    assert LayerProgram(A, Y, epsilon=0.5).lower_bound(theta) == pytest.approx(s * linear - 0.5 * s * math.sqrt(square))
    on = square - 0.0625
    assert LayerProgram(A, Y, epsilon=0.5, consistency="paper").lower_bound(theta) == pytest.approx(s * linear - 0.5 * s * math.sqrt(on))
    upper = torch.tensor([[9.0], [9.0], [-2.0]], dtype=torch.float64)
    program = LayerProgram(A, Y, epsilon=0.5, consistency="paper", upper=upper)
    assert program.lower_bound(theta) == pytest.approx(s * (linear + 0.5) - 0.5 * s * math.sqrt(on))
    s = min(3.0 / correlation, linear / square)
    assert LayerProgram(A, Y, regularization=3.0).lower_bound(theta) == pytest.approx(s * linear - 0.5 * s * s * square)
    negative = torch.tensor([[-1.0], [0.5], [-7.0]], dtype=torch.float64)  # clipped at 0 off Ω
    s = 1 / 1.5
    assert LayerProgram(A, Y, epsilon=0.5).lower_bound(negative) == pytest.approx(s * linear - 0.5 * s * math.sqrt(1.25))


@settings(max_examples=60, deadline=None)
@given(theta=st.floats(-3, 3), y=st.one_of(st.just(0.0), st.floats(0.125, 4)))
def test_the_misfits_conjugate(theta, y):
    """``f*(θ) = sup_z θz − f(z)``: ``½θ² + θy`` on Ω, ``½θ²`` for ``θ ≥ 0`` off Ω, +∞ for ``θ < 0`` there."""

    def negative(z: float) -> float:
        d = float(residual(torch.tensor([[z]], dtype=torch.float64), torch.tensor([[y]], dtype=torch.float64)))
        return 0.5 * d * d - theta * z

    if y == 0 and theta < 0:
        assert -negative(-1e6) > -1e5 * theta
        return
    found = -minimize_scalar(negative, bounds=(-20, 20), method="bounded", options={"xatol": 1e-9}).fun
    assert found == pytest.approx(0.5 * theta**2 + theta * y, abs=1e-6)
