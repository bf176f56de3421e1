"""Sums over rows: as precise as they say."""

import pytest
import torch

from nettrim.grams import Gram, moments, square_sum


@pytest.mark.parametrize("scale", (1e-25, 1e-10, 1.0, 1e10, 1e25))
@pytest.mark.parametrize("count", (10, 70_000, 100_001))
def test_squares_of_any_size(scale: float, count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * scale
    assert square_sum(x) == pytest.approx(float(x.double().square().sum()), rel=1e-7)
    assert square_sum(x[: count // 2 * 2].view(2, -1).T) == pytest.approx(float(x[: count // 2 * 2].double().square().sum()), rel=1e-7)


@pytest.mark.parametrize("precision", ("highest", "high"))
def test_what_is_left_is_right_or_not_said(precision: str) -> None:
    generator = torch.Generator().manual_seed(1)
    A, W = torch.randn(200, 1024, generator=generator), torch.randn(1024, 1024, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        gram = Gram()
        for weights in (W, W[:64]):  # the second shares the matrix of the first
            found = moments(gram, [(A, A @ weights.T)])
            for size in (1.0, 1e-1, 1e-2, 1e-3):
                other = weights + size * torch.randn(weights.shape, generator=generator)
                left = found.left(other)
                exact = float((A.double() @ other.double().T - (A @ weights.T).double()).square().sum())
                assert left is None or float(left.sum()) == pytest.approx(exact, rel=1e-3)
                assert left is not None or size < 0.1
    finally:
        torch.set_float32_matmul_precision(before)
