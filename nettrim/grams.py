"""What a program without a ReLU needs of its rows: ``G = AᵀA``, ``C = YᵀA`` and ``‖y_m‖²``; and ``G`` made once for layers with the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_IN_CACHE = 2**16  # elements: a copy in float64 of no more need not leave the processor's cache
_STRIPS = 8
_CANCELLED = 1e-6  # of ‖Y‖², of a misfit that is a difference of sums of its size: ten digits of sixteen stay


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
    squares : Tensor, (M,)
        ``‖y_m‖²`` of each output.
    """

    gram: Gram
    C: Tensor
    squares: Tensor

    @property
    def G(self) -> Tensor:
        """``AᵀA``, (N, N)."""
        assert self.gram.G is not None
        return self.gram.G

    def of(self, outputs: slice) -> Moments:
        """Those of some of the outputs."""
        return dataclasses.replace(self, C=self.C[outputs], squares=self.squares[outputs])

    def left(self, W: Tensor) -> Tensor | None:
        """``‖A w_m − y_m‖²`` of each row of the weights (M, N), (M,); None where too few digits of it would be right."""
        W = W.to(self.C)
        found = self.squares - ((2 * self.C - W @ self.G) * W).sum(1)
        return found if float(found.sum()) > _CANCELLED * float(self.squares.sum()) else None

    def leaning(self, repair: float, dense: Tensor) -> Moments:
        """Those of ``repair · y + (1 − repair) · A wᵀ`` for the weights ``dense`` (M, N)."""
        if repair == 1:
            return self
        W = dense.to(self.C)
        V = W @ self.G
        own = (V * W).sum(1)
        squares = repair**2 * self.squares + 2 * repair * (1 - repair) * (self.C * W).sum(1) + (1 - repair) ** 2 * own
        return dataclasses.replace(self, C=repair * self.C + (1 - repair) * V, squares=squares)

    def damped(self, damping: float, dense: Tensor, columns: int) -> Moments:
        """Those with a row more for each of the first so many inputs ``j``, ``√damping ‖a_j‖`` there, and what the weights ``dense`` make of it."""
        if damping == 0:
            return self
        W, added = dense.to(self.C), torch.zeros_like(self.C[0])
        added[:columns] = damping * self.G.diagonal()[:columns]
        squares = self.squares + (W.square() * added).sum(1)
        return dataclasses.replace(self, gram=self.gram.damped(damping, columns), C=self.C + W * added, squares=squares)


def moments(gram: Gram, rows: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """One pass over ``(A, Y)`` chunk by chunk; ``G`` is summed up too where it is not there yet."""
    known = gram.G is not None
    C = squares = None
    for part, targets in rows:
        A, Y = part.double(), targets.double()
        if C is None or squares is None:
            C, squares = Y.new_zeros(Y.shape[1], A.shape[1]), Y.new_zeros(Y.shape[1])
        if not known:
            gram.G = A.new_zeros(A.shape[1], A.shape[1]) if gram.G is None else gram.G
            step = -(-A.shape[1] // _STRIPS)
            for start in range(0, A.shape[1], step):  # of a symmetric matrix one half, strip by strip
                gram.G[: start + step, start : start + step].addmm_(A[:, : start + step].T, A[:, start : start + step])
        C.addmm_(Y.T, A)
        squares += column_squares(targets)
    assert C is not None
    assert squares is not None
    if not known and gram.G is not None:
        gram.G = gram.G.triu() + gram.G.triu(1).T
    return Moments(gram, C, squares)


def rough_dtype(like: Tensor) -> torch.dtype | None:
    """What products of float32 matrices are taken in where few digits of them are enough: bfloat16, if the processor has instructions for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    rough = like.dtype == torch.float32 and like.device.type == "cpu" and supported is not None and supported()
    return torch.bfloat16 if rough else None
