"""All rows of one matrix: held, or made anew from pass to pass.

A convolution's rows are its inputs many times over, so they are unfolded chunk by chunk, from the inputs where those can be held, and else from
another run of the network, batch by batch. What is held at a time is bounded by a chunk, one sample's rows, and one batch's activations of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nettrim.capture import Seen
from nettrim.layers import Kind, Matrix

HELD_ELEMENTS = 2**28  # of a layer's rows, or else of its inputs and outputs, in memory
UNFOLDED_ELEMENTS = 2**22  # of the rows made at a time

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
        return ((A, U) for A, U, _ in self.parts(group))

    def aims(self, group: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """As `chunks`, with the outputs that would make the dense network's sum: ``U`` and what the dense network adds more to it."""
        return ((A, U if more is None else U + more) for A, U, more in self.parts(group))

    def parts(self, group: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """As `chunks`, and what the dense network adds more to the outputs, (p, M); None where it is not known."""
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
        for A, U, more in self.parts():
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
