"""One iteration of ``prox_admm``: the iterates, the three steps, and the weights that may change on the way.

    min  ½ misfit(Z) + λ Σ ω|s|   s.t.  Z = A Wᵀ (weight β, scaled multipliers U),  S = W (weight βr, scaled multipliers E)

A penalised program says λ; a budget moves it. See :mod:`nettrim.solvers.prox_admm` for the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.programs import LayerProgram
from nettrim.proximal import soft_threshold

OVER_RELAXATION = 1.7
FIRST_LEVEL = 0.005  # λ over the one from which 0 is optimal, a unit of ε/‖Y‖: where a budget's λ starts
_LEVEL_STEP = 2.0  # by which λ may change in an iteration
_LEVEL_RANGE = 100.0  # and in all
_SETTLED = 0.05
SUPPORT_RANGE = 1e6


@dataclass
class State:
    """The iterates in one precision; ``W``, ``S``, ``E`` are in scaled columns (``W = W_true · column``), those of the working set."""

    columns: Tensor | None  # their indices; None for all
    column: Tensor
    omega: Tensor  # ω / column
    G: Tensor  # Gram matrix of the unscaled columns, float64
    mean: float  # of its diagonal, dead columns apart
    inverse: Tensor
    r: float
    beta: float
    level: float  # λ
    first_level: float
    projecting: bool  # onto the budget's set, λ being what it is; else λ moves, and the misfit is penalised
    settled: int  # iterations for which λ has hardly moved
    W: Tensor
    S: Tensor
    E: Tensor
    Z: Tensor  # (P, M)
    U: Tensor  # (P, M)

    @property
    def weights(self) -> Tensor:
        """``S``, the sparse iterate, in true columns."""
        return self.S / self.column


def start(program: LayerProgram, dtype: torch.dtype, initial: Tensor | None, beta: float, support_weight: float) -> State:
    """The first iterates, 0 unless weights are given; ``r`` is ``support_weight`` times the mean diagonal of AᵀA.

    Inputs that are 0 in every row have no part in any of it, as where presolve has taken them out.
    """
    G, C = _gram(program)
    live = G.diagonal() > 0
    mean = float(G.diagonal()[live].mean()) if bool(live.any()) else 1.0
    column = column_scale(G, mean)
    omega = program.l1_weights.double()  # type: ignore[union-attr]
    level = program.regularization or _first_level(program, C)
    W = torch.zeros(program.shape, dtype=dtype, device=program.device)
    if initial is not None:
        W = torch.where(live, initial.double() * column, 0.0).to(dtype)
    r = support_weight * mean
    state = State(
        columns=None,
        column=column.to(dtype),
        omega=(omega / column).to(dtype),
        G=G,
        mean=mean,
        inverse=inverse(G, column, r).to(dtype),
        r=r,
        beta=beta,
        level=level,
        first_level=level,
        projecting=False,
        settled=0,
        W=W,
        S=W.clone(),
        E=torch.zeros_like(W),
        Z=torch.zeros((program.rows, program.shape[0]), dtype=dtype, device=W.device),
        U=torch.zeros((program.rows, program.shape[0]), dtype=dtype, device=W.device),
    )
    if initial is not None:
        for rows, A, _, _ in program.row_chunks(dtype):
            state.Z[rows] = A @ state.weights.T
    return state


def first_level(program: LayerProgram) -> float:
    """Where the λ of a budget program starts."""
    return _first_level(program, _gram(program)[1])


def _first_level(program: LayerProgram, C: Tensor) -> float:
    assert program.epsilon is not None
    omega = program.l1_weights.double()  # type: ignore[union-attr]
    largest = float(torch.where(omega > 0, C.abs() / omega, 0.0).max()) or 1.0
    return FIRST_LEVEL * largest * max(program.epsilon / (program.target_norm or 1.0), 1e-12)


def refine(program: LayerProgram, s: State) -> None:
    """Go on in float64."""
    s.column = column_scale(s.G, s.mean)
    omega = program.l1_weights.double()  # type: ignore[union-attr]
    s.omega = (omega if s.columns is None else omega[..., s.columns]) / s.column
    s.inverse = inverse(s.G, s.column, s.r)
    for name in ("W", "S", "E", "Z", "U"):
        setattr(s, name, getattr(s, name).double())


def column_scale(G: Tensor, mean: float) -> Tensor:
    """What columns are divided by so that the diagonal of AᵀA is ``mean``; 1 for a dead one."""
    return torch.where(G.diagonal() > 0, (G.diagonal() / mean).sqrt(), 1.0)


def inverse(G: Tensor, column: Tensor, r: float) -> Tensor:
    """``(G/(column columnᵀ) + rI)⁻¹``: G is positive semidefinite to rounding, and r of the size of its mean diagonal, so this cannot fail."""
    shifted = G / column / column[:, None]
    shifted.diagonal().add_(r)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _gram(program: LayerProgram) -> tuple[Tensor, Tensor]:
    """``AᵀA`` (N, N) and ``YᵀA`` (M, N), accumulated in float64."""
    M, N = program.shape
    G = torch.zeros((N, N), dtype=torch.float64, device=program.device)
    C = torch.zeros((M, N), dtype=torch.float64, device=program.device)
    for _, A, Y, _ in program.row_chunks():
        G.addmm_(A.T, A)
        C.addmm_(Y.T, A)
    return G, C


def step(program: LayerProgram, s: State) -> None:
    """One iteration: steps 1 to 3, and λ's."""
    pull, ratio = _prox_misfit(program, s)
    T = torch.lerp(s.S, s.W, OVER_RELAXATION).add_(s.E)
    s.S = soft_threshold(T, s.level / (s.beta * s.r) * s.omega)
    s.E = T - s.S
    s.W = (pull / s.column + s.r * (s.S - s.E)) @ s.inverse
    if program.epsilon is not None and not s.projecting:
        s.settled = s.settled + 1 if abs(ratio - 1) < _SETTLED else 0
        _change_level(s, min(max(ratio, 1 / _LEVEL_STEP), _LEVEL_STEP))


def _prox_misfit(program: LayerProgram, s: State) -> tuple[Tensor, float]:
    """Step 1 for all rows: ``(Z − U)ᵀA``, which step 3 needs, and how many times over its ``√misfit(Z)`` the budget is.

    A penalty leaves ``β/(1 + β)`` of the residual ``D``, each row on its own, and the rows are read once. The projection leaves ``ε/‖D‖`` of
    it, which all rows decide: their inputs are read again. (In one pass, as ``VᵀA − 2 (1 − gain) DᵀA``, it takes a third product instead.)
    """
    weights = (s.W / s.column).T
    pull = torch.zeros_like(s.W)
    gain, total = s.beta / (1 + s.beta), 0.0
    for rows, A, Y, V0 in program.row_chunks(s.W.dtype, s.columns):
        Z, U = s.Z[rows], s.U[rows]
        V = torch.addmm(Z, A, weights, beta=1 - OVER_RELAXATION, alpha=OVER_RELAXATION).add_(U)
        D = program.residual(V, Y, V0)
        total += float(torch.linalg.vector_norm(torch.where(program.on_support(Y), D, 0.0) if program.one_sided else D)) ** 2
        if s.projecting:
            U.copy_(D)
            Z.copy_(V)
            continue
        _remove(program, D, Y, gain, U)
        torch.sub(V, U, out=Z)
        pull.addmm_((Z - U).T, A)
    if program.epsilon is None:
        return pull, 1.0
    norm = math.sqrt(total)
    if not s.projecting:
        return pull, program.epsilon / (gain * norm) if norm > 0 else _LEVEL_STEP
    gain = min(1.0, program.epsilon / norm) if norm > 0 else 1.0
    for rows, A, Y, _ in program.row_chunks(s.W.dtype, s.columns):
        Z, U = s.Z[rows], s.U[rows]
        _remove(program, U, Y, gain, U)
        Z -= U
        pull.addmm_((Z - U).T, A)
    return pull, 1.0


def _remove(program: LayerProgram, D: Tensor, Y: Tensor, gain: float, U: Tensor) -> None:
    """Put into ``U`` what the proximal operator takes from the residual, ``(1 − gain) D``; all of it where an inequality is hard."""
    if program.one_sided:
        torch.where(program.on_support(Y), D * (1 - gain), D, out=U)
    else:
        torch.mul(D, 1 - gain, out=U)


def _change_level(s: State, factor: float) -> None:
    """Multiply λ; the multipliers are of its size and change with it.

    It keeps within a range of its first value: while the iterates are far from the set, their misfit says nothing of λ.
    """
    if not s.level > 0:  # inputs whose squares are none in the program's dtype: no level is better than another
        return
    level = min(max(s.level * factor, s.first_level / _LEVEL_RANGE), s.first_level * _LEVEL_RANGE)
    factor = level / s.level
    s.level = level
    s.U *= factor
    s.E *= factor


def scale_weights(s: State, factor: float) -> None:
    """Multiply β, and with it βr; the multipliers ``βU`` and ``βrE`` stay what they are."""
    s.beta *= factor
    s.U /= factor
    s.E /= factor


def change_support_weight(s: State, factor: float) -> None:
    """Multiply r alone, at the price of one factorisation; the multipliers ``βrE`` stay what they are.

    ``r`` keeps within a range of the mean diagonal of AᵀA: below it a singular Gram matrix has no factor.
    """
    wanted = min(max(s.r * factor, s.mean / SUPPORT_RANGE), s.mean * SUPPORT_RANGE)
    factor = wanted / s.r
    s.r = wanted
    s.E /= factor
    s.inverse = inverse(s.G, s.column.double(), s.r).to(s.W.dtype)


def watched_step(program: LayerProgram, s: State) -> tuple[float, float]:
    """One iteration, and how its residuals compare: primal over dual, for ``Z = A Wᵀ`` and for ``S = W``.

    Primal: ``‖A Wᵀ − Z‖/‖Z‖``, ``‖W − S‖/‖S‖``; dual: ``‖Z − Z_before‖/‖U‖``, ``‖S − S_before‖/‖E‖`` (Boyd et al., 2011, section 3.4.1, both
    relative, so that the units cancel).
    """
    Z, S = s.Z.clone(), s.S
    step(program, s)
    weights = (s.W / s.column).T
    apart = sum(float((A @ weights - s.Z[rows]).double().square().sum()) for rows, A, _, _ in program.row_chunks(s.W.dtype, s.columns))
    of_Z = _ratio(math.sqrt(apart) / _norm(s.Z), _norm(s.Z - Z) / _norm(s.U))
    of_S = _ratio(_norm(s.W - s.S) / _norm(s.S), _norm(s.S - S) / _norm(s.E))
    return of_Z, of_S


def _norm(X: Tensor) -> float:
    return max(float(X.norm()), 1e-300)


def _ratio(primal: float, dual: float) -> float:
    return primal / max(dual, 1e-300)
