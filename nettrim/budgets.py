"""From what was captured of a layer to its program: the targets, the budget, and the promise on the layer's whole output.

Parallel (NIPS 2017, section 2.1): the layer sees the dense network's inputs and keeps ``ε = epsilon · ‖Y‖_F``.

Cascade (section 2.2): it sees the pruned network's inputs ``Â``, with the dense network's outputs ``Y`` as targets. Its budget is what the dense
weights would leave there, times ``γ ≥ 1``, so that they are feasible. With ``V = Â Wᵀ``:

* paper's set:          ``ε² = γ Σ_Ω (v − y)²`` and ``z ≤ v`` off Ω, which promises ``√(ε² + Σ_{Ωᶜ} max(v, 0)²)`` on the whole output
* relaxed, and no ReLU: ``ε² = γ F(W)``

and ``κ ≤ 1`` (the supplement's risk coefficient) tightens the last layer's: ``ε² = κγ …``, which may be infeasible. A layer that the pruning so
far leaves undisturbed, as the first one, has nothing to inflate: it gets ``epsilon · ‖Y‖_F``, as a layer with a budget of its own does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.patterns import NEURON, UNSTRUCTURED, Pattern
from nettrim.programs import LayerProgram
from nettrim.residual import residual


@dataclass(frozen=True)
class Layer:
    """A layer as its program needs it.

    Attributes
    ----------
    name : str
    inputs : Tensor, (P, N)
        What the program sees: ``A``, or ``Â`` in cascade.
    targets : Tensor, (P, M)
        ``Y``: the dense network's outputs, after the ReLU if one follows.
    outputs : Tensor, (P, M)
        The same before the ReLU.
    dense : Tensor, (M, N)
        The dense weights ``W``.
    activation : "relu" or None
    disturbed : bool
        Whether the inputs differ from the dense network's.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    outputs: Tensor
    dense: Tensor
    activation: str | None
    disturbed: bool


@dataclass(frozen=True)
class Budget:
    """A layer's program, the promise on its whole output, and how the promise follows from the input's disturbance.

    Attributes
    ----------
    program : LayerProgram
    promise : float or None
        Frobenius norm, absolute: what the stored layer's output may differ from the dense network's on these rows. None where a number of weights
        was asked for: then it is what the solution leaves.
    inflation : float or None
        The factor ``γ`` (``κγ`` for the last layer) by which a cascade layer's squared promise exceeds at most what the dense weights leave;
        None for a budget of its own.
    """

    program: LayerProgram
    promise: float | None
    inflation: float | None


def make_budget(
    layer: Layer, *, relative: float, own: bool, inflation: float, consistency: str, penalty: str, bias_weight: float, has_bias: bool
) -> Budget:
    """The program of one layer.

    ``relative`` is its share of ``‖Y‖_F``; ``own`` says that it was asked for this layer; ``inflation`` is ``γ`` (times ``κ``) and counts where the
    layer's inputs are disturbed and the budget is not its own. ``bias_weight`` is ``ω`` of the bias column; the ``"l0"`` penalty does not count it.
    """
    weights = torch.ones(layer.inputs.shape[1], dtype=layer.inputs.dtype, device=layer.inputs.device)
    if has_bias:
        weights[-1] = 0.0 if penalty == "l0" else bias_weight
    upper = _pre_activations(layer) if layer.disturbed and consistency == "paper" and layer.activation == "relu" else None

    def program(epsilon: float) -> LayerProgram:
        return LayerProgram(
            layer.inputs,
            layer.targets,
            epsilon=epsilon,
            penalty=penalty,
            activation=layer.activation,
            consistency=consistency,
            upper=upper,
            l1_weights=weights,
        )

    if own or not layer.disturbed:
        epsilon, factor = relative * float(layer.targets.double().norm()), None
    else:
        on, off = _dense_misfit(layer)
        epsilon, factor = math.sqrt(inflation * (on if upper is not None else on + off)), inflation
        if upper is not None:
            factor = max(inflation, 1.0)  # κ tightens the part on Ω alone
    promise = epsilon
    if upper is not None:
        promise = math.hypot(epsilon, math.sqrt(_dense_misfit(layer)[1]))
    return Budget(program(epsilon), promise, factor)


def make_selection(
    layer: Layer,
    *,
    sparsity: float,
    pattern: Pattern,
    repair: float,
    support: Tensor | None,
    metric: Tensor | None,
    has_bias: bool,
) -> Budget:
    """The program of one layer that is to have a share ``sparsity`` of zeros in a pattern.

    Before a ReLU too it is the program without one, for the pre-activations: their discrepancy is no smaller than that of the outputs, and the
    program sees ``G`` and ``C`` alone. The bias does not count and is fitted.

    Below a ``repair`` of 1 the targets lean towards what the dense weights make of the disturbed inputs, ``repair · A Wᵀ + (1 − repair) · Â Wᵀ``.
    With ``support``, (M, N) bool, only those weights may stay; in the pattern of neurons it says which do.
    ``metric`` (M, M) or (M,) is the program's.
    """
    width = layer.dense.shape[1] - has_bias
    shape = (layer.dense.shape[0], width)
    weights = torch.ones(layer.inputs.shape[1], dtype=layer.inputs.dtype, device=layer.inputs.device)
    weights[width:] = 0.0
    targets = layer.outputs
    if repair < 1 and layer.disturbed:
        targets = torch.lerp(layer.inputs @ layer.dense.T, targets, repair)
    if pattern is NEURON:
        assert support is not None
        pattern, kept = UNSTRUCTURED, int(support[:, :width].sum())
    else:
        pattern.check(shape, f"layer {layer.name!r}")
        kept = pattern.kept(shape, sparsity)
    program = LayerProgram(
        layer.inputs,
        targets,
        nonzeros=kept,
        activation=None,
        l1_weights=weights,
        pattern=pattern.text,
        metric=None if metric is None else metric.to(layer.inputs),
        support=None if support is None else support.to(layer.inputs.device),
    )
    return Budget(program, None, None)


def misfit(layer: Layer, W: Tensor) -> float:
    """``F(W)`` on the layer's own targets, in float64: the squared promise of weights (M, N)."""
    program = LayerProgram(layer.inputs, layer.targets, epsilon=1.0, activation=layer.activation)
    return program.misfit(W)


def _pre_activations(layer: Layer) -> Tensor:
    """``V = Â Wᵀ``, (P, M), rounded up: the dense weights must stay feasible in exact arithmetic, and are all there is where Ω is empty."""
    V = torch.empty_like(layer.targets)
    for part, A in zip(V.split(4096), layer.inputs.split(4096), strict=True):
        exact = A.double() @ layer.dense.double().T
        nearest = exact.to(V.dtype)
        part.copy_(torch.where(nearest < exact, torch.nextafter(nearest, torch.full_like(nearest, math.inf)), nearest))
    return V


def _dense_misfit(layer: Layer) -> tuple[float, float]:
    """``Σ_Ω (v − y)²`` and ``Σ_{Ωᶜ} max(v, 0)²`` of the dense weights, in float64."""
    on = off = 0.0
    for A, Y in zip(layer.inputs.split(4096), layer.targets.split(4096), strict=True):
        Y = Y.double()
        squares = residual(A.double() @ layer.dense.double().T, Y, relu=layer.activation == "relu").square()
        inside = float(squares[Y > 0].sum()) if layer.activation == "relu" else float(squares.sum())
        on, off = on + inside, off + float(squares.sum()) - inside
    return on, max(off, 0.0)
