"""What a program without a ReLU needs of its rows, ``G = AᵀA`` and ``C = YᵀA``; and ``G`` made once for layers with the same inputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_WORTHWHILE = 0.05  # share of inputs that are always 0 from which a matrix of the others pays
_IN_CACHE = 2**16  # elements: a copy in float64 of no more need not leave the processor's cache
_STRIPS = 8
CACHED_ROWS = 512  # converted to float64 at a time: as they are multiplied they are still in the processor's cache
_UNIT = 48  # columns: a multiple of what the kernels of products take at a time; strips of other widths take half as long again


def square_sum(x: Tensor) -> float:
    """``Σ x²`` in float64, whatever the dtype of ``x``."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.reshape(-1).split(_IN_CACHE):
        wide = part.double()
        total += torch.dot(wide, wide)
    return float(total)


def column_squares(A: Tensor) -> Tensor:
    """``‖a_j‖²`` of every column, (N,) float64."""
    found = torch.zeros(A.shape[1], dtype=torch.float64, device=A.device)
    for part in A.split(max(1, _IN_CACHE // max(1, A.shape[1]))):
        wide = part.double()  # of float64 this is the part itself
        found += (wide * wide).sum(0)
    return found


@dataclass(eq=False)
class Gram:
    """``G = AᵀA`` of some rows, once it is made, and eigenvectors of it as it is scaled.

    Attributes
    ----------
    G : Tensor or None, (N, N) float64
    cross : Tensor or None, (N, N) float64
        ``AᵀÂ`` for these rows ``Â`` and those that the dense network has in their place, where it was made.
    eigen : dict of dtype to (Tensor, Tensor)
        Eigenvalues (N,) and eigenvectors (N, N) of ``G`` in columns of unit norm.
    """

    G: Tensor | None = None
    cross: Tensor | None = None
    eigen: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _damped: dict[float, Gram] = field(default_factory=dict)
    _live: tuple[Tensor, Gram] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "cross": None, "_live": None}  # no program reads the one, and the other is made again

    def damped(self, damping: float, columns: int) -> Gram:
        """``G`` with the first so many entries of its diagonal larger by a share ``damping``; made once."""
        assert self.G is not None
        if damping not in self._damped:
            G = self.G.clone()
            G.diagonal()[:columns] *= 1 + damping
            self._damped[damping] = Gram(G)
        return self._damped[damping]

    def live(self) -> tuple[Tensor, Gram] | None:
        """The indices of the inputs that are not 0 in all rows, and ``G`` of them alone, made once; None where hardly any other is."""
        assert self.G is not None
        if self._live is None:
            lit = self.G.diagonal() != 0
            if not (1 - _WORTHWHILE) * len(lit) >= int(lit.sum()) > 0:
                return None
            index = lit.nonzero().flatten()
            self._live = index, Gram(self.G[index][:, index])
        return self._live


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the rows of one layer, float64.

    Attributes
    ----------
    gram : Gram
        Perhaps of other layers too.
    C : Tensor, (M, N)
        ``YᵀA``.
    """

    gram: Gram
    C: Tensor

    @property
    def G(self) -> Tensor:
        """``AᵀA``, (N, N)."""
        assert self.gram.G is not None
        return self.gram.G

    def of(self, outputs: slice) -> Moments:
        """Those of some of the outputs."""
        return dataclasses.replace(self, C=self.C[outputs])


def add_gram(G: Tensor, A: Tensor) -> None:
    """``G += AᵀA`` in the upper half of ``G``, strip by strip; `symmetric` makes it whole."""
    N = len(G)
    step = max(_UNIT, round(N / _STRIPS / _UNIT) * _UNIT)
    starts = range(0, max(N - _UNIT // 2, 1), step)  # a few columns at the end, as that of ones, go with those before
    for start, end in itertools.pairwise([*starts, N]):
        G[:end, start:end].addmm_(A[:, :end].T, A[:, start:end])


def symmetric(G: Tensor) -> Tensor:
    """The symmetric matrix with the upper half of ``G``."""
    return G.triu() + G.triu(1).T


def moments(gram: Gram, rows: Iterable[tuple[Tensor, Tensor]], W: Tensor | None = None) -> Moments:
    """One pass over ``(A, Y)`` chunk by chunk; ``G`` is summed up too where it is not there yet.

    With dense weights ``W`` (M, N) the targets are what they make of the dense network's inputs, and ``C = W (AᵀÂ)`` needs no pass of its own; nor
    does ``C = W G``, where there is no such ``AᵀÂ`` since the inputs are the same.

    In float64: where inputs are nearly collinear, products in float32 leave several times the misfit (docs/sparsity.md, what was tried).
    """
    G, summed = None, None
    for part, targets in rows if gram.G is None or W is None else ():
        for few, aims in zip(part.split(CACHED_ROWS), targets.split(CACHED_ROWS), strict=True):
            A = few.double()
            if gram.G is None:
                G = A.new_zeros(A.shape[1], A.shape[1]) if G is None else G
                add_gram(G, A)
            if W is None:
                Y = aims.double()
                summed = Y.new_zeros(Y.shape[1], A.shape[1]) if summed is None else summed
                summed.addmm_(Y.T, A)
    if G is not None:
        gram.G = symmetric(G)
    if W is not None:
        assert gram.G is not None
        summed = W.double() @ (gram.G if gram.cross is None else gram.cross)
    assert summed is not None
    return Moments(gram, summed)
