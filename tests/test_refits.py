"""The weights on a support: normal equations, factors and conjugate gradients alike, half precision, and when conjugate gradients may stop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_topk_admm import inner_product, layer

from nettrim.metrics import Metric
from nettrim.patterns import UNSTRUCTURED, Supports
from nettrim.solvers import refits, support
from nettrim.solvers.refits import refit
from nettrim.solvers.support import Quadratic, normalised, search


@given(seed=st.integers(0, 200), share=st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=25)
def test_a_refit_meets_the_normal_equations_on_its_support(seed, share):
    A, Y, _ = layer(N=10, M=4, seed=seed)
    norms = A.norm(dim=0)
    G, C = (A / norms).T @ (A / norms), Y.T @ A / norms
    problem = Quadratic(G, None, torch.float64)
    mask = torch.rand(4, 10, generator=torch.Generator().manual_seed(seed)) < share
    fit = refit(problem, C, mask, costs=True)
    assert not bool(fit.W[~mask].any())
    assert float((fit.W @ G - C)[mask].abs().max() if bool(mask.any()) else 0) <= 1e-7 * float(C.abs().max())
    assert problem.value(fit.W, C) == pytest.approx(float((fit.W * (0.5 * fit.W @ G - C)).sum()))
    # the cost of a removal is what the misfit rises by
    for m, j in torch.nonzero(mask)[:4].tolist():
        without = mask.clone()
        without[m, j] = False
        rise = problem.value(refit(problem, C, without).W, C) - problem.value(fit.W, C)
        assert rise == pytest.approx(float(fit.cost[m, j]), rel=1e-5, abs=1e-9)


def test_conjugate_gradients_refit_as_factors_do(monkeypatch):
    A, Y, _ = layer(N=12, M=5, seed=3)
    norms = A.norm(dim=0)
    G, C = (A / norms).T @ (A / norms), Y.T @ A / norms
    problem = Quadratic(G, None, torch.float64)
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    exact = refit(problem, C, mask)
    monkeypatch.setattr(refits, "_CHOLESKY_WORK", 0.0)
    torch.testing.assert_close(refit(problem, C, mask).W, exact.W, rtol=1e-6, atol=1e-6 * float(exact.W.abs().max()))


def posed(share: float, metric: bool):
    """A layer of 30 neurons and 60 dependent inputs with a support that was searched: its exact fit, and the least value of all weights."""
    A, _, W = layer(P=900, N=60, M=30, seed=5)
    A[:, 30:] = A[:, :30] + 0.5 * A[:, 30:]
    S = inner_product(30) + 5 * torch.eye(30, dtype=torch.float64) if metric else None
    problem, column, row = normalised(A.T @ A, None if S is None else Metric.of(S), torch.float32)
    C = row * (W @ A.T @ A) / column
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "rough_dtype", lambda Q: None)  # the same support and start on every processor
        mask, start = search(problem, C, Supports(UNSTRUCTURED, round(share * 1800), torch.ones(60, dtype=torch.bool), None), torch.zeros_like(C))
    chosen, exact = mask.flatten(), torch.zeros(30 * 60, dtype=torch.float64)
    S = torch.eye(30, dtype=torch.float64) if problem.S is None else problem.S.matrix
    exact[chosen] = torch.linalg.solve(torch.kron(S, problem.G)[chosen][:, chosen], (S @ C).flatten()[chosen])
    least = problem.value(C @ torch.linalg.inv(problem.G), C)
    return problem, C, mask, start, problem.value(exact.view(30, 60), C), least


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_conjugate_gradients_stop_where_little_of_the_misfit_is_left_to_gain(share, metric, half, monkeypatch):
    """Measured by what the support costs, which at mild sparsities is far less than the output (4e-6 of it at 0.9)."""
    problem, C, mask, start, best, least = posed(share, metric)
    monkeypatch.setattr(refits, "_CHOLESKY_WORK", 0.0)
    monkeypatch.setattr(refits, "rough_dtype", lambda like: half)
    found = refit(problem, C, mask, start)
    assert not bool(found.W[~mask].any())
    assert problem.value(found.W, C) - best <= 0.02 * (best - least)


@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_steps_in_half_precision_that_lead_astray_are_taken_back(factor, monkeypatch):
    problem, C, mask, start, best, least = posed(0.3, True)
    monkeypatch.setattr(refits, "_CHOLESKY_WORK", 0.0)
    monkeypatch.setattr(refits, "rough_dtype", lambda like: torch.bfloat16)
    product, astray = refits._Normal.__call__, []

    def wrong(operator, X):
        if operator.G.dtype != torch.bfloat16:
            return product(operator, X)
        astray.append(X)
        return factor * product(operator, X)  # of so little curvature steps are a hundred times too long, of so much they soon seem to have settled

    monkeypatch.setattr(refits._Normal, "__call__", wrong)
    found = refit(problem, C, mask, start)
    assert astray
    assert problem.value(found.W, C) - best <= 0.02 * (best - least)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, 1e20])
def test_numbers_that_no_step_can_better_are_not_tried_for_ever(value, half, monkeypatch):
    problem, C, mask, start, _, _ = posed(0.3, True)
    monkeypatch.setattr(refits, "rough_dtype", lambda like: half)
    refit(problem, C, mask, torch.full_like(start, value))


def test_inputs_that_are_always_zero_or_the_same_are_no_trouble():
    A, Y, _ = layer(P=100, N=10, M=4, seed=1)
    A[:, 3], A[:, 7] = 0, A[:, 6]
    problem, column, row = normalised(A.T @ A, Metric.of(inner_product(4)), torch.float32)
    C = row * (Y.T @ A) / column
    found = refit(problem, C, torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) < 0.7)
    assert bool(found.W.isfinite().all()) and problem.value(found.W, C) < 0


@pytest.mark.parametrize("metric", [False, True])
def test_a_start_that_is_worse_than_no_weights_is_left(metric, monkeypatch):
    """On the way back from it all digits would be lost."""
    problem, C, mask, start, best, least = posed(0.3, metric)
    monkeypatch.setattr(refits, "_CHOLESKY_WORK", 0.0)
    assert problem.value(1e4 * start.double(), C) > 0
    found = refit(problem, C, mask, 1e4 * start)
    assert problem.value(found.W, C) - best <= 0.02 * (best - least)
