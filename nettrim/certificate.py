"""Promised against measured: the stored layer on its rows, the bound through the depth, the network end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nettrim import layers
from nettrim.errors import NetTrimError
from nettrim.report import Certificate, LayerReport
from nettrim.tracing import Trace


def stored_discrepancy(module: nn.Module, inputs: Tensor, targets: Tensor, activation: str | None) -> float:
    """``‖relu(output) − Y‖_F`` of the layer as it is stored, run on the rows ``inputs`` (P, N) against ``targets`` (P, M), in float64."""
    total = 0.0
    step = layers.ROWS_PER_CHUNK
    for A, Y in zip(inputs.split(step), targets.split(step), strict=True):
        out = layers.forward_rows(module, A).double()
        if activation == "relu":
            out = out.clamp(min=0)
        total += float((out - Y.double()).square().sum())
    return math.sqrt(total)


@dataclass(frozen=True)
class Promise:
    """What a pruned layer promised on its rows, and the sizes that say what rounding can add.

    Attributes
    ----------
    epsilon : float
        The absolute budget on its output.
    inflation : float or None
        The factor γ (or κγ) behind it; None for a budget of its own.
    rows : int
        P.
    output_norm : float
        ``‖Y‖_F``.
    sums_norm : float
        ``‖|A| |W|ᵀ‖_F``, with the larger of the dense and the pruned weights entry by entry.
    """

    epsilon: float
    inflation: float | None
    rows: int
    output_norm: float
    sums_norm: float


def make_promise(module: nn.Module, inputs: Tensor, targets: Tensor, dense: Tensor, epsilon: float, inflation: float | None) -> Promise:
    """The promise ``epsilon`` of a stored layer on its rows ``inputs`` (P, N), ``targets`` (P, M), with the dense weights (M, N)."""
    larger = torch.maximum(layers.as_matrix(module).to(dense).abs(), dense.abs()).T
    # in the precision of the data: of what rounding can add, a few digits are enough
    squares = sum(float((A.abs() @ larger).double().square().sum()) for A in inputs.split(layers.ROWS_PER_CHUNK))
    return Promise(epsilon, inflation, inputs.shape[0], float(targets.double().norm()), math.sqrt(squares))


def rounding(module: nn.Module, rows: int, output_norm: float, sums_norm: float) -> float:
    """How far two computed outputs of a layer may lie from each other where the exact ones are equal, Frobenius norm.

    Of each output the rounding of the entries to the weights' dtype, ``u |y|`` or half the spacing of subnormals, and of each sum of N products
    ``√N u' Σ|a w|``: errors of either sign add up like that (Higham, Mary, SIAM J. Sci. Comput. 2019).
    """
    matrix = layers.as_matrix(module)
    stored, summed = torch.finfo(matrix.dtype), torch.finfo(layers.compute_dtype(module))
    subnormals = math.sqrt(rows * len(matrix)) * stored.smallest_normal * stored.eps
    return stored.eps * output_norm + subnormals + math.sqrt(matrix.shape[1]) * summed.eps * sums_norm


def network_bound(dense: nn.Module, pruned: nn.Module, trace: Trace, promises: dict[str, Promise], mode: str) -> float:
    """Bound on the output discrepancy of a chain of layers, without normalising the weights (NIPS 2017, Theorems 1 and 2).

    ``e_0 = 0``, and with spectral norms over the columns without the bias

    * parallel: ``e_ℓ = ‖Ŵ_ℓ‖₂ e_{ℓ−1} + ε_ℓ``
    * cascade:  ``e_ℓ = √γ_ℓ ‖W_ℓ‖₂ e_{ℓ−1}``; ``ε_ℓ`` for the first layer and for a budget of its own
    * a layer that was not pruned: ``e_ℓ = ‖W_ℓ‖₂ e_{ℓ−1}``

    Each layer adds what rounding can add, since the figures measured are those of rounded outputs.
    """
    bound, rows, output_norm = 0.0, 0, 0.0
    for layer in trace.layers:
        promise = promises.get(layer.name)
        module = pruned.get_submodule(layer.name)
        if promise is not None:
            rows, output_norm, sums_norm = promise.rows, promise.output_norm, promise.sums_norm
        elif bound == 0:
            continue
        else:
            matrix = layers.as_matrix(module).double()
            bias = math.sqrt(rows) * float(matrix[:, -1].norm()) if layers.has_bias(module) else 0.0
            sums_norm = output_norm * float(matrix.norm()) + bias
            output_norm = output_norm * _spectral_norm(module) + bias
        inflation = None if promise is None else promise.inflation
        if promise is None:
            bound *= _spectral_norm(module)
        elif mode == "parallel":
            bound = _spectral_norm(module) * bound + promise.epsilon
        elif inflation is None:
            bound = promise.epsilon
        else:
            bound *= math.sqrt(inflation) * _spectral_norm(dense.get_submodule(layer.name))
        # once for the two runs of the stored layer, and once for the dense run that an inflated budget was measured against
        bound += rounding(module, rows, output_norm + bound, sums_norm) * (1 if inflation is None else 1 + math.sqrt(inflation))
    return bound


def _spectral_norm(module: nn.Module) -> float:
    matrix = layers.as_matrix(module).double()
    return float(torch.linalg.matrix_norm(matrix[:, :-1] if layers.has_bias(module) else matrix, ord=2))


def certify(
    reports: tuple[LayerReport, ...],
    outputs: tuple[Tensor, Tensor],
    holdout: tuple[Tensor, Tensor] | None,
    guaranteed: float | None,
    why_not: str | None,
) -> Certificate:
    """The network's certificate.

    Parameters
    ----------
    reports : tuple of LayerReport
        Each with its promise and what was measured.
    outputs, holdout : (dense, pruned) Tensors
        The network's outputs on the samples solved on, and on those kept out.
    guaranteed : float or None
        The bound on the network's output discrepancy.
    why_not : str or None
        Why there is no bound, where it is None.
    """
    measured, relative = _difference(*outputs)
    broken = [report.name for report in reports if not report.discrepancy <= report.epsilon]
    within = guaranteed is None or measured <= guaranteed
    if broken:
        explanation = f"the promise was broken in {', '.join(broken)}"
    elif not within:
        explanation = "the network's output differs by more than the bound"
    elif not reports:
        explanation = "no layer was pruned, so the output is the dense network's"
    elif guaranteed is None:
        explanation = f"no bound for the network: {why_not}. The promise of every layer was measured, and the output end to end"
    else:
        explanation = "every layer keeps its promise, and the output lies within the bound that follows from them"
    return Certificate(
        holds=not broken and within and math.isfinite(measured),
        guaranteed=guaranteed,
        measured=measured,
        holdout=None if holdout is None else _difference(*holdout)[1],
        relative_measured=relative,
        explanation=explanation,
    )


def _difference(dense: Tensor, pruned: Tensor) -> tuple[float, float]:
    """Frobenius norm of the difference, absolute and relative to the dense output."""
    if dense.shape != pruned.shape:
        raise NetTrimError(
            f"the pruned network's output has {tuple(pruned.shape)} rows and columns over all batches, the dense one's {tuple(dense.shape)}; its "
            "shape depends on values, so the two cannot be compared: give a forward_fn that returns an output of fixed shape"
        )
    difference = float((pruned.double() - dense.double()).norm())
    norm = float(dense.double().norm())
    return difference, difference / norm if norm > 0 else (0.0 if difference == 0 else math.inf)
