"""How errors of outputs are weighed together: a diagonal and a few directions, beside the matrix that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import seeded
from scipy.linalg import hadamard
from torch import Tensor

from nettrim.metrics import Metric


def inner_product(M: int, rank: int, seed: int) -> Tensor:
    """A positive definite (M, M), a few of its directions much larger than the others, rows of very different norms."""
    generator = seeded(seed)
    J = torch.randn(M, rank, dtype=torch.float64, generator=generator) * torch.logspace(0.5, -0.5, rank, dtype=torch.float64)
    size = torch.logspace(-1, 1, M, dtype=torch.float64)[:, None]
    return size * (J @ J.T + 0.1 * torch.eye(M, dtype=torch.float64)) * size.T


def leading(S: Tensor) -> Tensor:
    """The formula of `Metric.leading`, written out."""
    D = S.diagonal().sqrt().diag()
    values, U = torch.linalg.eigh(D.inverse() @ S @ D.inverse())
    h = ((values - 0.8) / 0.4).clamp(0, 1)
    c = ((1 - h) * values).sum() / (1 - h).sum()
    return D @ (c * torch.eye(len(S), dtype=S.dtype) + U @ (h * (values - c)).clamp(min=0).diag() @ U.T) @ D


@settings(max_examples=40, deadline=None)
@given(M=st.integers(1, 30), rank=st.integers(1, 8), seed=st.integers(0, 9), whole=st.booleans())
def test_it_does_what_the_matrix_does(M: int, rank: int, seed: int, whole: bool) -> None:
    S = inner_product(M, rank, seed)
    metric = Metric.of(S) if whole else Metric.leading(S)
    expected = S if whole else leading(S)
    size = float(S.abs().max())
    torch.testing.assert_close(metric.matrix, expected, rtol=1e-9, atol=1e-5 * size)  # eigenvalues that are nearly the mean are it
    expected = metric.matrix
    torch.testing.assert_close(metric.diagonal, expected.diagonal(), rtol=1e-9, atol=0)
    X, D, rows = (torch.randn(shape, dtype=torch.float64, generator=seeded(seed + 1)) for shape in ((M, 7), (9, M), (M, 1)))
    torch.testing.assert_close(metric.weigh(X), expected @ X, rtol=1e-9, atol=1e-9 * float((expected @ X).abs().max()))
    assert metric.square(D) == pytest.approx(float(((D @ expected) * D).sum()), rel=1e-9)
    torch.testing.assert_close(metric.scaled(rows.exp()).matrix, expected / rows.exp() / rows.exp().T, rtol=1e-9, atol=1e-9)
    part = slice(M // 3, 1 + 2 * M // 3)
    torch.testing.assert_close(metric.of_outputs(part).matrix, expected[part, part], rtol=1e-9, atol=1e-9 * size)
    assert metric.of_outputs(part).F.shape[1] <= part.stop - part.start
    assert not metric.of_outputs(slice(0, 1)).couples
    torch.testing.assert_close(metric.times(0.3).matrix, 0.3 * expected, rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("seed", range(5))
def test_large_eigenvalues_stay_and_the_sum_of_all(seed: int) -> None:
    S = inner_product(60, 10, seed)
    D = S.diagonal().sqrt()
    before, after = (torch.linalg.eigvalsh(X / D / D[:, None]).flip(0) for X in (S, Metric.leading(S).matrix))
    large = before >= 1.2
    assert 0 < int(large.sum()) < 30
    torch.testing.assert_close(after[large], before[large])
    assert float(after.sum()) == pytest.approx(60)
    assert float(after[int((before > 0.8).sum()) :].std()) < 1e-9  # all others are one
    assert Metric.leading(S).F.shape == (60, int((before > 0.8).sum()))


def test_another_rounding_makes_no_other_metric() -> None:
    """What is stored was measured in it, and is measured in it again elsewhere: also where an eigenvalue lies at an end of the slope."""
    U = torch.from_numpy(hadamard(16)).double() / 4  # of entries of one size: all diagonals are the mean of the eigenvalues
    for at in (0.8, 1.0, 1.2):
        found = []
        for moved in (-1e-7, 1e-7):
            values = torch.full((16,), (16 - at - 5.0) / 14, dtype=torch.float64)
            values[3], values[7] = at + moved, 5.0
            S = U @ values.diag() @ U.T
            torch.testing.assert_close(S.diagonal(), torch.ones(16, dtype=torch.float64))
            found.append(Metric.leading(S).matrix)
        torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_outputs_that_are_alike_are_weighed_alone() -> None:
    for S in (torch.eye(5), torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.ones(1, 1)):
        assert not Metric.leading(S).couples
        torch.testing.assert_close(Metric.leading(S).matrix, S)
        assert not Metric.of(S.diagonal()).couples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_computes_in_the_precision_of_what_it_is_given(dtype: torch.dtype) -> None:
    S = inner_product(20, 4, 0)
    metric, X = Metric.leading(S), torch.randn(20, 6, generator=seeded(1)).to(dtype)
    assert metric.to(dtype).weigh(X).dtype == metric.weigh(X).dtype == dtype
    wide = metric.weigh(X.double())
    torch.testing.assert_close(metric.weigh(X).double(), wide, rtol=0, atol=8 * torch.finfo(dtype).eps * float(wide.abs().max()))
