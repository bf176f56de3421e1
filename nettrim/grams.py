"""What a program without a ReLU needs of its rows, ``G = AᵀA`` and ``C = YᵀA``; and ``G`` made once for layers with the same inputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nettrim.precision import working_dtype

_IN_CACHE = 2**16  # elements: a copy in float64 of no more need not leave the processor's cache
_STRIPS = 8
_IN_RANGE = (1e-12, 1e12)  # of the largest entry, for float32 to hold products
_HEAVY = 10.0  # times the median size of a row


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
    eigen : dict of dtype to (Tensor, Tensor)
        Eigenvalues (N,) and eigenvectors (N, N) of ``G`` in columns of unit norm.
    """

    G: Tensor | None = None
    eigen: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _damped: dict[float, Gram] = field(default_factory=dict)

    def damped(self, damping: float, columns: int) -> Gram:
        """``G`` with the first so many entries of its diagonal larger by a share ``damping``; made once."""
        assert self.G is not None
        if damping not in self._damped:
            G = self.G.clone()
            G.diagonal()[:columns] *= 1 + damping
            self._damped[damping] = Gram(G)
        return self._damped[damping]


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


def _in_range(rows: Tensor) -> bool:
    """Whether float32 holds the products of the largest entries."""
    if rows.numel() == 0:
        return False
    least, most = torch.aminmax(rows)
    size = max(-float(least), float(most))
    return size == 0 or _IN_RANGE[0] <= size <= _IN_RANGE[1]


def _parts(A: Tensor, Y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows in the precisions that their products are taken in: float32 where a search sees them so and they lose no more by it.

    They would by overflow, and beside rows many times as large (as the first token's are in language models), which are taken by themselves.
    """
    narrow = working_dtype(Y.shape[1], A.shape[1]) == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if not narrow or A.dtype == torch.float64 or not all(_in_range(part) for part in (A, Y)):
        yield A.double(), Y.double()
        return
    heavy = torch.zeros(len(A), dtype=torch.bool, device=A.device)
    for size in (torch.linalg.vector_norm(part, dim=1) for part in (A, Y)):
        heavy |= size > _HEAVY * size.median()
    if not bool(heavy.any()):
        yield A, Y
        return
    yield A[heavy].double(), Y[heavy].double()
    yield A[~heavy], Y[~heavy]


def add_gram(G: Tensor, A: Tensor) -> None:
    """``G += AᵀA`` in the upper half of ``G``, strip by strip; `symmetric` makes it whole. Products are in the dtype of ``A``."""
    N = len(G)
    step = -(-N // _STRIPS)
    for start in range(0, N, step):
        G[: start + step, start : start + step] += A[:, : start + step].T @ A[:, start : start + step]


def symmetric(G: Tensor) -> Tensor:
    """The symmetric matrix with the upper half of ``G``."""
    return G.triu() + G.triu(1).T


def moments(gram: Gram, rows: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """One pass over ``(A, Y)`` chunk by chunk; ``G`` is summed up too where it is not there yet.

    Products of a chunk are as precise as the search that they are for; the sum over the chunks is in float64.
    """
    known = gram.G is not None
    C = None
    for A, Y in itertools.chain.from_iterable(_parts(A, Y) for A, Y in rows):
        M, N = Y.shape[1], A.shape[1]
        if C is None:
            C = Y.new_zeros(M, N, dtype=torch.float64)
        if not known:
            gram.G = A.new_zeros(N, N, dtype=torch.float64) if gram.G is None else gram.G
            add_gram(gram.G, A)
        C += Y.T @ A
    assert C is not None
    if not known and gram.G is not None:
        gram.G = symmetric(gram.G)
    return Moments(gram, C)
