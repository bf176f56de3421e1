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
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.aims import Aim
from nettrim.errors import ArgumentError
from nettrim.layers.convolution import Convolutional
from nettrim.observation import HELD_ELEMENTS
from nettrim.observing import Layer
from nettrim.operators import Convolution, of_matrix
from nettrim.programs import LayerProgram
from nettrim.residual import residual
from nettrim.rows import Stream
from nettrim.solvers import cg_admm


@dataclass(frozen=True)
class Budget:
    """A layer's programs, the promise on its whole output, and how the promise follows from the input's disturbance.

    Attributes
    ----------
    programs : tuple of LayerProgram
        One for each group of the layer; one, where it is not grouped.
    promise : float or None
        Frobenius norm, absolute: what the stored layer's output may differ from the dense network's, on all rows. None where a number of weights
        was asked for: then it is what the solution leaves.
    inflation : float or None
        The factor ``γ`` (``κγ`` for the last layer) by which a cascade layer's squared promise exceeds at most what the dense weights leave;
        None for a budget of its own.
    aim : Aim or None
        What a program with a number of weights is about, where that is known from sums over the rows.
    """

    programs: tuple[LayerProgram, ...]
    promise: float | None
    inflation: float | None
    aim: Aim | None = None

    @property
    def epsilon(self) -> float:
        """Of all programs together."""
        return math.hypot(*(program.epsilon or 0.0 for program in self.programs))


@dataclass(frozen=True)
class _Sizes:
    """Squared sizes of a layer's groups on some rows, (G,) float64 each: of its output, of the misfit of weights that are 0 (where there are several
    groups), and of that of the dense weights, on Ω and off it.
    """

    output: Tensor
    zero: Tensor
    on: Tensor
    off: Tensor

    def shares(self) -> Tensor:
        """Of a budget that the groups share: what is lost with all of a group's weights, over what is lost with all."""
        total = float(self.zero.sum())
        return self.zero / total if total > 0 else torch.full_like(self.zero, 1 / len(self.zero))


def make_budget(
    layer: Layer,
    *,
    relative: float,
    own: bool,
    inflation: float,
    consistency: str,
    penalty: str,
    bias_weight: float,
    solver: str = "auto",
) -> Budget:
    """The programs of one layer; those of a convolution are about itself where that is what the ``solver`` takes, or all that takes the paper's set.

    ``relative`` is its share of ``‖Y‖_F``; ``own`` says that it was asked for this layer; ``inflation`` is ``γ`` (times ``κ``) and counts where the
    layer's inputs are disturbed and the budget is not its own. ``bias_weight`` is ``ω`` of the bias column; the ``"l0"`` penalty does not count it.

    Raises
    ------
    ArgumentError
        The paper's set, of a layer whose rows are not held and that is no convolution.
    """
    if layer.ceiling is not None:
        consistency = "relaxed"  # the papers' set is the ReLU's
    unheld = layer.drawn is None and layer.observation.rows is None
    bounded = consistency == "paper" and layer.relu
    itself = unheld and isinstance(layer.matrix.kind, Convolutional) and (solver == cg_admm.NAME or (solver == "auto" and bounded))
    inputs_held = layer.observation.inputs if itself else None
    if solver == cg_admm.NAME and itself and inputs_held is None:
        raise ArgumentError(
            f"solver='cg_admm' needs the inputs and outputs of layer {layer.name!r} in memory, and they are more than {HELD_ELEMENTS} numbers; give "
            "fewer samples, or another solver with max_rows"
        )
    if bounded and unheld and inputs_held is None:
        raise ArgumentError(
            f"consistency='paper' bounds every output of layer {layer.name!r} on its own, whose {layer.rows} rows are not held; give max_rows, or "
            "consistency='relaxed'" + (", or solver='auto'" if isinstance(layer.matrix.kind, Convolutional) and not itself else "")
        )
    omega = l1_weights(layer, 0.0 if penalty == "l0" else bias_weight)
    one_sided = layer.disturbed and consistency == "paper" and layer.relu
    inflated = layer.disturbed and not own
    whole = _sizes(layer, layer.observation.chunks(), misfits=inflated or one_sided)
    there = whole if layer.drawn is None else _sizes(layer, layer.solved_on(), misfits=inflated or one_sided)

    def squared(sizes: _Sizes) -> Tensor:
        """Budgets of the groups: what dense weights need and, by what there is to lose in each, their share of the rest."""
        if not inflated:
            return relative**2 * float(sizes.output.sum()) / layer.lipschitz**2 * sizes.shares()
        needed = sizes.on if one_sided else sizes.on + sizes.off
        return needed + (inflation - 1) * (float(needed.sum()) * sizes.shares() if inflation > 1 else needed)

    programs = []
    for group, (inputs, targets) in enumerate(_program_rows(layer)):
        inside = rows_of(layer, group)
        inputs = inputs if inputs_held is None else of_matrix(layer.matrix, group, inputs_held)
        programs.append(
            LayerProgram(
                inputs,
                targets,
                epsilon=math.sqrt(float(squared(there)[group])),
                penalty=penalty,
                activation="relu" if layer.relu else None,
                consistency=consistency,
                upper=_upper(layer, group, inputs) if one_sided else None,
                floor=None if layer.floor is None else layer.floor[inside],
                ceiling=None if layer.ceiling is None else layer.ceiling[inside],
                l1_weights=omega,
            )
        )
    factor = None
    if inflated:
        factor = max(inflation, 1.0) if one_sided else inflation  # κ tightens the part on Ω alone
    beside = float(whole.off.sum()) if one_sided else 0.0
    promise = layer.lipschitz * math.sqrt(float(squared(whole).sum()) + beside)
    return Budget(tuple(programs), promise, factor)


def _residual(layer: Layer, W: Tensor, A: Tensor, U: Tensor) -> Tensor:
    return distance(layer, layer.apply(W.double(), A.double()), U)


def distance(layer: Layer, Z: Tensor, U: Tensor) -> Tensor:
    """``D`` of pre-activations (p, M), in their dtype."""
    floor, ceiling = (None if end is None else end.to(Z) for end in (layer.floor, layer.ceiling))
    return residual(Z, layer.targets(U).to(Z), relu=layer.relu, floor=floor, ceiling=ceiling)


def l1_weights(layer: Layer, bias_weight: float) -> Tensor:
    """``ω`` of a group's columns, (N,)."""
    N = layer.matrix.shape[1]
    weights = torch.ones(N + layer.matrix.has_bias, dtype=layer.dense.dtype, device=layer.dense.device)
    weights[N:] = bias_weight
    return weights


def rows_of(layer: Layer, group: int) -> slice:
    """Which rows of the weights are a group's."""
    return layer.observation.columns(group)[1]


def _sizes(layer: Layer, chunks: Iterator[tuple[Tensor, Tensor]], *, misfits: bool) -> _Sizes:
    """One pass over the rows."""
    output, zero, on, off = (torch.zeros(layer.groups, dtype=torch.float64, device=layer.dense.device) for _ in range(4))
    for A, U in chunks:
        targets = layer.targets(U).double()
        if layer.groups > 1:
            zero += distance(layer, torch.zeros_like(targets), U).square().sum(0).view(layer.groups, -1).sum(1)
        output += layer.output(U).double().square().sum(0).view(layer.groups, -1).sum(1)
        if misfits:
            squares = _residual(layer, layer.dense, A, U).square()
            inside = targets > (0.0 if layer.floor is None else layer.floor) if layer.relu else torch.ones_like(U, dtype=torch.bool)
            on += torch.where(inside, squares, 0.0).sum(0).view(layer.groups, -1).sum(1)
            off += torch.where(inside, 0.0, squares).sum(0).view(layer.groups, -1).sum(1)
    return _Sizes(output, zero, on, off)


def _program_rows(layer: Layer) -> Iterator[tuple[Tensor | Stream, Tensor | Stream]]:
    """Inputs and targets of each group's program with a budget: tensors where they are held, else streams."""
    held = layer.drawn or layer.observation.rows
    for group in range(layer.groups):
        columns, outputs = layer.observation.columns(group)

        def aim(A: Tensor, U: Tensor, outputs: slice = outputs) -> Tensor:
            return layer.targets(U, outputs)

        if held is not None:
            yield held[0][:, columns], aim(held[0], held[1][:, outputs])
            continue
        yield _stream(layer, group, lambda A, U: A), held_targets(layer, _stream(layer, group, aim))


def _stream(layer: Layer, group: int, made: Callable[[Tensor, Tensor], Tensor]) -> Stream:
    return lambda: (made(A, U) for A, U in layer.observation.chunks(group))


def held_targets(layer: Layer, stream: Stream) -> Tensor | Stream:
    """The targets of one group, held where they fit: two streams side by side cost two runs of the network."""
    if layer.rows * (layer.matrix.shape[0] // layer.groups) > HELD_ELEMENTS:
        return stream
    return torch.cat(list(stream()))


def _upper(layer: Layer, group: int, inputs: Tensor | Stream) -> Tensor:
    """``V = Â Wᵀ`` of a group, rounded up: the dense weights must stay feasible in exact arithmetic, and are all there is where Ω is empty."""
    dense = layer.dense[rows_of(layer, group)].double()
    if isinstance(inputs, Convolution):
        return _rounded_up(inputs.product(dense), layer.dense.dtype)
    assert isinstance(inputs, Tensor)
    return torch.cat([_rounded_up(A.double() @ dense.T, layer.dense.dtype) for A in inputs.split(4096)])


def _rounded_up(exact: Tensor, dtype: torch.dtype) -> Tensor:
    nearest = exact.to(dtype)
    return torch.where(nearest < exact, torch.nextafter(nearest, torch.full_like(nearest, math.inf)), nearest)
