"""What is known to be zero leaves the program before any solver sees it.

* An input that is 0 in every row: its weights change nothing but the objective, so 0 is optimal for them.
* A neuron whose targets are 0 in every row (relaxed set, or no ReLU): ``w = 0`` meets them exactly at no cost.

The smaller program has the same optimum, and its solution with zeros put back has the same objective, bound and discrepancy.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nettrim.programs import LayerProgram

_WORTHWHILE = 0.05  # share of the inputs or neurons from which a copy of the rest pays


@dataclasses.dataclass(frozen=True)
class Presolved:
    """A smaller program, and how its weights come back: ``rows`` and ``columns`` are the indices kept, None for all."""

    program: LayerProgram
    rows: Tensor | None
    columns: Tensor | None
    shape: tuple[int, int]

    def restrict(self, W: Tensor) -> Tensor:
        """Full weights (M, N) to those of the smaller program."""
        if self.rows is not None:
            W = W[self.rows]
        return W if self.columns is None else W[:, self.columns]

    def expand(self, W: Tensor) -> Tensor:
        """Weights of the smaller program to full ones, zeros put back: the inverse of :meth:`restrict` where those are zero."""
        if self.columns is not None:
            W = W.new_zeros((W.shape[0], self.shape[1])).index_copy_(1, self.columns, W)
        if self.rows is not None:
            W = W.new_zeros(self.shape).index_copy_(0, self.rows, W)
        return W


def presolve(program: LayerProgram, *, inputs_too: bool = True) -> Presolved:
    """Drop dead neurons, and dead inputs unless the solver does, where they are many enough.

    Streamed and memory-mapped rows stay as they are, not to be copied; and programs that are not convex, whose weights are counted.
    """
    if not program.in_memory or program.supports is not None:
        return Presolved(program, None, None, program.shape)
    assert isinstance(program.inputs, Tensor) and isinstance(program.targets, Tensor)
    M, N = program.shape
    columns = _worthwhile((program.inputs != 0).any(0)) if inputs_too else None
    rows = None if program.one_sided else _worthwhile((program.targets != 0).any(0))
    if rows is None and columns is None:
        return Presolved(program, None, None, program.shape)
    inputs = program.inputs if columns is None else program.inputs[:, columns]
    targets = program.targets if rows is None else program.targets[:, rows]
    omega = program.l1_weights
    assert isinstance(omega, Tensor)
    if columns is not None:
        omega = omega[..., columns]
    if rows is not None and omega.ndim == 2:
        omega = omega[rows]
    floor, ceiling = (given if rows is None or given is None else given[rows] for given in (program.floor, program.ceiling))
    smaller = dataclasses.replace(program, inputs=inputs, targets=targets, floor=floor, ceiling=ceiling, l1_weights=omega, moments=None)
    return Presolved(smaller, rows, columns, (M, N))


def _worthwhile(alive: Tensor) -> Tensor | None:
    """Indices of what is alive, or None where too little, or everything, is dead."""
    count = int(alive.sum())
    if count == 0 or count > (1 - _WORTHWHILE) * len(alive):
        return None
    return torch.nonzero(alive).flatten()
