"""What is seen of one layer: its rows, held or made anew from pass to pass, and what becomes of its outputs.

A convolution's rows are its inputs many times over, so they are unfolded chunk by chunk, from the inputs where those can be held, and else from
another run of the network, batch by batch. What is held at a time is bounded by a chunk, one sample's rows, and one batch's activations of one layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nettrim import capture
from nettrim.activations import Activation, Norm
from nettrim.calibration import Run
from nettrim.capture import Seen
from nettrim.errors import RouteError
from nettrim.grams import Gram, Moments, moments, square_sum
from nettrim.layers import Kind, Matrix
from nettrim.layers.convolution import Convolutional
from nettrim.tracing import TracedLayer

HELD_ELEMENTS = 2**28  # of a layer's rows, or else of its inputs and outputs, in memory
UNFOLDED_ELEMENTS = 2**22  # of the rows made at a time
_ROUNDING = 100.0  # in units of the last place: below it a layer's inputs are those of the dense network

Source = Callable[[], Iterator[Seen]]


class Observation:
    """The rows ``A`` (P, G·N) of one matrix and ``U`` (P, M), the dense network's outputs, in the scale of what follows.

    Attributes
    ----------
    count : int
        P, over all batches.
    summed : bool
        Whether it is known what the outputs are added to, and by how much that is off in the pruned network.
    leaves : bool
        Whether the rows leave the process.
    """

    def __init__(self, matrix: Matrix, scale: Tensor | None, source: Source, *, hold: bool = False, most: float = math.inf) -> None:
        """``source`` yields, batch by batch, what was kept of the input, ``Z``, and what the dense network adds more than the pruned one to it, if
        that is known; it is run through once here. ``hold`` all rows, however many; of more than ``most`` what they are made of.
        """
        self._matrix, self._scale, self._source = matrix, scale, source
        self._held: list[Seen] | None = []
        self._rows: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.count, self.summed, self.leaves = 0, False, hold
        elements, limit = 0, math.inf if hold else HELD_ELEMENTS
        for seen in source():
            self.count += len(seen.Z)
            self.summed = seen.beside is not None
            elements += seen.kept.numel() + seen.Z.numel() * (1 + self.summed)
            if elements > limit and not matrix.kind.feeds_itself:
                self._held = None
            if self._held is not None:
                self._held.append(seen)
        M, N = matrix.shape
        width = matrix.groups * (N + matrix.has_bias) + M * (1 + self.summed)
        self._fits = self.count <= most and self.count * width <= limit
        if type(matrix.kind).unfold is not Kind.unfold:
            self._join()  # what costs something to make is made once

    def _join(self) -> None:
        if self._rows is None and self._fits and self._held is not None:
            self._rows = self._whole()
            self._held = None

    def _whole(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """All rows, written where they stay: beside them there is but what they are made of."""
        whole: list[Tensor] = []
        start = 0
        for parts in self._unfolded():
            given = [part for part in parts if part is not None]
            whole = whole or [part.new_empty(self.count, part.shape[1]) for part in given]
            for to, part in zip(whole, given, strict=True):
                to[start : start + len(part)] = part
            start += len(given[0])
        return whole[0], whole[1], whole[2] if self.summed else None

    @property
    def rows(self) -> tuple[Tensor, Tensor] | None:
        """All rows ``A`` and ``U``, where they can be held."""
        self._join()
        return None if self._rows is None else self._rows[:2]

    def chunks(self, group: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """``(A, U)`` chunk by chunk; of one group of a grouped layer, ``A`` is (p, N) and ``U`` (p, M/G)."""
        return ((A, U) for A, U, _ in self._parts(group))

    def aims(self, group: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """As `chunks`, with the outputs that would make the dense network's sum: ``U`` and what the dense network adds more to it."""
        return ((A, U if more is None else U + more) for A, U, more in self._parts(group))

    def _parts(self, group: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        if self._rows is None:
            yield from self._unfolded(group)
            return
        A, U, more = self._rows
        inside, of_group = self.columns(group)
        step = max(1, UNFOLDED_ELEMENTS // max(1, A.shape[1] + U.shape[1]))
        for start in range(0, self.count, step):
            here = slice(start, start + step)
            yield A[here, inside], U[here, of_group], None if more is None else more[here, of_group]

    @property
    def inputs(self) -> list[Tensor] | None:
        """What was kept of the input, batch by batch, of a layer whose rows are not held; None where that is too large too."""
        return None if self._held is None else [seen.kept for seen in self._held]

    def columns(self, group: int | None) -> tuple[slice, slice]:
        """Which columns of all rows' ``A`` and ``U`` are a group's."""
        if group is None or self._matrix.groups == 1:
            return slice(None), slice(None)
        M, N = self._matrix.shape
        width, height = N + self._matrix.has_bias, M // self._matrix.groups
        return slice(group * width, (group + 1) * width), slice(group * height, (group + 1) * height)

    def drawn(self, count: int, seed: int) -> Drawn:
        """``count`` of the rows, uniformly, in order; the same ones for the same seed and number of rows."""
        index = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(self.count, count, replace=False)))
        found: list[list[Tensor]] = []
        start = 0
        for A, U, more in self._parts(None):
            taken = (index[(index >= start) & (index < start + len(A))] - start).to(A.device)
            found.append([A[taken], U[taken], *([] if more is None else [U[taken] + more[taken]])])
            start += len(A)
        A, U, *aims = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Drawn(A, U, aims[0] if aims else U)

    def _unfolded(self, group: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        matrix = self._matrix
        M, N = matrix.shape
        part, count = matrix.part, matrix.groups if group is None else 1
        _, of_group = self.columns(group)
        for kept, Z, beside in self._held if self._held is not None else self._source():
            per_entry = len(Z) // max(1, len(kept))
            step = max(1, UNFOLDED_ELEMENTS // max(1, per_entry * (count * (N + 1) + M)))
            for start in range(0, len(kept), step):
                piece = kept[start : start + step].to(matrix.compute_dtype)
                rows = matrix.kind.unfold(matrix.module, part, piece)
                if group is not None and matrix.groups > 1:
                    rows = rows[:, group]
                here = slice(start * per_entry, (start + len(piece)) * per_entry)
                U = Z[here, of_group]
                if self._scale is not None:
                    U = (U.double() * self._scale[of_group]).to(U.dtype)
                yield matrix.with_ones(rows), U, None if beside is None else beside[here, of_group]


class Drawn(NamedTuple):
    """Some rows: ``A``, ``U``, and what `Observation.aims` makes of ``U``."""

    A: Tensor
    U: Tensor
    aims: Tensor


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

    def run(self, matrix: Matrix, A: Tensor) -> Tensor:
        """``u`` of the stored weights on rows, (p, M) float64."""
        U = matrix.forward_rows(A).double()
        return U if self.norm is None else U * self._scale()

    def apply(self, W: Tensor, A: Tensor) -> Tensor:
        """``A Wᵀ``, group by group, of folded weights (M, N), in the dtype of both."""
        if self.groups == 1:
            return A @ W.T
        stacked = torch.bmm(A.unflatten(1, (self.groups, -1)).transpose(0, 1), W.unflatten(0, (self.groups, -1)).transpose(1, 2))
        return stacked.transpose(0, 1).flatten(1)

    @functools.cached_property
    def aims(self) -> Moments | None:
        """Sums over the rows that the program is solved on and `Observation.aims` of them, where there is one Gram matrix of them."""
        return None if self.gram is None or self.groups > 1 else moments(self.gram, self.solved_on(summed=True))

    def solved_on(self, *, summed: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """``(A, U)`` of the rows that the program is solved on, chunk by chunk; `Observation.aims` of them, if ``summed``."""
        if self.drawn is None:
            return self.observation.aims() if summed else self.observation.chunks()
        step = max(1, UNFOLDED_ELEMENTS // (self.drawn.A.shape[1] + self.drawn.U.shape[1]))
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
) -> Layer:
    """What is seen of a layer: inputs from ``pruned``, the network pruned so far, where there is one, targets from the dense one.

    With ``hold`` all rows are held: for programs that are solved elsewhere, where the network cannot be run again. Without ``unfold`` a
    convolution's inputs are held in their place. ``pruned_batches`` is what the pruned one is given, where it is not the same. ``summed`` says that
    it is wanted, of both networks, what the layer's outputs are added to.

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
        layer, dense, None if pruned is None else disturbed, device=device, max_rows=max_rows, seed=seed, hold=hold, unfold=unfold, gram=Gram()
    )


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
) -> Layer:
    """As `observe`, of what was seen in the dense network and in the pruned one, whose ``Z`` does not count."""
    matrix, apart, size = layer.matrix, 0.0, 0.0

    def source() -> Iterator[Seen]:
        nonlocal apart, size
        if disturbed is None:
            yield from (seen._replace(beside=None) for seen in dense())
            return
        for given, seen in zip(dense(), disturbed(), strict=True):
            if seen.kept.shape != given.kept.shape:
                raise RouteError(
                    f"layer {layer.name!r} is given {tuple(seen.kept.shape)} in the pruned network and {tuple(given.kept.shape)} in the dense one; "
                    "its shape depends on values, which a cascade cannot follow: use mode='parallel'"
                )
            wide = matrix.compute_dtype
            apart += square_sum(seen.kept.to(wide) - given.kept.to(wide))
            size += square_sum(given.kept.to(wide))
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
    return Layer(layer.name, matrix, weights, norm, layer.function, changed, seen, drawn, gram)
