"""Proximal operators are the minimisers that their docstrings say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from nettrim import proximal
from nettrim.residual import residual

numbers = st.floats(-5, 5, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(v=numbers, t=st.floats(0, 4, width=32))
def test_soft_threshold_minimises_its_problem(v, t):
    """``t|w| + ½(w − v)²``, by brute force on a fine grid around and at 0."""
    found = float(proximal.soft_threshold(torch.tensor([v], dtype=torch.float64), float(t)))
    grid = np.concatenate([np.linspace(-6, 6, 4801), [0.0, found]])
    values = t * np.abs(grid) + 0.5 * (grid - v) ** 2
    assert t * abs(found) + 0.5 * (found - v) ** 2 <= values.min() + 1e-12


def test_soft_threshold_broadcasts_weights_of_columns_and_of_entries():
    v = torch.tensor([[3.0, -3.0, 0.5], [1.0, -0.2, 0.0]], dtype=torch.float64)
    columns = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    assert torch.equal(proximal.soft_threshold(v, columns), torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64))
    assert torch.equal(proximal.soft_threshold(v, v.abs()), torch.zeros_like(v))
    assert torch.equal(proximal.soft_threshold(v, 0.0), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_threshold_gives_exact_zeros_and_keeps_the_dtype(dtype):
    v = torch.linspace(-1, 1, 101, dtype=dtype)
    for t in (0.3, torch.tensor(0.3, dtype=dtype)):
        found = proximal.soft_threshold(v, t)
        assert found.dtype == dtype
        assert torch.equal(found == 0, v.abs() <= t)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), radius=st.floats(0.01, 5))
def test_shrink_to_ball_projects(seed, radius):
    """No point of the ball is nearer, by a constrained minimiser; and the factor is what was done."""
    D = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3)))
    X, gain = proximal.shrink_to_ball(D, radius)
    assert float(X.norm()) <= radius * (1 + 1e-12)
    assert 0 <= gain <= 1 and torch.allclose(X, gain * D, rtol=1e-14)
    inside = {"type": "ineq", "fun": lambda x: radius**2 - x @ x}
    best = minimize(lambda x: ((x - D.numpy().ravel()) ** 2).sum(), np.zeros(6), constraints=[inside], method="SLSQP", options={"ftol": 1e-12})
    assert float((X - D).square().sum()) <= best.fun + 1e-6


def test_shrink_to_ball_leaves_the_inside_alone():
    D = torch.full((2, 2), 0.5, dtype=torch.float64)
    X, gain = proximal.shrink_to_ball(D, 1.0)
    assert torch.equal(X, D) and gain == 1.0
    assert torch.equal(proximal.shrink_to_ball(torch.zeros(2, 2), 0.0)[0], torch.zeros(2, 2))


@settings(max_examples=60, deadline=None)
@given(z=numbers, y=st.one_of(st.just(0.0), st.floats(0.125, 4, width=32)), v=numbers, gain=st.floats(0.05, 1))
def test_residual_gives_the_projection_and_the_misfits_prox(z, y, v, gain):
    """``z − D`` projects onto ``{y}`` or ``(−∞, v]``; ``z − (1 − β/(1+β)) D`` minimises ``f + β/2 (x − z)²``."""
    Z, Y, V = (torch.tensor([[x]], dtype=torch.float64) for x in (z, y, v))
    projected = float(Z - residual(Z, Y, V))
    assert projected == pytest.approx(y if y > 0 else min(z, v), abs=1e-12)
    beta = gain / (1 - gain + 1e-9)
    found = float(Z - (1 - beta / (1 + beta)) * residual(Z, Y))

    def value(x: float) -> float:
        return 0.5 * ((x - y) ** 2 if y > 0 else max(x, 0.0) ** 2) + beta / 2 * (x - z) ** 2

    brute = minimize_scalar(value, bounds=(-10, 10), method="bounded", options={"xatol": 1e-9})
    assert value(found) <= brute.fun + 1e-9
