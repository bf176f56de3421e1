"""A layer's budget and promise, by the formulas, on random data."""

import math

import pytest
import torch
from torch import Tensor, nn

from nettrim import layers
from nettrim.activations import RELU
from nettrim.budgets import Budget, make_budget
from nettrim.capture import Seen
from nettrim.observation import Observation
from nettrim.observing import Layer


def layer(
    activation: str | None, *, disturbed: bool, seed: int = 0, rows: int = 50, dtype: torch.dtype = torch.float64, bias: bool = False
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, 7, generator=generator, dtype=torch.float64)
    W = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(A.shape, generator=generator, dtype=torch.float64) if disturbed else 0 * A
    module = nn.Linear(6 if bias else 7, 4, bias=bias, dtype=dtype)
    matrix = layers.only_matrix(module)
    matrix.write_back(W)
    seen = Observation(matrix, None, lambda: iter([Seen((A + noise).to(dtype)[:, : 7 - bias], (A @ W.T).to(dtype))]))
    return Layer("fc", matrix, W.to(dtype), None, RELU if activation else None, disturbed, seen)


def data(given: Layer) -> tuple[Tensor, Tensor]:
    """A and Y of all rows."""
    assert given.observation.rows is not None
    A, U = given.observation.rows
    return A.double(), given.targets(U).double()


def parts(given: Layer) -> tuple[Tensor, float, float]:
    """V, ``Σ_Ω (v − y)²``, ``Σ_{Ωᶜ} max(v, 0)²``."""
    A, Y = data(given)
    V = A @ given.dense.double().T
    if given.activation is None:
        return V, float((V - Y).square().sum()), 0.0
    return V, float((V - Y)[Y > 0].square().sum()), float(V[Y <= 0].clamp(min=0).square().sum())


def budget(given: Layer, consistency: str = "relaxed", *, own: bool = False, inflation: float = 1.1, bias_weight: float = 1.0) -> Budget:
    options = {"own": own, "inflation": inflation, "consistency": consistency, "bias_weight": bias_weight}
    return make_budget(given, relative=0.2, penalty="l1", **options)


@pytest.mark.parametrize("consistency", ("relaxed", "paper"))
@pytest.mark.parametrize("activation", ("relu", None))
@pytest.mark.parametrize("own", (True, False))
def test_an_undisturbed_layer_has_a_share_of_its_output(activation: str | None, consistency: str, own: bool) -> None:
    given = layer(activation, disturbed=False)
    found = budget(given, consistency, own=own)
    expected = 0.2 * float(data(given)[1].norm())
    assert found.promise == found.programs[0].epsilon == pytest.approx(expected, rel=1e-12)
    assert found.inflation is None and found.programs[0].upper is None
    assert found.programs[0].is_feasible(given.dense)


@pytest.mark.parametrize("rows", (1, 50, 5000))
@pytest.mark.parametrize("inflation", (1.0, 1.1, 3.0))
@pytest.mark.parametrize("activation", ("relu", None))
def test_cascade_on_the_relaxed_set(activation: str | None, inflation: float, rows: int) -> None:
    given = layer(activation, disturbed=True, rows=rows)
    _, on, off = parts(given)
    found = budget(given, inflation=inflation)
    assert found.promise == found.programs[0].epsilon == pytest.approx(math.sqrt(inflation * (on + off)), rel=1e-12)
    assert found.programs[0].epsilon**2 == pytest.approx(inflation * found.programs[0].misfit(given.dense), rel=1e-12)
    assert found.inflation == inflation
    assert found.programs[0].is_feasible(given.dense)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("inflation", (1.0, 1.1, 3.0))
def test_cascade_on_the_papers_set(inflation: float, dtype: torch.dtype) -> None:
    given = layer("relu", disturbed=True, rows=3000, dtype=dtype)
    V, on, off = parts(given)
    assert off > 0
    found = budget(given, "paper", inflation=inflation)
    assert found.programs[0].epsilon == pytest.approx(math.sqrt(inflation * on), rel=1e-9)
    assert found.promise == pytest.approx(math.sqrt(inflation * on + off), rel=1e-6)
    assert found.programs[0].upper is not None and torch.allclose(found.programs[0].upper.double(), V, rtol=3e-7, atol=0)
    assert bool((found.programs[0].upper.double() >= V).all())
    assert found.inflation == inflation
    assert found.programs[0].is_feasible(given.dense)


def test_a_paper_set_without_relu_is_the_relaxed_one() -> None:
    given = layer(None, disturbed=True)
    relaxed, paper = budget(given), budget(given, "paper")
    assert paper.programs[0].upper is None and paper.promise == relaxed.promise


def test_kappa_shrinks_the_part_on_the_support_alone() -> None:
    given = layer("relu", disturbed=True)
    _, on, off = parts(given)
    tight = budget(given, "paper", inflation=0.5)
    assert tight.programs[0].epsilon == pytest.approx(math.sqrt(0.5 * on)) and tight.promise == pytest.approx(math.sqrt(0.5 * on + off))
    assert tight.inflation == 1.0  # √(κγ) ‖W‖ e would promise more than was kept off Ω
    assert tight.promise**2 <= tight.inflation * (on + off)
    assert budget(given, inflation=0.5).inflation == 0.5


def test_a_budget_of_its_own_is_kept_in_cascade() -> None:
    given = layer("relu", disturbed=True)
    _, _, off = parts(given)
    expected = 0.2 * float(data(given)[1].norm())
    assert budget(given, own=True).promise == pytest.approx(expected)
    paper = budget(given, "paper", own=True)
    assert paper.programs[0].epsilon == pytest.approx(expected) and paper.promise == pytest.approx(math.hypot(expected, math.sqrt(off)))
    assert paper.inflation is None


@pytest.mark.parametrize(("has_bias", "expected"), ((True, [1.0] * 6 + [0.25]), (False, [1.0] * 7)))
def test_the_weight_of_the_bias_column(has_bias: bool, expected: list[float]) -> None:
    found = budget(layer("relu", disturbed=False, bias=has_bias), bias_weight=0.25)
    assert isinstance(found.programs[0].l1_weights, Tensor) and found.programs[0].l1_weights.tolist() == expected


def test_the_dense_weights_are_feasible_where_nothing_is_on_the_support() -> None:
    """A silent layer on disturbed inputs: the papers' budget is 0, and only weights that rise nowhere above the dense ones are left."""
    given = layer("relu", disturbed=True, dtype=torch.float32)
    A, U = given.observation.rows
    A[:, 0] = 1.0
    given.dense[:, 0] = -40.0
    U.zero_()
    found = budget(given, "paper")
    assert found.programs[0].epsilon == 0 and found.programs[0].is_feasible(given.dense)
