"""Layer programs for the tests: every kind, random ones of every awkward structure, and ones from a network trained here."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettrim import LayerProgram
from nettrim.residual import ONE_SIDED_TOLERANCE


@dataclass(frozen=True)
class Kind:
    """One of the six programs: what follows the layer, which set, and a budget or a penalty."""

    name: str
    activation: str | None
    consistency: str
    budget: bool

    @property
    def one_sided(self) -> bool:
        return self.activation == "relu" and self.consistency == "paper"

    def program(self, A: Tensor, Y: Tensor, *, share: float, dense: Tensor | None = None, l1_weights: Any = None) -> LayerProgram:
        """The program of this kind on given data.

        ``share`` is the budget over ``‖Y‖_F``, or λ over the smallest λ whose optimum is 0. With the ``dense`` weights it is a cascade's: for the
        paper's set ``V = A W_denseᵀ``, and a budget is ``ε² = γ F(W_dense)``, which the dense weights keep.
        """
        options: dict[str, Any] = {"activation": self.activation, "l1_weights": l1_weights}
        if self.activation == "relu":
            options["consistency"] = self.consistency
        if self.one_sided and dense is not None:
            options["upper"] = A @ dense.T
        if not self.budget:
            return LayerProgram(A, Y, regularization=share * largest_penalty(A, Y, l1_weights), **options)
        epsilon = share * float(Y.norm())
        if dense is not None:
            epsilon = math.sqrt(GAMMA * LayerProgram(A, Y, epsilon=1.0, **options).misfit(dense)) or epsilon
        return LayerProgram(A, Y, epsilon=epsilon, **options)


GAMMA = 1.1

KINDS = {
    kind.name: kind
    for kind in (
        Kind("relaxed-budget", "relu", "relaxed", True),
        Kind("paper-budget", "relu", "paper", True),
        Kind("linear-budget", None, "relaxed", True),
        Kind("relaxed-penalised", "relu", "relaxed", False),
        Kind("paper-penalised", "relu", "paper", False),
        Kind("linear-penalised", None, "relaxed", False),
    )
}


def largest_penalty(A: Tensor, Y: Tensor, l1_weights: Any) -> float:
    """The λ from which ``W = 0`` is optimal, over the penalised columns (1 where there is nothing to explain)."""
    omega = torch.ones(A.shape[1], dtype=A.dtype) if l1_weights is None else torch.as_tensor(l1_weights, dtype=A.dtype)
    correlation = (Y.T @ A).abs()
    ratio = torch.where(omega > 0, correlation / omega.clamp(min=1e-300), 0.0)
    return float(ratio.max()) or 1.0


# -- random programs --------------------------------------------------------------------------------------------------------------

STRUCTURES = (
    "plain",
    "wide",
    "duplicate_columns",
    "dead_columns",
    "rank_deficient",
    "ill_scaled",
    "dead_neurons",
    "always_active",
    "one_row",
    "tiny_units",
    "huge_units",
    "free_bias",
    "weighted",
    "cascade",
)


def random_layer(seed: int, structure: str = "plain") -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """``A``, the dense weights, another input (that of a cascade) or None, and the ℓ1 weights."""
    rng = np.random.default_rng([seed, STRUCTURES.index(structure)])
    P, N, M = int(rng.integers(40, 61)), int(rng.integers(8, 13)), int(rng.integers(2, 4))
    if structure == "wide":
        P = int(rng.integers(4, 8))
    if structure == "one_row":
        P = 1
    A = rng.standard_normal((P, N)) + 0.3
    W = rng.standard_normal((M, N)) * (rng.random((M, N)) < 0.6)
    other, l1_weights = None, None
    if structure == "duplicate_columns":
        A[:, 1], A[:, -1] = A[:, 0], A[:, 2]
    elif structure == "dead_columns":
        A[:, [0, 3]] = 0.0
    elif structure == "rank_deficient":
        A = A[:, :4] @ rng.standard_normal((4, N))
    elif structure == "ill_scaled":
        A = A * 10.0 ** rng.permutation(np.linspace(-6, 6, N))
        W = W / np.abs(A).max(0)
        l1_weights = torch.from_numpy(np.abs(A).max(0))
    elif structure == "dead_neurons":
        A = np.abs(A)
        W[0] = -np.abs(W[0]) - 0.1
    elif structure == "always_active":
        A = np.abs(A)
        W[-1] = np.abs(W[-1]) + 0.1
    elif structure == "tiny_units":
        A = A * 1e-6
    elif structure == "huge_units":
        A = A * 1e6
    elif structure == "free_bias":
        A[:, -1] = 1.0
        W[:, -1] = 2.0 * rng.standard_normal(M)
        l1_weights = torch.ones(N, dtype=torch.float64)
        l1_weights[-1] = 0.0
    elif structure == "weighted":
        l1_weights = torch.from_numpy(0.2 + 2 * rng.random((M, N)))
    elif structure == "cascade":
        other = torch.from_numpy(A + 0.2 * rng.standard_normal(A.shape))
    return torch.from_numpy(A), torch.from_numpy(W), other, l1_weights


def random_program(kind: Kind, seed: int, structure: str = "plain", *, dtype: torch.dtype = torch.float64) -> LayerProgram:
    """A small program whose dense weights are feasible; ``share`` runs through loose and tight levels with the seed."""
    A, W, other, l1_weights = random_layer(seed, structure)
    Z = A @ W.T
    Y = Z if kind.activation is None else Z.clamp(min=0)
    share = ((0.3, 0.1, 0.05, 0.2) if kind.budget else (0.3, 0.1, 0.03, 0.5))[seed % 4]
    if l1_weights is not None:
        l1_weights = l1_weights.to(dtype)
    dense = None if other is None else W.to(dtype)
    return kind.program((A if other is None else other).to(dtype), Y.to(dtype), share=share, dense=dense, l1_weights=l1_weights)


# -- programs from a trained network ----------------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8×8 handwritten digits in [0, 1], (1797, 64), and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data / 16.0), torch.from_numpy(data.target)


@functools.cache
def trained_network() -> list[Tensor]:
    """The weights, bias last, of a 64-12-8-10 ReLU network that reads digits: trained once a session, in a second."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    X, labels = digits()
    network = MLPClassifier((12, 8), learning_rate_init=0.01, max_iter=20, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(X.numpy(), labels.numpy())
    assert network.score(X.numpy(), labels.numpy()) > 0.9
    return [torch.from_numpy(np.c_[W.T, b]) for W, b in zip(network.coefs_, network.intercepts_, strict=True)]


TRAINED_PROGRAMS = 10


def trained_layer(index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (with the ones column), noisy ones (as a cascade's) and dense weights of a trained layer: another layer and sample each time."""
    layers, (X, _) = trained_network(), digits()
    rng = np.random.default_rng(index)
    features = X[rng.permutation(len(X))[:60]]
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    depth = index % len(layers)
    for weights in layers[:depth]:
        features = (torch.cat([features, ones], 1) @ weights.T).clamp(min=0)
    noisy = features * torch.from_numpy(1 + 0.05 * rng.standard_normal(features.shape))
    neurons = rng.permutation(len(layers[depth]))[:3]
    return torch.cat([features, ones], 1), torch.cat([noisy, ones], 1), layers[depth][neurons]


def trained_program(kind: Kind, index: int, *, dtype: torch.dtype = torch.float64) -> LayerProgram:
    """A program on a trained layer's own activations; every third one is a cascade's, every second one penalises no bias."""
    A, noisy, W = trained_layer(index)
    Z = A @ W.T
    Y = Z if kind.activation is None else Z.clamp(min=0)
    cascade = index % 3 == 2
    l1_weights = torch.ones(A.shape[1], dtype=dtype)
    l1_weights[-1] = float(index % 2)
    share = (0.05, 0.1, 0.2)[index % 3] if kind.budget else (0.02, 0.05, 0.2)[index % 3]
    dense = W.to(dtype) if cascade else None
    return kind.program((noisy if cascade else A).to(dtype), Y.to(dtype), share=share, dense=dense, l1_weights=l1_weights)


# -- judging by other means than the package's own ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """What numpy says of some weights, straight from the papers' formulas."""

    objective: float
    distance: float
    one_sided: float
    discrepancy: float
    misfit: float

    def feasible(self, program: LayerProgram) -> bool:
        """Budget kept to rounding; one-sided excess within the stated share of the budget (of ‖Y‖ without one)."""
        scale = float(program.targets.double().norm()) if program.epsilon is None else program.epsilon
        if self.one_sided > ONE_SIDED_TOLERANCE * (1 + 1e-9) * scale:
            return False
        return program.epsilon is None or self.distance <= program.epsilon * (1 + 1e-9)


def audit(program: LayerProgram, weights: Tensor) -> Audit:
    """Objective, distances and discrepancy of weights, in numpy float64."""
    A, Y, W = (x.double().numpy() for x in (program.inputs, program.targets, weights))
    Z = A @ W.T
    inside = Y > 0 if program.activation == "relu" else np.ones_like(Y, dtype=bool)
    V = np.zeros_like(Y) if program.upper is None else program.upper.double().numpy()
    on = sum((Z[i, m] - Y[i, m]) ** 2 for i, m in zip(*np.nonzero(inside), strict=True))
    off = sum(max(Z[i, m] - V[i, m], 0.0) ** 2 for i, m in zip(*np.nonzero(~inside), strict=True))
    paper = program.activation == "relu" and program.consistency == "paper"
    misfit = float(on if paper else on + off)
    objective = float((np.broadcast_to(program.l1_weights.double().numpy(), W.shape) * np.abs(W)).sum())
    if program.regularization is not None:
        objective = program.regularization * objective + 0.5 * misfit
    output = np.maximum(Z, 0) if program.activation == "relu" else Z
    return Audit(objective, math.sqrt(on + off), math.sqrt(off) if paper else 0.0, float(np.linalg.norm(output - Y)), misfit)


def kkt_residual(program: LayerProgram, weights: Tensor, *, active: float = 1e-3) -> float:
    """The smallest relative error of the optimality conditions over all multipliers, by a linear program.

    With the multiplier τ ≥ 0 of the budget (1 in a penalised program) and η ≥ 0 of the one-sided constraints that are active: ``|τ AᵀD + Aᵀη| ≤ ω``,
    and ``= −ω sign(w)`` on the support. The error of column j is relative to ``ω_j + ‖a_j‖ · mean(ω/‖a‖)``.
    """
    from scipy.optimize import linprog

    A, Y, W = (x.double().numpy() for x in (program.inputs, program.targets, weights))
    M, N = W.shape
    V = np.zeros_like(Y) if program.upper is None else program.upper.double().numpy()
    level = 1.0 if program.regularization is None else program.regularization
    omega = np.broadcast_to(program.l1_weights.double().numpy(), (M, N)) * level
    Z = A @ W.T
    inside = Y > 0 if program.activation == "relu" else np.ones_like(Y, dtype=bool)
    paper = program.activation == "relu" and program.consistency == "paper"
    D = np.where(inside, Z - Y, 0.0 if paper else np.maximum(Z - V, 0.0))
    norms = np.maximum(np.linalg.norm(A, axis=0), 1e-300)
    size = omega + norms * (omega / norms)[:, norms > 1e-200].mean()
    large = np.abs(W) * norms > 1e-3 * max(float((np.abs(W) * norms).max()), 1e-300)
    tight = [(i, m) for i, m in zip(*np.nonzero(~inside), strict=True) if paper and V[i, m] - Z[i, m] <= active * max(Y.max(), 1e-300)]
    # columns of the linear program: the error t, τ, then one η for each active inequality
    slope = np.zeros((M * N, 2 + len(tight)))
    unit = 1.0 if program.regularization is not None else max(float((np.abs(D.T @ A) / size).max()), 1e-300)
    slope[:, 1] = (D.T @ A).ravel() / unit
    for k, (i, m) in enumerate(tight):
        slope[m * N : (m + 1) * N, 2 + k] = A[i] / max(float((np.abs(A[i]) / size[m]).max()), 1e-300)
    error = np.zeros_like(slope)
    error[:, 0] = size.ravel()
    target, free = (-omega * np.sign(W) * large).ravel(), (omega * ~large).ravel()
    rows = np.concatenate([slope - error, -slope - error]) / size.ravel()[np.r_[0 : M * N, 0 : M * N], None]
    limits = np.concatenate([target + free, free - target]) / np.tile(size.ravel(), 2)
    bounds: list[tuple[float, float | None]] = [(0, None)] * (2 + len(tight))
    if program.regularization is not None:
        bounds[1] = (1.0, 1.0)
    elif np.linalg.norm(D) < program.epsilon * (1 - active):
        bounds[1] = (0.0, 0.0)
    result = linprog(np.eye(1, 2 + len(tight))[0], A_ub=rows, b_ub=limits, bounds=bounds)
    assert result.success, result.message
    return float(result.fun)
