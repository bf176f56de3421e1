"""Sums over rows: as precise as they say."""

import math

import pytest
import torch

from nettrim.aims import Aim, weighed_square
from nettrim.grams import Gram, Moments, moments, square_sum


@pytest.mark.parametrize("scale", (1e-25, 1e-10, 1.0, 1e10, 1e25))
@pytest.mark.parametrize("count", (10, 70_000, 100_001))
def test_squares_of_any_size(scale: float, count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * scale
    assert square_sum(x) == pytest.approx(float(x.double().square().sum()), rel=1e-7)
    assert square_sum(x[: count // 2 * 2].view(2, -1).T) == pytest.approx(float(x[: count // 2 * 2].double().square().sum()), rel=1e-7)


def _sums(A: torch.Tensor, Y: torch.Tensor) -> Moments:
    return moments(Gram(), zip(A.split(700), Y.split(700), strict=True))


@pytest.mark.parametrize("precision", ("highest", "high", "medium"))
@pytest.mark.parametrize("scale", (1.0, 1e-25, 1e18))
def test_moments_are_sums_over_rows(precision: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    A, Y = torch.rand(2000, 150, generator=generator) * scale, torch.randn(2000, 80, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = _sums(A, Y)
    finally:
        torch.set_float32_matmul_precision(before)
    G, C = A.double().T @ A.double(), Y.double().T @ A.double()
    torch.testing.assert_close(found.G, G, rtol=1e-6, atol=0.0)
    assert torch.equal(found.G, found.G.T)
    assert float((found.C - C).norm()) <= 1e-6 * float(C.norm())


def test_large_rows_take_no_digits_from_the_others() -> None:
    """As the first token's in language models are, a thousand times: what the others say is smaller than the rounding of theirs."""
    generator = torch.Generator().manual_seed(5)
    A, Y = torch.randn(2000, 150, generator=generator), torch.randn(2000, 80, generator=generator)
    A[::500] *= 1e4
    Y[1::500] *= 1e4
    found = _sums(A, Y)
    large = torch.zeros(2000, dtype=torch.bool)
    large[::500] = large[1::500] = True
    G = A[~large].double().T @ A[~large].double()
    left = found.G - A[large].double().T @ A[large].double()
    assert float((left - G).norm()) <= 1e-6 * float(G.norm())
    C = Y[~large].double().T @ A[~large].double()
    assert float((found.C - Y[large].double().T @ A[large].double() - C).norm()) <= 1e-6 * float(C.norm())


def test_small_programs_have_exact_sums() -> None:
    A, Y = torch.randn(900, 12, generator=torch.Generator().manual_seed(2)), torch.randn(900, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(_sums(A, Y).C, Y.double().T @ A.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("repair", (1.0, 0.5, 0.0))
@pytest.mark.parametrize("damping", (0.0, 0.1))
@pytest.mark.parametrize("metric", ("none", "diagonal", "whole"))
@pytest.mark.parametrize("moved", (1.0, 1e-2, 1e-4))
def test_misfit_is_that_of_the_rows(repair: float, damping: float, metric: str, moved: float) -> None:
    """Also where it is 1e-9 of the targets, of which float32 sums know seven digits; where targets lean, to the rounding of the targets."""
    generator = torch.Generator().manual_seed(4)
    inputs, dense = torch.rand(2000, 120, generator=generator), torch.randn(90, 121, generator=generator)
    A = torch.cat([inputs, torch.ones(2000, 1)], 1)
    T = A @ dense.T + moved * torch.randn(2000, 90, generator=generator)
    W = dense + moved * torch.randn(90, 121, generator=generator)
    J = torch.randn(90, 90, generator=generator)
    S = {"none": None, "diagonal": torch.rand(90, generator=generator), "whole": J @ J.T}[metric]
    D = A.double() @ W.double().T - T.double()
    lean = repair * D + (1 - repair) * A.double() @ (W - dense).double().T
    added = (damping * A[:, :120].double().square().sum(0)).sqrt()[:, None] * (W - dense).T[:120].double()
    exact = sum(float(((part if S is None else part * S if S.ndim == 1 else part @ S.double()) * part).sum()) for part in (lean, added))
    aim = Aim(_sums(A, T), dense, repair, damping, 120, S)
    stretch = 1.0 if S is None else math.sqrt(float(torch.linalg.matrix_norm(S, 2) if S.ndim == 2 else S.max()))
    rounding = 2**-24 * math.sqrt(exact) * float(T.norm()) * stretch
    assert aim.misfit(W, weighed_square(D, S)) == pytest.approx(exact, rel=1e-5, abs=rounding if repair < 1 else 0.0)
