"""One iteration of ``prox_admm``: the iterates, the three steps, and the two weights that may change on the way.

    min  f(Z) + Σ ω|s|   s.t.  Z = A Wᵀ (weight β, scaled multipliers U),  S = W (weight σ = βr, scaled multipliers E)

with ``f`` the misfit of a penalised program or the indicator of a budget's set. See :mod:`nettrim.solvers.prox_admm` for the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.programs import LayerProgram, residual
from nettrim.proximal import soft_threshold
from nettrim.solvers.feasibility import restore_budget

OVER_RELAXATION = 1.7
_START_ROUNDS = 20


@dataclass
class State:
    """The iterates in one precision; ``W``, ``S``, ``E`` are in scaled columns (``W = W_true · column``)."""

    column: Tensor
    G: Tensor  # Gram matrix of the unscaled columns
    inverse: Tensor
    r: float
    beta: float
    W: Tensor
    S: Tensor
    E: Tensor
    Z: Tensor  # (P, M)
    U: Tensor  # (P, M)


def start(program: LayerProgram, dtype: torch.dtype, initial: Tensor | None, beta: float | None, support_weight: float) -> State:
    """The first iterates; β is guessed from the weights where None is given, ``r`` is ``support_weight`` times the mean diagonal of AᵀA.

    Inputs that are 0 in every row have no part in it, as where presolve has taken them out.
    """
    G, C = _gram(program)
    diagonal = G.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    column = torch.where(live, (diagonal / mean).sqrt(), 1.0)
    scaled = G / column / column[:, None]
    r = support_weight * mean
    inverse = _inverse(scaled, r)
    if initial is None:
        initial = ((C / column) @ inverse) / column
        if program.epsilon is not None:
            # from far outside the set, multipliers would gather that say nothing of the optimum
            inside = restore_budget(program, G, initial, rounds=_START_ROUNDS)
            initial = initial if inside is None else inside
    W = torch.where(live, initial.double() * column, 0.0).to(dtype)
    if beta is None:
        beta = _first_beta(W, (program.l1_weights.to(column) / column).expand_as(W), r)  # type: ignore[union-attr]
    state = State(
        column=column.to(dtype),
        G=G.to(dtype),
        inverse=inverse.to(dtype),
        r=r,
        beta=beta,
        W=W,
        S=W.clone(),
        E=torch.zeros_like(W),
        Z=torch.empty((program.rows, program.shape[0]), dtype=dtype, device=W.device),
        U=torch.zeros((program.rows, program.shape[0]), dtype=dtype, device=W.device),
    )
    weights = (W / state.column).T
    for rows, A, _, _ in program.row_chunks(dtype):
        state.Z[rows] = A @ weights
    return state


def _inverse(scaled: Tensor, r: float) -> Tensor:
    """``(G + rI)⁻¹``: G is positive semidefinite to rounding, and r of the size of its mean diagonal, so this cannot fail."""
    shifted = scaled.clone()
    shifted.diagonal().add_(r)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _first_beta(W: Tensor, omega: Tensor, r: float) -> float:
    """β for which the threshold ``ω/(βr)`` is a twentieth of the weights, in the mean that the ℓ1 norm takes; the gain corrects it."""
    weights, omega = W.double(), omega.double()
    level = 0.05 * float(weights.square().sum()) / max(float((omega * weights.abs()).sum()), 1e-300)
    return 1.0 / (r * max(level, 1e-300))


def _gram(program: LayerProgram) -> tuple[Tensor, Tensor]:
    """``AᵀA`` (N, N) and ``YᵀA`` (M, N), accumulated in float64."""
    M, N = program.shape
    G = torch.zeros((N, N), dtype=torch.float64, device=program.device)
    C = torch.zeros((M, N), dtype=torch.float64, device=program.device)
    for _, A, Y, _ in program.row_chunks():
        G.addmm_(A.T, A)
        C.addmm_(Y.T, A)
    return G, C


def step(program: LayerProgram, s: State) -> float:
    """One iteration; the returned gain in [0, 1] is the share of the residual that the budget leaves (1: inactive)."""
    kept, cut, gain = _project(program, s)
    T = torch.lerp(s.S, s.W, OVER_RELAXATION).add_(s.E)
    level = 1.0 if program.regularization is None else program.regularization
    omega = program.l1_weights.to(s.W)  # type: ignore[union-attr]
    s.S = soft_threshold(T, level * omega / s.column / (s.beta * s.r))
    s.E = T - s.S
    s.W = ((kept - cut) / s.column + s.r * (s.S - s.E)) @ s.inverse
    return gain


def _project(program: LayerProgram, s: State) -> tuple[Tensor, Tensor, float]:
    """Step 1 for all rows, and the two halves of step 3's right-hand side: ``(Z − U)ᵀA = kept − cut``.

    How much of the residual ``D`` a budget leaves depends on the norm of all of it. Rows in memory are read twice, with one product each time. A
    stream is read once: the right-hand side is linear in that share, so ``VᵀA`` and ``DᵀA`` are gathered apart.
    """
    weights = (s.W / s.column).T
    kept, cut = torch.zeros_like(s.W), torch.zeros_like(s.W)
    known = None if program.regularization is None else s.beta / (1 + s.beta)
    total = 0.0
    for rows, A, Y, V0 in program.row_chunks(s.W.dtype):
        V = torch.lerp(s.Z[rows], A @ weights, OVER_RELAXATION).add_(s.U[rows])
        D = residual(V, Y, V0, relu=program.relu)
        if known is not None:
            U = _removed(program, D, Y, known)
            s.U[rows], s.Z[rows] = U, V.sub_(U)
            kept.addmm_((s.Z[rows] - U).T, A)
            continue
        total += float((torch.where(Y > 0, D, 0.0) if program.one_sided else D).square().sum())
        s.Z[rows], s.U[rows] = V, D
        if program.streamed:
            kept.addmm_(V.T, A)
            cut.addmm_(D.T, A)
    if known is not None:
        return kept, cut, known
    assert program.epsilon is not None
    norm = math.sqrt(total)
    gain = 1.0 if norm <= program.epsilon else program.epsilon / norm
    if program.streamed:
        s.U *= 1 - gain
        s.Z -= s.U
        return kept, cut.mul_(2 * (1 - gain)), gain
    for rows, A, Y, _ in program.row_chunks(s.W.dtype):
        U = _removed(program, s.U[rows], Y, gain)
        s.U[rows] = U
        s.Z[rows] -= U
        kept.addmm_((s.Z[rows] - U).T, A)
    return kept, cut, gain


def _removed(program: LayerProgram, D: Tensor, Y: Tensor, gain: float) -> Tensor:
    """``U``: what the proximal operator takes from the residual, ``(1 − gain) D``; all of it where an inequality is hard."""
    if not program.one_sided:
        return D * (1 - gain)
    return torch.where(Y > 0, D * (1 - gain), D)



def scale_weights(s: State, factor: float) -> None:
    """Multiply β, and with it σ; the multipliers ``βU`` and ``σE`` stay what they are."""
    s.beta *= factor
    s.U /= factor
    s.E /= factor


def change_support_weight(s: State, factor: float) -> None:
    """Multiply σ alone, at the price of one factorisation; the multipliers ``σE`` stay what they are."""
    s.r *= factor
    s.E /= factor
    scaled = s.G.double() / s.column.double() / s.column.double()[:, None]
    s.inverse = _inverse(scaled, s.r).to(s.W.dtype)


def watched_step(program: LayerProgram, s: State) -> tuple[float, float]:
    """One iteration, and how its residuals compare: primal over dual, for ``Z = A Wᵀ`` and for ``S = W``.

    Primal: ``‖A Wᵀ − Z‖/‖Z‖``, ``‖W − S‖/‖S‖``; dual: ``‖Z − Z_before‖/‖U‖``, ``‖S − S_before‖/‖E‖`` (Boyd et al., 2011, section 3.4.1, both
    relative, so that the units cancel).
    """
    Z, S = s.Z.clone(), s.S
    step(program, s)
    weights = (s.W / s.column).T
    apart = sum(float((A @ weights - s.Z[rows]).double().square().sum()) for rows, A, _, _ in program.row_chunks(s.W.dtype))
    of_Z = _ratio(math.sqrt(apart) / _norm(s.Z), _norm(s.Z - Z) / _norm(s.U))
    of_S = _ratio(_norm(s.W - s.S) / _norm(s.S), _norm(s.S - S) / _norm(s.E))
    return of_Z, of_S


def _norm(X: Tensor) -> float:
    return max(float(X.norm()), 1e-300)


def _ratio(primal: float, dual: float) -> float:
    return primal / max(dual, 1e-300)
