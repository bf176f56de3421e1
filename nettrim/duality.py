"""Lower bounds from dual points: what lets a solution say how far from the optimum it can be at most.

The derivation is in docs/method.md. Here a point ``θ`` that a solver proposes is made feasible for the dual and scaled, one factor a neuron, so
that the bound is the best these factors can give. Float64 throughout, one pass over the rows (two with unpenalised columns).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nettrim.programs import LayerProgram

_FIXED_POINT_STEPS = 60
_ORTHOGONAL = 1e-11  # a cosine below it is rounding
# Products of float64 vectors are known to this share of the product of their norms. What is proven is proven with every such error at its worst:
# else a dual point that is nothing but rounding would be scaled until it proved something.
_ROUNDING = 2e-14
_LARGE = 1e6


def best_bound(program: LayerProgram, theta: Tensor) -> tuple[float, Tensor]:
    """See :meth:`nettrim.programs.LayerProgram.lower_bound`, this function's public face; and ``Aᵀθ``, (M, N), of the ``θ`` before its scaling."""
    omega = program.l1_weights.double()  # type: ignore[union-attr]
    correction = _unpenalised_correction(program, theta, omega)
    M, N = program.shape
    correlation = torch.zeros((M, N), dtype=torch.float64, device=theta.device)
    linear = torch.zeros(M, dtype=torch.float64, device=theta.device)
    square, size, targets_size = torch.zeros_like(linear), torch.zeros_like(linear), torch.zeros_like(linear)
    columns_size = torch.zeros(N, dtype=torch.float64, device=theta.device)
    for rows, A, Y, V in program.row_chunks():
        t = _feasible_sign(program, theta[rows].double(), Y)
        size += t.square().sum(0)  # of what was given: the rounding of what is left after the correction is of that size
        if correction is not None:
            columns, shift = correction
            t = torch.where(_support(program, Y), t - A[:, columns] @ shift, t)
        correlation += t.T @ A
        aim = Y if V is None else torch.where(_support(program, Y), Y, V)  # off Ω the targets are the floor
        linear -= (t * aim).sum(0)
        targets_size += aim.square().sum(0)
        square += (torch.where(_support(program, Y), t, 0.0) if program.one_sided else t).square().sum(0)
        columns_size += A.square().sum(0)
    limit = omega if program.regularization is None else program.regularization * omega
    linear -= _ROUNDING * (size * targets_size).sqrt()
    square += _ROUNDING * size
    reach = torch.outer(size, columns_size).sqrt()
    scale = _largest_scale(correlation.abs(), limit.expand(M, N), _ROUNDING * reach, _ORTHOGONAL * reach)
    return total_bound(program, linear, square, scale), correlation


def gram_terms(program: LayerProgram, rows: slice, G: Tensor, C: Tensor, squares: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a block of neurons of a layer without a ReLU adds to the same bound, from ``G = AᵀA``, ``C = YᵀA`` and ``squares = ‖y_m‖²`` alone.

    The dual point is ``θ = A Bᵀ − Y`` for any ``B``, scaled neuron by neuron; then ``Aᵀθ = B G − C``, ``−⟨θ, y⟩ = ‖y‖² − ⟨b, c⟩`` and
    ``‖θ‖² = ‖y‖² − 2⟨b, c⟩ + ⟨b, b G⟩``. With unpenalised columns ``B`` is corrected on them, so that their correlations vanish.

    ``C``, ``squares``, ``B`` (float64) are those of the neurons ``rows``; the results are for :func:`total_bound`.
    """
    omega: Tensor = program.l1_weights.double()  # type: ignore[union-attr]
    if omega.ndim == 2:
        omega = omega[rows]
    free = _free_columns(omega)
    correlation = B @ G - C
    reach = squares + (B * (correlation + C)).sum(1).clamp(min=0)  # ‖y‖² + ‖A b‖²: what θ is the difference of
    if free.numel():
        wanted = _is_free(omega, free)
        if bool(wanted.all()):
            shift = correlation[:, free] @ torch.linalg.pinv(G[free][:, free], hermitian=True)
        else:
            gram = G[free][:, free] * wanted.unsqueeze(2) * wanted.unsqueeze(1)
            shift = (torch.linalg.pinv(gram, hermitian=True) @ (correlation[:, free] * wanted).unsqueeze(2)).squeeze(2)
        B = B.clone()
        B[:, free] -= shift
        correlation -= shift @ G[free]
        reach = torch.maximum(reach, squares + (B * (correlation + C)).sum(1).abs())
    linear = squares - (B * C).sum(1)
    square = (linear + (B * correlation).sum(1)).clamp(min=0) + _ROUNDING * reach
    linear -= _ROUNDING * reach
    limit = omega if program.regularization is None else program.regularization * omega
    rounding = _ROUNDING * torch.outer(reach, G.diagonal()).sqrt()
    orthogonal = rounding + _ORTHOGONAL * torch.outer(square, G.diagonal()).sqrt()
    return linear, square, _largest_scale(correlation.abs(), limit.expand_as(correlation), rounding, orthogonal)


def total_bound(program: LayerProgram, linear: Tensor, square: Tensor, scale: Tensor) -> float:
    """The bound from what each neuron brings, (M,) each: ``−⟨θ_m, y_m⟩``, ``‖θ_m‖²`` and the largest factor that keeps ``θ_m`` feasible."""
    if program.regularization is not None:
        return _penalised(linear, square, scale)
    return _budget(linear, square, scale, program.epsilon or 0.0)


def _support(program: LayerProgram, Y: Tensor) -> Tensor:
    return program.on_support(Y)


def _feasible_sign(program: LayerProgram, theta: Tensor, Y: Tensor) -> Tensor:
    """``θ`` clipped at 0 off Ω, from above where the targets have reached a ceiling."""
    if not program.relu:
        return theta
    clipped = theta.clamp(min=0) if program.ceiling is None else torch.where(Y < program.ceiling, theta.clamp(min=0), theta.clamp(max=0))
    return torch.where(_support(program, Y), theta, clipped)


def _free_columns(omega: Tensor) -> Tensor:
    """The columns that some neuron does not penalise."""
    return torch.nonzero((omega if omega.ndim == 1 else omega.amin(0)) == 0).flatten()


def _is_free(omega: Tensor, columns: Tensor) -> Tensor:
    """Which neurons don't penalise which of these columns: (1, k) or (M, k) float64."""
    return torch.atleast_2d(omega[..., columns] == 0).double()


def _largest_scale(correlation: Tensor, limit: Tensor, rounding: Tensor, orthogonal: Tensor) -> Tensor:
    """Per neuron the largest ``s`` with ``s |Aᵀθ| ≤ limit``, infinite where nothing limits it; correlations are known to their ``rounding``.

    Columns without a penalty were dealt with by the projection. Where it could not make them ``orthogonal`` to ``θ`` (no row in Ω to correct), only
    ``s = 0`` is left.
    """
    free = torch.where(correlation <= orthogonal, torch.inf, 0.0)
    worst = (correlation + rounding).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(limit > 0, limit / worst, free).amin(1)


def _unpenalised_correction(program: LayerProgram, theta: Tensor, omega: Tensor) -> tuple[Tensor, Tensor] | None:
    """Columns with ``ω_j = 0`` and the shift ``x`` (k, M) for which ``θ − A_k x`` on Ω is orthogonal to them.

    A column without a penalty (a free bias) asks for ``a_jᵀθ = 0`` exactly, which no scaling can give. Off Ω the clipped values stay as they are.
    """
    columns = _free_columns(omega)
    if columns.numel() == 0:
        return None
    k, M = columns.numel(), program.shape[0]
    gram = torch.zeros((M, k, k), dtype=torch.float64, device=theta.device)
    moment = torch.zeros((M, k), dtype=torch.float64, device=theta.device)
    for rows, A, Y, _ in program.row_chunks():
        B, inside = A[:, columns], _support(program, Y).double()
        moment += _feasible_sign(program, theta[rows].double(), Y).T @ B
        gram += torch.einsum("pm,pi,pj->mij", inside, B, B)
    wanted = _is_free(omega, columns)  # a column may be free for some neurons only
    gram = gram * wanted.unsqueeze(2) * wanted.unsqueeze(1)
    shift = torch.linalg.pinv(gram, hermitian=True) @ (moment * wanted).unsqueeze(2)
    return columns, shift.squeeze(2).T


def _penalised(linear: Tensor, square: Tensor, scale: Tensor) -> float:
    """``Σ_m max_{0 ≤ s ≤ s̄_m} s·linear_m − ½ s² square_m``."""
    best = torch.where(square > 0, (linear / square).clamp(min=0), torch.where(linear > 0, torch.inf, 0.0))
    s = torch.minimum(best, scale)
    return max(0.0, float((s * linear - 0.5 * s * s * square).sum()))


def _budget(linear: Tensor, square: Tensor, scale: Tensor, epsilon: float) -> float:
    """``max_{0 ≤ s ≤ s̄} Σ_m s_m linear_m − ε √(Σ_m s_m² square_m)``, concave in ``s``.

    Its stationarity reads ``s_m = clip(τ linear_m / (ε square_m), 0, s̄_m)`` with ``τ² = Σ s_m² square_m``: a fixed point in one number. Every
    iterate is a valid point, so the best value met is returned; the common factor for all neurons is tried too.
    """
    finite = scale[torch.isfinite(scale)]
    scale = scale.clamp(max=_LARGE * (float(finite.max()) if finite.numel() else 1.0))

    def value(s: Tensor) -> float:
        return float((s * linear).sum() - epsilon * (s.square() * square).sum().sqrt())

    best = max(0.0, value(scale.min().expand_as(scale)))
    s = torch.where(linear > 0, scale, 0.0)
    for _ in range(_FIXED_POINT_STEPS):
        best = max(best, value(s))
        tau = (s.square() * square).sum().sqrt()
        wanted = tau * linear / (epsilon * square).clamp(min=torch.finfo(torch.float64).tiny)
        s = torch.where(linear > 0, torch.minimum(scale, wanted), 0.0)
    return best
