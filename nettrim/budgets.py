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

from nettrim.errors import ArgumentError
from nettrim.layers.convolution import Convolutional
from nettrim.observing import HELD_ELEMENTS, Layer
from nettrim.operators import Convolution, of_matrix
from nettrim.patterns import NEURON, UNSTRUCTURED, Pattern
from nettrim.programs import LayerProgram
from nettrim.residual import residual
from nettrim.rows import Checked, Stream
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
    """

    programs: tuple[LayerProgram, ...]
    promise: float | None
    inflation: float | None

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
    omega = _omega(layer, 0.0 if penalty == "l0" else bias_weight)
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
        inside = _rows_of(layer, group)
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


def make_selection(
    layer: Layer, *, sparsity: float, pattern: Pattern, repair: float, support: Tensor | None, metric: Tensor | None
) -> Budget:
    """The programs of one layer that is to have a share ``sparsity`` of zeros in a pattern.

    Before a ReLU too it is the program without one, for the pre-activations: their discrepancy is no smaller than that of the outputs, and the
    program sees ``G`` and ``C`` alone. The bias does not count and is fitted.

    What the layer's output is added to, ``B`` (P, M), may be off too: the targets ``A Wᵀ + B − B̂`` make the dense network's sum.
    Below a ``repair`` of 1 they lean towards what the dense weights make of the disturbed inputs, ``repair · (A Wᵀ + B − B̂) + (1 − repair) · Â Wᵀ``.
    With ``support``, (M, N) bool, only those weights may stay; in the pattern of neurons it says which do. ``metric``, (M, M) or (M,), is the
    program's.
    The groups of a grouped layer share its number of weights by ``‖a_j‖² w²``, what each weight puts out.
    """
    M, N = layer.matrix.shape
    omega = _omega(layer, 0.0)
    lean = repair if repair < 1 and (layer.disturbed or layer.observation.summed) else None
    if pattern is NEURON:
        assert support is not None
        kept = [int(support[_rows_of(layer, group), :N].sum()) for group in range(layer.groups)]
        pattern = UNSTRUCTURED
    else:
        kept = _shared(layer, pattern, sparsity, support)
    known = layer.aims
    programs = []
    for group, (inputs, targets) in enumerate(_selection_rows(layer, lean)):
        inside = _rows_of(layer, group)
        programs.append(
            LayerProgram(
                inputs,
                targets,
                nonzeros=kept[group],
                activation=None,
                l1_weights=omega,
                pattern=pattern.text,
                metric=None if metric is None else (metric[inside] if metric.ndim == 1 else metric[inside, inside]).to(layer.dense),
                support=None if support is None else support[inside].to(layer.dense.device),
                moments=known if known is None or lean is None else known.leaning(lean, layer.dense),
            )
        )
    return Budget(tuple(programs), None, None)


def misfit(layer: Layer, W: Tensor) -> float:
    """What folded weights (M, N) may cost on all rows, in float64: ``F(W)``, or ``L²`` times it, which is no less than the squared discrepancy."""
    if layer.moments is not None and layer.drawn is None and not layer.relu:
        left = layer.moments.left(W)
        if left is not None:
            return layer.lipschitz**2 * float(left.sum())
    total = 0.0
    for A, U in layer.observation.chunks():
        total += float(_residual(layer, W, A, U).square().sum())
    return layer.lipschitz**2 * total


def _residual(layer: Layer, W: Tensor, A: Tensor, U: Tensor) -> Tensor:
    return _distance(layer, layer.apply(W.double(), A.double()), layer.targets(U).double())


def _distance(layer: Layer, Z: Tensor, targets: Tensor) -> Tensor:
    """``D`` of float64 pre-activations (p, M)."""
    floor, ceiling = (None if end is None else end.double() for end in (layer.floor, layer.ceiling))
    return residual(Z, targets, relu=layer.relu, floor=floor, ceiling=ceiling)


def _omega(layer: Layer, bias_weight: float) -> Tensor:
    """``ω`` of a group's columns, (N,)."""
    N = layer.matrix.shape[1]
    weights = torch.ones(N + layer.matrix.has_bias, dtype=layer.dense.dtype, device=layer.dense.device)
    weights[N:] = bias_weight
    return weights


def _rows_of(layer: Layer, group: int) -> slice:
    return layer.observation.columns(group)[1]


def _sizes(layer: Layer, chunks: Iterator[tuple[Tensor, Tensor]], *, misfits: bool) -> _Sizes:
    """One pass over the rows."""
    output, zero, on, off = (torch.zeros(layer.groups, dtype=torch.float64, device=layer.dense.device) for _ in range(4))
    for A, U in chunks:
        targets = layer.targets(U).double()
        if layer.groups > 1:
            zero += _distance(layer, torch.zeros_like(targets), targets).square().sum(0).view(layer.groups, -1).sum(1)
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
        yield _stream(layer, group, lambda A, U: A), _targets(layer, group, aim)


def _selection_rows(layer: Layer, repair: float | None) -> Iterator[tuple[Tensor | Stream, Tensor | Stream]]:
    """The same of each group's program with a number of weights, whose targets may lean.

    Where sums over the rows are known, which is all that such a program asks for first, targets are made only when they are read.
    """
    seen = layer.observation
    for group in range(layer.groups):
        columns, outputs = seen.columns(group)

        def aim(A: Tensor, T: Tensor, outputs: slice = outputs) -> Tensor:
            return T if repair is None else torch.lerp(A @ layer.dense[outputs].T, T, repair)

        if layer.aims is not None and not seen.leaves:
            width, count = layer.dense.shape[1], layer.rows if layer.drawn is None else len(layer.drawn.A)
            like = layer.dense
            inputs = Checked(_made(layer, lambda A, T: A), count, width, like.dtype, like.device)
            yield inputs, Checked(_made(layer, aim), count, len(like), like.dtype, like.device)
        elif layer.drawn is not None:
            A = layer.drawn.A[:, columns]
            yield A, aim(A, layer.drawn.aims[:, outputs])
        elif seen.rows is not None:
            A = seen.rows[0][:, columns]
            yield A, torch.cat([aim(A, T) for A, T in seen.aims(group)])
        else:
            yield _stream(layer, group, lambda A, U: A), _targets(layer, group, aim, summed=True)


def _stream(layer: Layer, group: int, made: Callable[[Tensor, Tensor], Tensor], *, summed: bool = False) -> Stream:
    chunks = layer.observation.aims if summed else layer.observation.chunks
    return lambda: (made(A, U) for A, U in chunks(group))


def _made(layer: Layer, made: Callable[[Tensor, Tensor], Tensor]) -> Stream:
    """Of the rows that a program is solved on."""
    return lambda: (made(A, T) for A, T in layer.solved_on(summed=True))


def _targets(layer: Layer, group: int, aim: Callable[[Tensor, Tensor], Tensor], *, summed: bool = False) -> Tensor | Stream:
    """Held where they fit: two streams side by side cost two runs of the network."""
    stream = _stream(layer, group, aim, summed=summed)
    if layer.rows * (layer.matrix.shape[0] // layer.groups) > HELD_ELEMENTS:
        return stream
    return torch.cat(list(stream()))


def _shared(layer: Layer, pattern: Pattern, sparsity: float, support: Tensor | None) -> list[int]:
    """How many weights each group keeps."""
    M, N = layer.matrix.shape
    each = (M // layer.groups, N)
    if layer.groups == 1:
        return [pattern.kept(each, sparsity)]
    if pattern is not UNSTRUCTURED:
        return [pattern.kept(each, sparsity)] * layer.groups
    squares = sum(A.double().square().sum(0) for A, _ in layer.solved_on())
    assert isinstance(squares, Tensor)
    of_columns = squares.view(layer.groups, 1, -1)[..., :N].expand(layer.groups, each[0], N).reshape(M, N)
    scores = of_columns * layer.dense[:, :N].double().square()
    if support is not None:
        scores = torch.where(support[:, :N].to(scores.device), scores, -1.0)
    mask = pattern.mask(scores, pattern.kept((M, N), sparsity))
    return [int(count) for count in mask.view(layer.groups, -1).sum(1)]


def _upper(layer: Layer, group: int, inputs: Tensor | Stream) -> Tensor:
    """``V = Â Wᵀ`` of a group, rounded up: the dense weights must stay feasible in exact arithmetic, and are all there is where Ω is empty."""
    dense = layer.dense[_rows_of(layer, group)].double()
    if isinstance(inputs, Convolution):
        return _rounded_up(inputs.product(dense), layer.dense.dtype)
    assert isinstance(inputs, Tensor)
    return torch.cat([_rounded_up(A.double() @ dense.T, layer.dense.dtype) for A in inputs.split(4096)])


def _rounded_up(exact: Tensor, dtype: torch.dtype) -> Tensor:
    nearest = exact.to(dtype)
    return torch.where(nearest < exact, torch.nextafter(nearest, torch.full_like(nearest, math.inf)), nearest)
