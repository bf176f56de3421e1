"""Which weights to keep: the support search of programs with a number of nonzeros, in Gram space.

    min ½⟨S W G, W⟩ − ⟨S C, W⟩   s.t.  the support of W is one that the pattern allows

(``G = AᵀA``, ``C = YᵀA``; ``S`` (M, M) weighs errors of the outputs: up to a constant this is half of ``Σ_p d_pᵀ S d_p``, ``d = A Wᵀ − Y``).
Alternating directions with the split ``B = W`` (weight ρ, scaled multipliers ``E``), where ``B`` is the nearest matrix with an allowed support and ρ
grows until the support stands still (the scheme of ALPS, Meng et al., NeurIPS 2024, Algorithm 1, here with a metric ``S``, columns of equal norm,
over-relaxation, and slower: what the support loses by haste no refit brings back). The least squares on the support are then another step
(:mod:`nettrim.solvers.refits`).

Everything here is in rows and columns of unit norm (``S_mm = G_jj = 1``); weights that the pattern does not count are kept always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nettrim.grams import Gram
from nettrim.metrics import Metric, eigen
from nettrim.patterns import Supports
from nettrim.precision import rough_dtype

_FIRST_WEIGHT = 0.02  # ρ over the diagonal of G
_ITERATIONS = 300
_GROWTH = ((0.05, 1.1), (0.005, 1.06), (0.0, 1.04))  # of ρ an iteration, where more than so much of the support still changes
_SLOWER = ((0.05, 1.08), (0.005, 1.05), (0.0, 1.04))  # of sparse supports without a metric: an iteration costs less; 0.2 % less discrepancy
_RELAXATION = 1.7  # of sparse supports; at mild sparsities it leads astray (all-MiniLM at 50 % and 2:4: a misfit larger by 1 %)
_SPARSE = 0.2  # share of the weights up to which
_STILL = 5  # iterations without a change after which the support stands
_RENEWED = 0.005  # share of the support that still changes, down to which targets are renewed
ROUNDED = {torch.float32: 1e-6, torch.float64: 1e-10}  # relative: what is smaller than so much of the largest is rounding


@dataclass(frozen=True, eq=False)
class Quadratic:
    """``G`` (N, N) and ``S`` (None for the identity), float64 with unit diagonals; searches are in ``dtype``, factorisations ``shared``."""

    G: Tensor
    S: Metric | None
    dtype: torch.dtype
    shared: Gram | None = None

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (N,) and eigenvectors (N, N) of ``G``."""
        if self.shared is None:
            return eigen(self.G.to(self.dtype))
        if self.dtype not in self.shared.eigen:
            self.shared.eigen[self.dtype] = eigen(self.G.to(self.dtype))
        return self.shared.eigen[self.dtype]

    @cached_property
    def outputs(self) -> tuple[Tensor, Tensor, float] | None:
        """Of ``S``, its own diagonal replaced by the mean: eigenvalues (r,) and eigenvectors (M, r) of its directions, and that mean."""
        if self.S is None:
            return None
        own, F = self.S.own, self.S.F
        above, V = eigen(F.T @ F)
        found = above > ROUNDED[F.dtype] * above[-1]
        U = F @ (V[:, found] / above[found].sqrt())
        return (own.mean() + above[found]).to(self.dtype), U.to(self.dtype), float(own.mean())

    def weigh(self, X: Tensor) -> Tensor:
        """``S X``."""
        return X if self.S is None else self.S.weigh(X)

    def value(self, W: Tensor, C: Tensor) -> float:
        """``½⟨S W G, W⟩ − ⟨S C, W⟩``."""
        return float((self.weigh(W) * (0.5 * (W @ self.G) - C)).sum())

    def excess(self, R: Tensor) -> float:
        """What weights of the residual ``R = C − W G`` (M, N) are over the least value of all: ``½⟨S R, R G⁺⟩``."""
        lam, Q = self.inputs
        RQ = R.to(Q) @ Q
        return 0.5 * float((self.weigh(RQ) * RQ / lam.where(lam > ROUNDED[Q.dtype] * lam[-1], torch.inf)).sum())


def normalised(G: Tensor, metric: Metric | None, dtype: torch.dtype, shared: Gram | None = None) -> tuple[Quadratic, Tensor, Tensor]:
    """``G`` (N, N) and the metric ``S`` in rows and columns of unit norm; with the norms, (N,) and (M, 1).

    Weights ``W`` become ``row · W · column``, and ``C`` becomes ``row · C / column``.
    """
    column = torch.where(G.diagonal() > 0, G.diagonal().sqrt(), 1.0)
    row, S = G.new_ones(1, 1), None
    if metric is not None:
        row = metric.diagonal.to(G).sqrt().unsqueeze(1)
        S = metric.to(G).scaled(row) if metric.couples else None
    return Quadratic(G / column / column[:, None], S, dtype, shared), column, row


@dataclass(frozen=True)
class _Bases:
    """Eigenvectors and their transposes, and products with them in their dtype.

    What a search computes is written where it was before: memory that is taken anew in every iteration costs as much as the arithmetic.
    """

    Q: Tensor
    QT: Tensor
    U: Tensor | None
    UT: Tensor | None
    _rounded: dict[tuple[torch.Size, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, Q: Tensor, U: Tensor | None, dtype: torch.dtype) -> _Bases:
        return cls(Q.to(dtype), Q.T.contiguous().to(dtype), None if U is None else U.to(dtype), None if U is None else U.T.contiguous().to(dtype))

    def times(self, X: Tensor, Y: Tensor, out: Tensor) -> Tensor:
        """``X Y`` into ``out``; one of the two is of the bases, the other in the dtype of ``out``."""
        if self.Q.dtype == out.dtype:
            return torch.mm(X, Y, out=out)
        X, Y = (part if part.dtype == self.Q.dtype else self._room(part, "given").copy_(part) for part in (X, Y))
        return out.copy_(torch.mm(X, Y, out=self._room(out, "made")))

    def _room(self, like: Tensor, what: str) -> Tensor:
        if (like.shape, what) not in self._rounded:
            self._rounded[like.shape, what] = torch.empty_like(like, dtype=self.Q.dtype)
        return self._rounded[like.shape, what]


def search(
    problem: Quadratic, C: Tensor, supports: Supports, start: Tensor, renew: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """From the weights ``start`` (M, N): the support (M, N) on which the alternating directions settle, and the weights they have there.

    In the basis of the eigenvectors of ``G`` the first step is one division; with ``P = (B − E) Q``, and without a metric (σ = 1),

        argmin_W ½⟨S W G, W⟩ − ⟨S C, W⟩ + ρ/2 ‖W − B + E‖²  =  B − E + [σ (Ĉ_ij − λ_j P_ij) / (σ λ_j + ρ)] Qᵀ

    With one, σ is what its directions leave, and each of these has a division of its own (:attr:`Quadratic.outputs`; their number decides the cost).

    ``renew``, where targets depend on the weights, gives the ``C`` of the ``W`` of the first step: it is asked in every iteration until the support
    is nearly found (asked every third time it left 2 to 3 % more of a discrepancy before a ReLU, asked only towards the end 5 %).

    Products may be in half precision: supports are as good (docs/sparsity.md, what was tried), and the refit goes by exact residuals.
    """
    lam, Q = problem.inputs
    sigma, U, common = problem.outputs or (None, None, 1.0)
    bases = _Bases.of(Q, U, rough_dtype(Q) or problem.dtype)
    CQ = C.to(problem.dtype) @ Q
    B = start.to(problem.dtype)
    mask = supports.nearest(B.square())
    B = B * mask
    E, T, step, other = torch.zeros_like(B), torch.empty_like(B), torch.empty_like(B), torch.empty_like(B)
    narrow = None if U is None else B.new_empty(U.shape[1], B.shape[1])
    sparse = supports.kept <= _SPARSE * start.numel()
    relaxation, growths = _RELAXATION if sparse else 1.0, _SLOWER if sparse and sigma is None else _GROWTH
    rho, still, changed = _FIRST_WEIGHT, 0, 1.0
    for _ in range(_ITERATIONS):
        before = mask
        gradient = bases.times(torch.sub(B, E, out=T), bases.Q, out=other).mul_(lam)
        torch.sub(CQ, gradient, out=gradient)
        torch.mul(gradient, common / (common * lam + rho), out=step)
        if sigma is not None and bases.U is not None and bases.UT is not None and narrow is not None:
            large = sigma.unsqueeze(1)
            bases.times(bases.UT, gradient, out=narrow).mul_(large / (large * lam + rho) - common / (common * lam + rho))
            step += bases.times(bases.U, narrow, out=other)
        step, other = bases.times(step, bases.QT, out=other), step
        if renew is not None and changed >= _RENEWED:
            CQ = renew(T + step).to(CQ) @ Q
        # over-relaxed, the point of the second step is aW + (1 − a)B + E = B + a(W − B) + E, and W − B = step − E
        torch.add(B, step, alpha=relaxation, out=T)
        if relaxation != 1:
            T.add_(E, alpha=1 - relaxation)
        mask = supports.nearest(torch.mul(T, T, out=step))
        torch.mul(T, mask.view(torch.uint8).to(T), out=B)  # torch converts bytes ten times as fast as bools
        torch.sub(T, B, out=E)
        changed = float((mask ^ before).count_nonzero()) / max(2 * supports.kept, 1)
        still = still + 1 if changed == 0 else 0
        if still >= _STILL:
            break
        growth = next(factor for share, factor in growths if changed >= share)
        rho *= growth
        E /= growth
    return mask, B
