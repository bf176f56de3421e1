"""A layer program's figures against naive numpy, autograd and finite differences; and what it refuses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import KINDS, STRUCTURES, audit, random_layer, random_program, trained_program

from nettrim import ArgumentError, LayerProgram, NetTrimError
from nettrim.residual import ONE_SIDED_TOLERANCE, residual

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def some_weights(program: LayerProgram, seed: int, spread: float = 1.0) -> torch.Tensor:
    """Weights of the size that the inputs ask for, a third of them zero."""
    rng = np.random.default_rng(seed)
    size = float(program.targets.double().norm()) / max(float(program.inputs.double().norm()), 1e-300)
    W = rng.standard_normal(program.shape) * (rng.random(program.shape) < 0.67) * size * spread
    return torch.from_numpy(W).to(program.inputs.dtype)


@kinds
@pytest.mark.parametrize("structure", STRUCTURES)
def test_figures_are_those_of_naive_numpy(kind, structure):
    program = random_program(kind, 1, structure)
    W = some_weights(program, 3)
    expected, measures = audit(program, W), program.measure(W)
    assert program.objective(W) == pytest.approx(expected.objective, rel=1e-9)
    assert program.misfit(W) == pytest.approx(expected.misfit, rel=1e-9)
    assert program.discrepancy(W) == pytest.approx(expected.discrepancy, rel=1e-9)
    assert measures.distance == pytest.approx(expected.distance, rel=1e-9)
    assert program.one_sided_excess(measures) == pytest.approx(
        expected.one_sided / (program.epsilon or float(program.targets.norm()) or 1.0), rel=1e-9, abs=1e-300
    )
    assert torch.equal(program.omega, program.targets > 0 if kind.activation else torch.ones_like(program.targets, dtype=torch.bool))


@kinds
def test_figures_of_float32_data_are_those_of_the_same_numbers_in_float64(kind):
    program = random_program(kind, 2, "plain", dtype=torch.float32)
    assert program.inputs.dtype == torch.float32
    W = some_weights(program, 0)
    expected = audit(program, W)
    assert program.objective(W) == pytest.approx(expected.objective, rel=1e-12)
    assert program.discrepancy(W) == pytest.approx(expected.discrepancy, rel=1e-12)


def test_chunks_of_rows_change_nothing(monkeypatch):
    program = random_program(KINDS["paper-budget"], 0, "cascade")
    W, theta = some_weights(program, 1), torch.randn(program.targets.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = program.measure(W), program.gradient(W), program.lower_bound(theta)
    monkeypatch.setattr("nettrim.rows.CHUNK_ELEMENTS", 7 * sum(program.shape))
    assert len(list(program.row_chunks())) > 3
    pieces = program.measure(W), program.gradient(W), program.lower_bound(theta)
    assert pieces[0].distance == pytest.approx(whole[0].distance, rel=1e-12)
    assert torch.allclose(pieces[1], whole[1], rtol=1e-12)
    assert pieces[2] == pytest.approx(whole[2], rel=1e-12)


# -- the misfit -------------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("index", range(3))
def test_gradient_is_that_of_autograd_and_of_finite_differences(kind, index):
    program = trained_program(kind, index)
    W = some_weights(program, index).requires_grad_(True)
    A, Y = program.inputs, program.targets
    Z = A @ W.T
    off = torch.zeros_like(Z) if kind.one_sided else Z.clamp(min=0).square()
    F = torch.where(Y > 0, (Z - Y).square(), off).sum() if kind.activation else (Z - Y).square().sum()
    (expected,) = torch.autograd.grad(F, W)
    W = W.detach()
    gradient = program.gradient(W)
    assert program.misfit(W) == pytest.approx(float(F.detach()), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    direction = some_weights(program, index + 50)
    step = 1e-6
    slope = (program.misfit(W + step * direction) - program.misfit(W - step * direction)) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), structure=st.sampled_from(STRUCTURES), spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]))
def test_the_misfit_bounds_the_squared_discrepancy(seed, structure, spread):
    """``‖relu(Z) − Y‖² ≤ F(W)``; for the paper's set with V = 0 the misfit and the one-sided excess do together."""
    for name in ("relaxed-budget", "paper-budget"):
        program = random_program(KINDS[name], seed, structure)
        measures = program.measure(some_weights(program, seed, spread))
        if program.upper is None:
            assert measures.discrepancy <= measures.distance * (1 + 1e-12) + 1e-300


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.floats(0, 1))
def test_the_misfit_is_convex(seed, t):
    for kind in KINDS.values():
        program = random_program(kind, seed % 7, "plain")
        a, b = some_weights(program, seed, 2.0), some_weights(program, seed + 1)
        between = t * program.misfit(a) + (1 - t) * program.misfit(b)
        assert program.misfit(t * a + (1 - t) * b) <= between * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_papers_set_is_inside_the_relaxed_one(seed):
    """Weights that are feasible for ``C_ε(A, Y, 0)`` are feasible for the relaxed set, with the same discrepancy bound."""
    A, W, _, _ = random_layer(seed)
    Y = (A @ W.T).clamp(min=0)
    near = W * (1 + 0.02 * torch.randn(W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    epsilon = 1.2 * LayerProgram(A, Y, epsilon=1.0, consistency="paper").measure(near).distance
    paper, relaxed = (LayerProgram(A, Y, epsilon=epsilon, consistency=c) for c in ("paper", "relaxed"))
    for point in (near, W):
        if paper.is_feasible(point):
            assert relaxed.is_feasible(point)
            assert relaxed.discrepancy(point) <= epsilon
    assert paper.is_feasible(W) and relaxed.is_feasible(W)


def test_residual_shapes_and_cases():
    Z = torch.tensor([[2.0, -1.0, 3.0, 0.2]])
    Y = torch.tensor([[1.0, 4.0, 0.0, 0.0]])
    V = torch.tensor([[9.0, 9.0, 1.0, 0.5]])
    assert torch.equal(residual(Z, Y), torch.tensor([[1.0, -5.0, 3.0, 0.2]]))
    assert torch.equal(residual(Z, Y, V), torch.tensor([[1.0, -5.0, 2.0, 0.0]]))
    assert torch.equal(residual(Z, Y, relu=False), Z - Y)


# -- feasibility ------------------------------------------------------------------------------------------------------------------


def test_the_budget_is_kept_to_rounding_only():
    A, Y = torch.eye(2, dtype=torch.float64), torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    for consistency in ("paper", "relaxed"):
        program = LayerProgram(A, Y, epsilon=5.0, consistency=consistency)
        zero = torch.zeros(1, 2)
        assert program.is_feasible(zero) and program.violation(zero) == 0
        over = LayerProgram(A, Y, epsilon=4.99999, consistency=consistency)
        assert not over.is_feasible(zero)
        assert over.violation(zero) == pytest.approx(1e-5 / 4.99999, rel=1e-6)


def test_one_sided_constraints_are_kept_to_the_published_tolerance():
    A = torch.eye(2, dtype=torch.float64)
    Y = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    program = LayerProgram(A, Y, epsilon=0.5, consistency="paper", upper=torch.tensor([[0.0], [-0.3]], dtype=torch.float64))
    excess = 0.5 * ONE_SIDED_TOLERANCE
    assert program.is_feasible(torch.tensor([[1.0, -0.3 + 0.9 * excess]], dtype=torch.float64))
    assert not program.is_feasible(torch.tensor([[1.0, -0.3 + 1.1 * excess]], dtype=torch.float64))
    assert not program.is_feasible(torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_a_zero_budget_and_zero_targets():
    A = torch.eye(2, dtype=torch.float64)
    exact = LayerProgram(A, torch.tensor([[1.0], [0.0]], dtype=torch.float64), epsilon=0.0)
    assert exact.is_feasible(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    assert exact.violation(torch.tensor([[0.5, 0.0]], dtype=torch.float64)) == math.inf
    silent = LayerProgram(A, torch.zeros(2, 1), regularization=1.0, consistency="paper")
    assert silent.is_feasible(torch.zeros(1, 2)) and not silent.is_feasible(torch.ones(1, 2))


@kinds
def test_weights_that_are_not_finite_are_not_feasible(kind):
    program = random_program(kind, 0)
    assert not program.is_feasible(torch.full(program.shape, math.nan))
    assert not program.is_feasible(torch.full(program.shape, math.inf))


# -- arguments --------------------------------------------------------------------------------------------------------------------


def test_numpy_arrays_and_tensors_are_the_same_program():
    A, W, _, _ = random_layer(0)
    Y = (A @ W.T).clamp(min=0)
    tensors = LayerProgram(A, Y, epsilon=1.0, l1_weights=torch.arange(1.0, A.shape[1] + 1, dtype=torch.float64))
    arrays = LayerProgram(A.numpy(), Y.numpy(), epsilon=1.0, l1_weights=np.arange(1.0, A.shape[1] + 1))
    strided = LayerProgram(np.asfortranarray(A.numpy()), Y.numpy()[:, :], epsilon=np.float64(1), l1_weights=tensors.l1_weights)
    for other in (arrays, strided):
        assert torch.equal(other.inputs, tensors.inputs) and torch.equal(other.targets, tensors.targets)
        assert other.objective(W) == tensors.objective(W) and other.epsilon == 1.0


@pytest.mark.parametrize(("given_dtype", "kept"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_data_of_low_precision_is_computed_in_float32(given_dtype, kept):
    program = LayerProgram(torch.ones(3, 2, dtype=given_dtype), torch.ones(3, 1), epsilon=1.0)
    assert program.inputs.dtype == program.targets.dtype == program.l1_weights.dtype == kept


def test_a_program_never_writes_to_what_it_was_given():
    A, Y = np.ones((3, 2)), np.ones((3, 1))
    A.flags.writeable = Y.flags.writeable = False
    program = LayerProgram(A, Y, epsilon=0.1)
    program.lower_bound(torch.ones(3, 1, dtype=torch.float64))
    program.measure(torch.ones(1, 2))
    assert (A == 1).all() and (Y == 1).all()


def refused(match: str, *args: object, **options: object) -> None:
    with pytest.raises(ArgumentError, match=match) as error:
        LayerProgram(*args, **options)
    assert isinstance(error.value, NetTrimError) and isinstance(error.value, ValueError)


def test_refusals_say_what_was_given_and_what_was_expected():
    A, Y = torch.ones(4, 3), torch.ones(4, 2)
    refused(r"nothing given; expected exactly one", A, Y)
    refused(r"exactly one", A, Y, epsilon=1.0, regularization=1.0)
    refused(r"epsilon=-1.0; expected a finite number at least 0", A, Y, epsilon=-1)
    refused(r"epsilon=nan", A, Y, epsilon=math.nan)
    refused(r"epsilon=inf", A, Y, epsilon=math.inf)
    refused(r"regularization=0.0; expected a finite number above 0", A, Y, regularization=0)
    refused(r"penalty='l2'; expected 'l1' or 'l0'", A, Y, epsilon=1.0, penalty="l2")
    refused(r"activation='gelu'; expected 'relu' or None", A, Y, epsilon=1.0, activation="gelu")
    refused(r"consistency='strict'; expected 'relaxed' or 'paper'", A, Y, epsilon=1.0, consistency="strict")
    refused(r"inputs have shape \(4, 3\) and targets \(5, 2\); expected \(P, N\) and \(P, M\)", A, torch.ones(5, 2), epsilon=1.0)
    refused(r"expected \(P, N\) and \(P, M\)", A[0], Y, epsilon=1.0)
    refused(r"empty", torch.ones(0, 3), torch.ones(0, 2), epsilon=1.0)
    refused(r"empty", A, torch.ones(4, 0), epsilon=1.0)
    refused(r"inputs is a list; expected a torch tensor or a numpy array", A.tolist(), Y, epsilon=1.0)
    refused(r"targets has dtype torch.int64; expected a floating-point dtype", A, Y.long(), epsilon=1.0)
    refused(r"inputs holds NaN or infinity", A * math.nan, Y, epsilon=1.0)
    refused(r"targets holds NaN or infinity", A, Y / 0, epsilon=1.0)
    refused(r"targets hold negative numbers.*activation=None", A, -Y, epsilon=1.0)
    assert LayerProgram(A, -Y, epsilon=1.0, activation=None).shape == (2, 3)


def test_refusals_of_upper_and_of_l1_weights():
    A, Y = torch.ones(4, 3), torch.ones(4, 2)
    refused(r"upper was given; it belongs to consistency='paper'", A, Y, epsilon=1.0, upper=Y)
    refused(r"upper was given", A, Y, epsilon=1.0, upper=Y, consistency="paper", activation=None)
    refused(r"upper has shape \(4, 3\); expected that of targets, \(4, 2\)", A, Y, epsilon=1.0, upper=A, consistency="paper")
    refused(r"upper holds NaN", A, Y, epsilon=1.0, upper=Y * math.nan, consistency="paper")
    refused(r"l1_weights have shape \(2,\); expected a number, \(3,\) or \(2, 3\)", A, Y, epsilon=1.0, l1_weights=torch.ones(2))
    refused(r"l1_weights hold negative numbers", A, Y, epsilon=1.0, l1_weights=-1.0)
    refused(r"l1_weights holds NaN", A, Y, epsilon=1.0, l1_weights=torch.full((3,), math.nan))


@kinds
def test_the_description_names_the_kind(kind):
    words = random_program(kind, 0).description
    assert ("budget" if kind.budget else "penalised") in words
    assert ("no-ReLU" if kind.activation is None else kind.consistency) in words
