"""A layer without a ReLU in Gram space: ``G = AᵀA``, ``C = YᵀA`` and ``‖y_m‖²`` are all that matters of P rows.

``F(W) = ‖A Wᵀ − Y‖_F² = ⟨W G, W⟩ − 2⟨C, W⟩ + ‖Y‖_F²``, gathered in one pass over the rows and in float64, whatever their precision: in float32 the
sum over P rows loses the digits of small columns. Everything below treats neurons in blocks, so that it holds little beside ``G`` and ``C``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.duality import gram_terms, total_bound
from nettrim.programs import LayerProgram
from nettrim.rows import BLOCK_ELEMENTS
from nettrim.solvers.feasibility import restricted_least_squares

_SHARE = 1e-10  # of the mean diagonal, added to G where only its least squares are wanted; it can but raise their misfit


@dataclass(frozen=True)
class Gram:
    """``G`` (N, N), ``C`` (M, N), ``squares`` (M,) and ``column`` (N,), all float64: ``G/(column columnᵀ)`` has an even diagonal, ``mean``."""

    G: Tensor
    C: Tensor
    squares: Tensor
    column: Tensor
    mean: float

    def blocks(self) -> Iterator[slice]:
        """Neurons, as many at a time as a computation may hold."""
        M, N = self.C.shape
        step = max(1, BLOCK_ELEMENTS // N)
        for start in range(0, M, step):
            yield slice(start, min(start + step, M))

    def misfit(self, W: Tensor) -> float:
        """``F(W)``."""
        total = float(self.squares.sum())
        for rows in self.blocks():
            w = W[rows].double()
            total += float((w * (w @ self.G - 2 * self.C[rows])).sum())
        return max(total, 0.0)

    def _scaled(self, shift: float) -> Tensor:
        """``G/(column columnᵀ) + shift·I``, column by column in memory: so it can be factorised where it lies."""
        scaled = self.G / self.column
        scaled /= self.column[:, None]
        scaled.diagonal().add_(shift)
        return scaled.T

    def inverse(self, sigma: float, dtype: torch.dtype) -> Tensor:
        """``(G/(column columnᵀ) + σI)⁻¹``: G is positive semidefinite to rounding, and σ of the size of its mean diagonal: this cannot fail."""
        matrix = self._scaled(sigma)
        torch.linalg.cholesky(matrix, out=matrix)
        torch.cholesky_inverse(matrix, out=matrix)
        return matrix.to(dtype)

    def least_squares(self, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Weights close to ``argmin F``, in scaled columns and ``dtype``, and the misfit of the unrounded ones.

        A rank-deficient ``G`` is regularised by a share of its mean diagonal, 1e-10 or as much more as the factorisation needs.
        """
        share = _SHARE
        while True:
            factor = self._scaled(share * self.mean)
            failed = torch.empty((), dtype=torch.int32, device=factor.device)
            torch.linalg.cholesky_ex(factor, out=(factor, failed))
            if not int(failed):
                break
            share *= 10
        weights = torch.empty(self.C.shape, dtype=dtype, device=self.C.device)
        least = float(self.squares.sum())
        for rows in self.blocks():
            scaled = torch.cholesky_solve((self.C[rows] / self.column).T, factor).T
            weights[rows] = scaled.to(weights)
            w = scaled / self.column
            least += float((w * (w @ self.G - 2 * self.C[rows])).sum())
        return weights, max(least, 0.0)

    def bound(self, program: LayerProgram, dense: Iterator[tuple[slice, Tensor]]) -> float:
        """The lower bound that the residual of weights ``(block of neurons, their weights)`` proves (:mod:`nettrim.duality`)."""
        terms = [gram_terms(program, rows, self.G, self.C[rows], self.squares[rows], W.double()) for rows, W in dense]
        return total_bound(program, *(torch.cat(parts) for parts in zip(*terms, strict=True)))

    def restore(self, W: Tensor, budget: float) -> Tensor | None:
        """``W − t·step`` with the smallest t in [0, 1] for which ``F ≤ budget``, on the support of ``W`` (overwritten); None where there is none.

        The step goes towards the least squares on that support, where ``F`` is a parabola in t.
        """
        step = torch.empty_like(W)
        constant, slope, curvature = float(self.squares.sum()), 0.0, 0.0
        for rows in self.blocks():
            w = W[rows].double()
            wG = w @ self.G
            constant += float((w * (wG - 2 * self.C[rows])).sum())
            downhill = wG - self.C[rows]
            direction = restricted_least_squares(self.G, downhill, w != 0)
            step[rows] = direction.to(step)
            direction = step[rows].double()
            slope += float((direction * downhill).sum())
            curvature += float((direction * (direction @ self.G)).sum())
        if constant <= budget:
            return W
        discriminant = slope**2 - curvature * (constant - budget)
        if slope <= 0 or discriminant < 0:
            return None
        return W.sub_(step, alpha=(constant - budget) / (slope + math.sqrt(discriminant)))


def gather(program: LayerProgram) -> Gram:
    """One pass over the rows of a program without a ReLU."""
    M, N = program.shape
    G = torch.zeros((N, N), dtype=torch.float64, device=program.device)
    C = torch.zeros((M, N), dtype=torch.float64, device=program.device)
    squares = torch.zeros(M, dtype=torch.float64, device=program.device)
    for _, A, Y, _ in program.row_chunks():
        G.addmm_(A.T, A)
        C.addmm_(Y.T, A)
        squares += Y.square().sum(0)
    diagonal = G.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    return Gram(G, C, squares, torch.where(live, (diagonal / mean).sqrt(), 1.0), mean)
