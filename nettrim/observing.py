"""What is seen of one layer: its rows, its dense weights as its program needs them, and what becomes of its outputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import capture, observation
from nettrim.activations import Activation, Norm
from nettrim.calibration import Run
from nettrim.capture import Seen
from nettrim.errors import RouteError
from nettrim.grams import CACHED_ROWS, Gram, Moments, moments, square_sum
from nettrim.layers import Matrix
from nettrim.layers.convolution import Convolutional
from nettrim.layers.linear import is_linear
from nettrim.observation import Drawn, Observation, Source
from nettrim.tracing import TracedLayer

_DIRECTIONS = 8
_COMPARED = 32  # rows of a batch, of the first so many
_LOOKED_AT = 4096
_OUTPUTS = 64  # of a layer
_ROUNDING = 100.0  # in units of the last place: below it a layer's inputs are those of the dense network


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer as its program needs it, BatchNorm folded in: weights ``W`` are those of ``u = s z``, the layer's output is ``act(u + t)``.

    Attributes
    ----------
    name : str
    matrix : Matrix
        The dense network's.
    dense : Tensor, (M, N)
        The dense weights, folded.
    norm : Norm or None
        ``s`` and ``t``; 1 and 0 without one.
    function : Activation or None
    disturbed : bool
        Whether the inputs differ from the dense network's.
    observation : Observation
        All rows: what promises are about.
    drawn : Drawn or None
        The rows that the program is solved on, where they are not all.
    gram : Gram or None
        Of those rows, perhaps shared with the layers that are given the same ones.
    made : bool
        Whether the targets' sums follow from what the dense weights make of known inputs: the Gram matrix's ``cross``, or, where nothing is
        disturbed, the Gram matrix itself.
    outputs : callable(stored matrix) or None
        Its outputs on all rows, (P, M), as the network computes them; None where they are not known.
    """

    name: str
    matrix: Matrix
    dense: Tensor
    norm: Norm | None
    function: Activation | None
    disturbed: bool
    observation: Observation
    drawn: Drawn | None = None
    gram: Gram | None = None
    made: bool = False
    outputs: Callable[[Matrix], Tensor | None] | None = None

    @property
    def groups(self) -> int:
        return self.matrix.groups

    @property
    def rows(self) -> int:
        """P, all of them."""
        return self.observation.count

    @property
    def activation(self) -> str | None:
        """The function's name."""
        return None if self.function is None else self.function.name

    @property
    def relu(self) -> bool:
        """Whether the program is one with a ReLU, perhaps between other ends."""
        return self.function is not None and self.function.interval is not None

    @property
    def lipschitz(self) -> float:
        """Of what follows, the BatchNorm folded."""
        return 1.0 if self.function is None else self.function.lipschitz

    @property
    def floor(self) -> Tensor | None:
        """Of the program with a ReLU: its lower end less ``t``, (M,); None for 0."""
        return self._end(0)

    @property
    def ceiling(self) -> Tensor | None:
        """Of a ReLU6: its upper end less ``t``, (M,)."""
        return self._end(1)

    def _end(self, which: int) -> Tensor | None:
        ends = None if self.function is None else self.function.interval
        end = None if ends is None else ends[which]
        if end is None or (end == 0 and self.norm is None):
            return None
        ends_of_all = torch.full((len(self.dense),), end, dtype=torch.float64, device=self.dense.device)
        return (ends_of_all if self.norm is None else ends_of_all - self.norm.shift).to(self.dense.dtype)

    def targets(self, U: Tensor, outputs: slice = slice(None)) -> Tensor:
        """What the program of (some of) the neurons aims at, from ``U``."""
        if not self.relu:
            return U
        U = U.clamp(min=0) if self.floor is None else torch.maximum(U, self.floor[outputs])
        return U if self.ceiling is None else torch.minimum(U, self.ceiling[outputs])

    def output(self, U: Tensor) -> Tensor:
        """``act(u + t)`` of all neurons, (p, M), in the dtype of ``U``."""
        if self.norm is not None:
            U = U + self.norm.shift.to(U)
        return U if self.function is None else self.function(U)

    def read(self, matrix: Matrix) -> Tensor:
        """The stored weights, folded, (M, N) in the compute dtype."""
        found = matrix.as_matrix().to(self.dense.device)
        return found.to(self.dense.dtype) if self.norm is None else (found.double() * self._scale()[:, None]).to(self.dense.dtype)

    def write(self, matrix: Matrix, W: Tensor) -> None:
        """Store folded weights; those of an output that the BatchNorm multiplies by 0 are of no use, and are 0."""
        if self.norm is not None:
            scale = self._scale()[:, None]
            W = torch.where(scale != 0, W.double() / torch.where(scale != 0, scale, 1.0), 0.0)
        matrix.write_back(W)

    def stored(self, matrix: Matrix) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
        """All rows, chunk by chunk: those of `Observation.parts`, and what the stored weights make of ``A``, (p, M)."""
        known, start = None if self.outputs is None else self.outputs(matrix), 0
        for A, U, more in self.observation.parts():
            yield A, U, more, matrix.forward_rows(A) if known is None else known[start : start + len(A)]
            start += len(A)

    def wide(self, stored: Tensor) -> Tensor:
        """What stored weights make, (p, M), in float64 and in the scale of ``U``."""
        return stored.double() if self.norm is None else stored.double() * self._scale()

    def apply(self, W: Tensor, A: Tensor) -> Tensor:
        """``A Wᵀ``, group by group, of folded weights (M, N), in the dtype of both."""
        if self.groups == 1:
            return A @ W.T
        stacked = torch.bmm(A.unflatten(1, (self.groups, -1)).transpose(0, 1), W.unflatten(0, (self.groups, -1)).transpose(1, 2))
        return stacked.transpose(0, 1).flatten(1)

    @functools.cached_property
    def aims(self) -> Moments | None:
        """Sums over the rows that the program is solved on and `Observation.aims` of them, where there is one Gram matrix of them."""
        if self.gram is None or self.groups > 1:
            return None
        return moments(self.gram, self.solved_on(summed=True), self.dense if self.made else None)

    def solved_on(self, *, summed: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """``(A, U)`` of the rows that the program is solved on, chunk by chunk; `Observation.aims` of them, if ``summed``."""
        if self.drawn is None:
            return self.observation.aims() if summed else self.observation.chunks()
        step = max(1, observation.UNFOLDED_ELEMENTS // (self.drawn.A.shape[1] + self.drawn.U.shape[1]))
        return zip(self.drawn.A.split(step), (self.drawn.aims if summed else self.drawn.U).split(step), strict=True)

    def _scale(self) -> Tensor:
        assert self.norm is not None
        return self.norm.scale.to(self.dense.device)


def observe(
    layer: TracedLayer,
    model: nn.Module,
    pruned: nn.Module | None,
    batches: list[Any],
    run: Run,
    *,
    device: torch.device | str | None,
    max_rows: int | None = None,
    seed: int = 0,
    hold: bool = False,
    unfold: bool = True,
    pruned_batches: list[Any] | None = None,
    summed: bool = False,
    crosses: bool = False,
    sums: bool = False,
) -> Layer:
    """What is seen of a layer: inputs from ``pruned``, the network pruned so far, where there is one, targets from the dense one.

    With ``hold`` all rows are held: for programs that are solved elsewhere, where the network cannot be run again. Without ``unfold`` a
    convolution's inputs are held in their place. ``pruned_batches`` is what the pruned one is given, where it is not the same. ``summed`` says that
    it is wanted, of both networks, what the layer's outputs are added to, ``crosses`` that the sums for its program are to be made of its inputs in
    both (`is_wide`), and ``sums`` that they may be made of its inputs alone where those are not disturbed.

    Raises
    ------
    RouteError
        The two networks give the layer inputs of different shapes.
    """

    def dense() -> Iterator[Seen]:
        return capture.kept(model, batches, run, layer.matrix, device=device, summed=summed)

    def disturbed() -> Iterator[Seen]:
        assert pruned is not None
        inputs = batches if pruned_batches is None else pruned_batches
        return capture.kept(pruned, inputs, run, layer.of(pruned), device=device, summed=summed, given=True)

    return observed(
        layer, dense, None if pruned is None else disturbed, device=device, max_rows=max_rows, seed=seed, hold=hold, unfold=unfold, gram=Gram(),
        crosses=crosses, sums=sums,
    )  # fmt: skip


def directions(matrix: Matrix, device: torch.device | str | None) -> Tensor | None:
    """Directions ``R`` (N, 8) along which the inputs of a linear layer are compared; None for fewer than 32 inputs, which are held themselves.

    Their entries are independent and normal, always the same: ``‖(A − Â) R‖²`` is expected to be ``8 ‖A − Â‖²``, and is 0 where nothing differs.
    """
    N = matrix.shape[1]
    if not is_linear(matrix.kind) or N < 4 * _DIRECTIONS:
        return None
    where = device if device is not None else matrix.weight.device
    return torch.randn(N, _DIRECTIONS, dtype=matrix.compute_dtype, generator=torch.Generator().manual_seed(N)).to(where)


def observed(
    layer: TracedLayer,
    dense: Source,
    disturbed: Source | None,
    *,
    device: torch.device | str | None,
    max_rows: int | None = None,
    seed: int = 0,
    hold: bool = False,
    unfold: bool = True,
    gram: Gram | None = None,
    along: Tensor | None = None,
    crosses: bool = False,
    sums: bool = False,
    outputs: Callable[[Matrix], Tensor | None] | None = None,
) -> Layer:
    """As `observe`, of what was seen in the dense network and in the pruned one, whose ``Z`` does not count.

    Where ``along`` is given, what ``dense`` yields as kept may be products of the inputs with it (`directions`). ``outputs`` is the field of `Layer`.
    """
    matrix, apart, size = layer.matrix, 0.0, 0.0
    cross: Tensor | None = None
    made = None if sums or crosses else False  # whether outputs are what the weights make of inputs, by the first batch
    first = gram is not None and gram.cross is None  # the sums are made in the first pass over the rows

    def source() -> Iterator[Seen]:
        nonlocal apart, size, crosses, cross, made
        if disturbed is None:
            for seen in dense():
                made = _made_of(matrix, seen) if made is None else made
                yield seen._replace(beside=None)
            return
        for given, seen in zip(dense(), disturbed(), strict=True):
            wide = matrix.compute_dtype
            ours, theirs = seen.kept, given.kept
            whole = along is None or ours.shape == theirs.shape
            if along is not None:
                ours, theirs = ours.to(along) @ along, theirs.to(along) @ along if whole else theirs
            ours, theirs, crosses = ours.to(wide), theirs.to(wide), crosses and whole
            if ours.shape != theirs.shape:
                there = given.kept.shape if along is None else (*given.kept.shape[:-1], len(along))
                raise RouteError(
                    f"layer {layer.name!r} is given {tuple(seen.kept.shape)} in the pruned network and {tuple(there)} in the dense one; "
                    "its shape depends on values, which a cascade cannot follow: use mode='parallel'"
                )
            made = _made_of(matrix, given if whole else seen._replace(Z=given.Z)) if made is None else made
            crosses = crosses and made
            apart += square_sum(ours - theirs)
            size += square_sum(theirs)
            if first and crosses:
                cross = _add_cross(cross, matrix, given.kept, seen.kept)
            more = None if given.beside is None or seen.beside is None else torch.sub(given.beside, seen.beside, out=seen.beside)
            yield Seen(seen.kept, given.Z, more)

    where = torch.device(device) if device is not None else matrix.weight.device
    norm = None if layer.norm is None else Norm(layer.norm.scale.to(where), layer.norm.shift.to(where))
    most = math.inf
    if isinstance(matrix.kind, Convolutional):  # whose inputs take a fraction of the rows' memory
        most = 0 if not unfold else most if max_rows is None else max_rows
    seen = Observation(matrix, None if norm is None else norm.scale, source, hold=hold, most=most)
    weights = matrix.as_matrix().to(where)
    weights = weights.to(matrix.compute_dtype) if norm is None else (weights.double() * norm.scale[:, None]).to(matrix.compute_dtype)
    # what rounding alone makes is no disturbance: a multiple of it is a budget that nothing can be pruned within
    changed = math.sqrt(apart) > _ROUNDING * torch.finfo(matrix.compute_dtype).eps * math.sqrt(size)
    drawn = seen.drawn(max_rows, seed) if max_rows is not None and max_rows < seen.count else None
    if first and gram is not None:
        gram.cross, first = cross, False
    made = bool(made) and not seen.summed if not changed else crosses and gram is not None and gram.cross is not None
    return Layer(layer.name, matrix, weights, norm, layer.function, changed, seen, drawn, gram, made, outputs)


def _made_of(matrix: Matrix, seen: Seen) -> bool:
    """Whether a linear layer's outputs are what its weights make of its inputs, to rounding, by a few of both: not so under autocast."""
    if not is_linear(matrix.kind):
        return False
    told = seen.kept[:_LOOKED_AT].any(1).nonzero().flatten()[:_COMPARED]
    A, W = seen.kept[told].double(), matrix.as_matrix().to(seen.kept.device)
    few = torch.arange(0, len(W), max(1, len(W) // _OUTPUTS), device=W.device)
    Z = seen.Z[told][:, few].double()
    weights, bias = W[few].double().tensor_split([matrix.shape[1]], dim=1)  # which has no column where there is none
    expected, sizes = A @ weights.T + bias.sum(1), A.abs() @ weights.abs().T + bias.abs().sum(1)
    stored, computed = (torch.finfo(dtype).eps for dtype in (matrix.weight.dtype, matrix.compute_dtype))
    return len(told) > 0 and bool(((Z - expected).abs() <= stored * expected.abs() + _ROUNDING * computed * sizes).all())


def _add_cross(cross: Tensor | None, matrix: Matrix, dense: Tensor, disturbed: Tensor) -> Tensor:
    """``AᵀÂ`` and what it was before, float64, chunk by chunk."""
    for ours, theirs in zip(dense.split(CACHED_ROWS), disturbed.split(CACHED_ROWS), strict=True):
        A, disturbed_rows = matrix.with_ones(ours.double()), matrix.with_ones(theirs.double())
        cross = A.T @ disturbed_rows if cross is None else cross.addmm_(A.T, disturbed_rows)
    assert cross is not None
    return cross


def is_wide(layer: TracedLayer) -> bool:
    """Whether the layer has more outputs than inputs: products with inputs are less work then, and layers with one input share them."""
    M, N = layer.matrix.shape
    return M > N and is_linear(layer.matrix.kind)
