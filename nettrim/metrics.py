"""How errors of a layer's outputs are weighed together: ``S``, as a diagonal and a few directions.

``S = diag(e) + F Fᵀ``, ``F`` (M, r): a product with it takes ``2 r M`` multiplications in the place of ``M²``, and ``dᵀ S d`` is a sum of squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.grams import column_squares, square_sum

_OWN, _SHARED = 0.8, 1.2  # eigenvalues, of unit rows: up to the one they are replaced by a mean, from the other on they stay
_NONE = 1e-6  # of unit rows: an eigenvalue so close to the mean is the mean


@dataclass(frozen=True, eq=False)
class Metric:
    """``S = diag(own) + F Fᵀ``, positive semidefinite by its form.

    Attributes
    ----------
    own : Tensor, (M,)
        At least 0.
    F : Tensor, (M, r)
        Without columns where every output is weighed by itself.
    """

    own: Tensor
    F: Tensor

    @classmethod
    def of(cls, S: Tensor) -> Metric:
        """A diagonal (M,), or a positive semidefinite matrix (M, M): its least eigenvalue for all, and a direction for each of the others."""
        if S.ndim == 1:
            return cls(S, S.new_empty(len(S), 0))
        values, U = eigen(S.double())
        above = values - values[0]
        return cls(values[0].expand(len(S)).to(S), (U * above.sqrt())[:, above > 0].to(S))

    @classmethod
    def leading(cls, S: Tensor) -> Metric:
        """A matrix (M, M) of positive diagonal, its small eigenvalues replaced by their mean, in rows of unit norm, as which none is favoured.

        With ``S = D (Σ_i λ_i u_i u_iᵀ) D``, ``D² = diag(S)``, whose eigenvalues have mean 1, and ``h`` that rises from 0 at 0.8 to 1 at 1.2,

            ``D (c I + Σ_i max(h(λ_i) (λ_i − c), 0) u_i u_iᵀ) D,    c = Σ (1 − h(λ_i)) λ_i / Σ (1 − h(λ_i))``

        is continuous in ``S``, so that another rounding does not make it another one; for c ≤ 0.8 what is within ``D`` has the trace it had. What
        an estimate says of its small eigenvalues is noise for the most part: networks pruned in either are as close (docs/sparsity.md).
        """
        D = S.diagonal().sqrt()
        values, U = eigen(S / D / D[:, None])
        stays = ((values - _OWN) / (_SHARED - _OWN)).clamp(0, 1)
        common = ((1 - stays) * values).sum() / (1 - stays).sum()
        above = stays * (values - common)
        found = above > _NONE
        return cls(common * D.square(), D[:, None] * U[:, found] * above[found].sqrt())

    def to(self, like: Tensor | torch.dtype | torch.device | str) -> Metric:
        """In another dtype, or elsewhere."""
        return Metric(self.own.to(like), self.F.to(like))

    def of_outputs(self, outputs: slice) -> Metric:
        """The part for some of the outputs, with no more directions than there are of these."""
        own, F = self.own[outputs], self.F[outputs]
        if len(own) == 1:
            return Metric(own + F.square().sum(1), F[:, :0])
        return Metric(own, F if len(own) >= F.shape[1] else torch.linalg.qr(F.T, mode="r").R.T)

    def times(self, factor: float) -> Metric:
        """A multiple of it."""
        return Metric(self.own * factor, self.F * math.sqrt(factor))

    def scaled(self, rows: Tensor) -> Metric:
        """That of errors multiplied by ``rows``, (M, 1)."""
        return Metric(self.own / rows[:, 0].square(), self.F / rows)

    @property
    def couples(self) -> bool:
        """Whether errors of different outputs are weighed together."""
        return self.F.shape[1] > 0

    @property
    def diagonal(self) -> Tensor:
        """``S_mm``, (M,)."""
        return self.own + self.F.square().sum(1)

    @property
    def matrix(self) -> Tensor:
        """``S``, (M, M)."""
        return torch.diag(self.own) + self.F @ self.F.T

    def weigh(self, X: Tensor) -> Tensor:
        """``S X`` for (M, K), in its dtype."""
        found = X * self.own.to(X)[:, None]
        F = self.F.to(X)
        return found.addmm_(F, F.T @ X) if self.couples else found

    def square(self, D: Tensor) -> float:
        """``Σ_p d_pᵀ S d_p`` of residuals (P, M); products in its own dtype, sums in float64."""
        total = float(torch.dot(column_squares(D), self.own.double()))
        return total + square_sum(D.to(self.F) @ self.F) if self.couples else total


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N,), ascending and none below 0, and eigenvectors (N, N) of a positive semidefinite matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # LAPACK in float32, on many inputs that are always 0 and some that are nearly the same: float64 converges
        values, vectors = (part.to(matrix) for part in torch.linalg.eigh(matrix.double()))
    return values.clamp(min=0), vectors
