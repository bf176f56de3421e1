"""Promised against measured: the stored layer on its rows, the bound through the depth, the network end to end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nettrim.aims import Aim
from nettrim.errors import NetTrimError
from nettrim.grams import square_sum
from nettrim.layers import Matrix
from nettrim.observing import Layer
from nettrim.precision import rough_dtype
from nettrim.report import Certificate, LayerReport
from nettrim.tracing import Trace, TracedLayer

_AVERAGED = 2**20  # sums from which their roundings to bfloat16 leave less than 1e-5 of a norm over all of them
_CACHED = 2**18  # of a layer's outputs at a time
_CHUNK = 2**22  # of an output's elements at a time


def stored_discrepancy(matrix: Matrix, layer: Layer) -> float:
    """``‖output − Y‖_F`` of the stored ``matrix``, run on all the layer's rows, against the dense network's output, in float64."""
    return math.sqrt(sum(_apart(layer, Z, U) for rows in layer.stored(matrix) for U, _, Z in _pieces(layer, rows)))


def _pieces(layer: Layer, rows: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Of rows of a stored layer ``U``, what is added to it and ``Z`` in float64, so few at a time that what is made of them stays in the cache."""
    _, U, more, stored = rows
    step = max(1, _CACHED // U.shape[1])
    for start in range(0, len(U), step):
        here = slice(start, start + step)
        yield U[here], None if more is None else more[here], layer.wide(stored[here])


def _apart(layer: Layer, Z: Tensor, U: Tensor) -> float:
    """``‖output − Y‖²`` of some rows, ``Z`` being the stored layer's pre-activations."""
    if layer.function is None:  # and a BatchNorm's shift is the same for both
        return square_sum(Z - U)
    return square_sum(layer.output(Z) - layer.output(U.to(Z.dtype)))


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


def output_norm(layer: Layer) -> float:
    """``‖Y‖_F`` of all the layer's rows."""
    return math.sqrt(sum(square_sum(layer.output(U)) for _, U in layer.observation.chunks()))


def make_promise(matrix: Matrix, layer: Layer, epsilon: float, inflation: float | None) -> Promise:
    """The promise ``epsilon`` of a stored layer, on all its rows."""
    output, sums = 0.0, _Sums(matrix, layer)
    for A, U in layer.observation.chunks():
        output += square_sum(layer.output(U))
        sums.add(A)
    return Promise(epsilon, inflation, layer.rows, math.sqrt(output), sums.norm)


class Measured(NamedTuple):
    """What stored weights leave: as a promise, ``√F``, of the output, and for an aim ``Σ_p d_pᵀ S d_p`` of the sum that the output is a part of."""

    promise: Promise
    discrepancy: float
    weighed: float


def measure(matrix: Matrix, layer: Layer, distance: Callable[[Tensor, Tensor], Tensor], aim: Aim | None) -> Measured:
    """One pass over the rows of a stored layer; its ``discrepancy`` is `stored_discrepancy`.

    ``distance(Z, U)`` is the residual that ``F`` sums the squares of, for pre-activations as the stored layer computes them. Entry by entry it is no
    smaller than the discrepancy of their outputs. Without an ``aim`` nothing is ``weighed``.
    """
    output = apart = left = weighed = 0.0
    sums = _Sums(matrix, layer)
    for rows in layer.stored(matrix):
        for U, more, Z in _pieces(layer, rows):
            output += square_sum(layer.output(U))
            here = square_sum(distance(Z, U))
            left += here
            apart += here if layer.function is None else _apart(layer, Z, U)
            if aim is not None:
                plain = layer.function is None and aim.metric is None and more is None  # the same residual
                D = None if plain else Z - (U if more is None else U + more)
                weighed += here if D is None else square_sum(D) if aim.metric is None else aim.metric.square(D)
        sums.add(rows[0])
    left *= layer.lipschitz**2
    return Measured(Promise(math.sqrt(left), None, layer.rows, math.sqrt(output), sums.norm), math.sqrt(apart), weighed)


class _Sums:
    """``‖|A| |W|ᵀ‖_F`` with the larger of the dense and the stored weights, chunk by chunk, to the few digits that rounding's size needs."""

    def __init__(self, matrix: Matrix, layer: Layer) -> None:
        larger = torch.maximum(layer.read(matrix).abs(), layer.dense.abs())
        if layer.rows * len(larger) >= _AVERAGED:
            larger = larger.to(rough_dtype(larger) or larger.dtype)
        self._layer, self._larger, self._square = layer, larger, 0.0

    def add(self, A: Tensor) -> None:
        self._square += square_sum(self._layer.apply(self._larger, A.to(self._larger.dtype).abs()).to(self._layer.dense.dtype))

    @property
    def norm(self) -> float:
        return self._layer.lipschitz * math.sqrt(self._square)


def rounding(matrix: Matrix, rows: int, output_norm: float, sums_norm: float) -> float:
    """How far two computed outputs of a layer may lie from each other where the exact ones are equal, Frobenius norm.

    Of each output the rounding of the entries to the weights' dtype, ``u |y|`` or half the spacing of subnormals, and of each sum of N products
    ``√N u' Σ|a w|``: errors of either sign add up like that (Higham, Mary, SIAM J. Sci. Comput. 2019).
    """
    M, N = matrix.shape
    stored, summed = torch.finfo(matrix.weight.dtype), torch.finfo(matrix.compute_dtype)
    subnormals = math.sqrt(rows * M) * stored.smallest_normal * stored.eps
    return stored.eps * output_norm + subnormals + math.sqrt(N + matrix.has_bias) * summed.eps * sums_norm


def network_bound(dense: nn.Module, pruned: nn.Module, trace: Trace, promises: dict[str, Promise], mode: str) -> float:
    """Bound on the output discrepancy of a chain of layers, without normalising the weights (NIPS 2017, Theorems 1 and 2).

    ``e_0 = 0``, and with spectral norms over the columns without the bias, of the weights with a BatchNorm folded in,

    * parallel: ``e_ℓ = ‖Ŵ_ℓ‖₂ e_{ℓ−1} + ε_ℓ``
    * cascade:  ``e_ℓ = √γ_ℓ ‖W_ℓ‖₂ e_{ℓ−1}``; ``ε_ℓ`` for the first layer and for a budget of its own
    * a layer that was not pruned: ``e_ℓ = ‖W_ℓ‖₂ e_{ℓ−1}``

    each norm times the activation's Lipschitz constant, and times √c where an entry of the input lies in up to c rows, as the patches of a
    convolution overlap. Each layer adds what rounding can add, since the figures measured are those of rounded outputs.
    """
    bound, output_norm = 0.0, 0.0
    for layer in trace.layers:
        promise = promises.get(layer.name)
        stored, rows = layer.of(pruned), layer.rows
        if promise is not None:
            output_norm, sums_norm = promise.output_norm, promise.sums_norm
        elif bound == 0:
            continue
        else:
            weights, bias = _folded(layer, stored)
            slope, at_zero = (1.0, 0.0) if layer.function is None else (layer.function.lipschitz, layer.function.at_zero)
            added = 0.0 if bias is None else slope * math.sqrt(rows) * float(bias.norm())
            sums_norm = slope * output_norm * layer.spread * float(weights.norm()) + added
            output_norm = output_norm * _reach(layer, stored) + added + math.sqrt(rows * stored.shape[0]) * at_zero
        inflation = None if promise is None else promise.inflation
        if promise is None:
            bound *= _reach(layer, stored)
        elif mode == "parallel":
            bound = _reach(layer, stored) * bound + promise.epsilon
        elif inflation is None:
            bound = promise.epsilon
        else:
            bound *= math.sqrt(inflation) * _reach(layer, layer.of(dense))
        # once for the two runs of the stored layer, and once for the dense run that an inflated budget was measured against
        bound += rounding(stored, rows, output_norm + bound, sums_norm) * (1 if inflation is None else 1 + math.sqrt(inflation))
    return bound


def _folded(layer: TracedLayer, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """A layer's weights and its constant part, float64, a BatchNorm folded in."""
    weights, bias = matrix.weights().double(), matrix.bias()
    bias = None if bias is None else bias.double()
    if layer.norm is None:
        return weights, bias
    scale, shift = layer.norm.scale.to(weights.device), layer.norm.shift.to(weights.device)
    return weights * scale[:, None], shift if bias is None else bias * scale + shift


def _reach(layer: TracedLayer, matrix: Matrix) -> float:
    """By what factor a layer's outputs can differ more than its inputs do."""
    weights, _ = _folded(layer, matrix)
    largest = max(float(torch.linalg.matrix_norm(block, ord=2)) for block in weights.chunk(matrix.groups))
    return largest * layer.spread * (1.0 if layer.function is None else layer.function.lipschitz)


@dataclass
class Apart:
    """How far the outputs of two networks lie apart, summed up batch by batch, so that no output is held.

    Attributes
    ----------
    difference, square : float
        ``‖pruned − dense‖²`` and ``‖dense‖²``.
    """

    difference: float = 0.0
    square: float = 0.0

    def add(self, dense: list[Tensor], pruned: list[Tensor]) -> None:
        """Add the floating-point tensors of a batch's output.

        Raises
        ------
        NetTrimError
            They have different shapes.
        """
        if [tensor.shape for tensor in dense] != [tensor.shape for tensor in pruned]:
            raise _incomparable([tuple(tensor.shape) for tensor in pruned], [tuple(tensor.shape) for tensor in dense])
        for ours, theirs in zip(dense, pruned, strict=True):
            for a, b in zip(ours.reshape(-1).split(_CHUNK), theirs.reshape(-1).split(_CHUNK), strict=True):
                self.difference += square_sum(b.double() - a.double())
                self.square += square_sum(a)

    @property
    def figures(self) -> tuple[float, float]:
        """The Frobenius norm of the difference, absolute and relative to the dense output."""
        return _figures(math.sqrt(self.difference), math.sqrt(self.square))


def certify(
    reports: tuple[LayerReport, ...],
    outputs: tuple[Tensor, Tensor] | Apart,
    holdout: tuple[Tensor, Tensor] | Apart | None,
    guaranteed: float | None,
    why_not: str | None,
) -> Certificate:
    """The network's certificate.

    Parameters
    ----------
    reports : tuple of LayerReport
        Each with its promise and what was measured.
    outputs, holdout : (dense, pruned) Tensors, or Apart
        The network's outputs on the samples solved on, and on those kept out; or how far they lie apart.
    guaranteed : float or None
        The bound on the network's output discrepancy.
    why_not : str or None
        Why there is no bound, where it is None.
    """
    measured, relative = outputs.figures if isinstance(outputs, Apart) else _difference(*outputs)
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
        holdout=None if holdout is None else (holdout.figures if isinstance(holdout, Apart) else _difference(*holdout))[1],
        relative_measured=relative,
        explanation=explanation,
    )


def _difference(dense: Tensor, pruned: Tensor) -> tuple[float, float]:
    """Frobenius norm of the difference, absolute and relative to the dense output."""
    if dense.shape != pruned.shape:
        raise _incomparable(tuple(pruned.shape), tuple(dense.shape))
    return _figures(float((pruned.double() - dense.double()).norm()), float(dense.double().norm()))


def _figures(difference: float, norm: float) -> tuple[float, float]:
    return difference, share(difference, norm)


def share(discrepancy: float, norm: float) -> float:
    """A discrepancy relative to the norm of what it is about: none of nothing is 0, and any of nothing infinite."""
    return discrepancy / norm if norm > 0 else 0.0 if discrepancy == 0 else math.inf


def _incomparable(pruned: object, dense: object) -> NetTrimError:
    return NetTrimError(
        f"the pruned network's output has {pruned} rows and columns over all batches, the dense one's {dense}; its "
        "shape depends on values, so the two cannot be compared: give a forward_fn that returns an output of fixed shape"
    )
