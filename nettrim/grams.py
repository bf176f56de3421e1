"""What a program without a ReLU needs of its rows: ``G = AᵀA``, ``C = YᵀA`` and ``‖y_m‖²``; and ``G`` made once for layers with the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_STRIPS = 8
_TOGETHER = 1024
_TINY = 1e-30  # a mean square from which float32 loses no digits
_MANY = 2**16  # numbers, from which the roundings of their squares average out
_MANY_PRODUCTS = 2**28  # of a chunk, from which those of its sums do
_CANCELLED = 1e-6  # of ‖Y‖², of a misfit that is a difference of sums of its size: ten digits of sixteen stay
_CANCELLED_ROUGH = 1e-3  # where a chunk's sums were in float32


def square_sum(x: Tensor) -> float:
    """``Σ x²``: of many float32 numbers some at a time in float32, to nine digits where their roundings average out, and to seven where not."""
    if x.dtype == torch.float32 and x.numel() >= _MANY:
        flat = x.reshape(-1)
        even = len(flat) // _TOGETHER * _TOGETHER
        found = float(flat[:even].view(-1, _TOGETHER).square().sum(1).double().sum()) + float(flat[even:].double().square().sum())
        if _TINY * x.numel() < found < torch.inf:  # and neither over- nor underflown
            return found
    return float(x.double().square().sum())


@dataclass(eq=False)
class Gram:
    """``G = AᵀA`` of some rows, once it is made, and eigenvectors of it as it is scaled.

    Attributes
    ----------
    G : Tensor or None, (N, N) float64
    cancelled : float
        Of `Moments`, as far as ``G`` decides.
    eigen : dict of dtype to (Tensor, Tensor)
        Eigenvalues (N,) and eigenvectors (N, N) of ``G`` in columns of unit norm.
    """

    G: Tensor | None = None
    cancelled: float = _CANCELLED
    eigen: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _damped: dict[float, Gram] = field(default_factory=dict)

    def damped(self, damping: float, columns: int) -> Gram:
        """``G`` with the first so many entries of its diagonal larger by a share ``damping``; made once."""
        assert self.G is not None
        if damping not in self._damped:
            G = self.G.clone()
            G.diagonal()[:columns] *= 1 + damping
            self._damped[damping] = Gram(G, self.cancelled)
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
    cancelled : float
        The share of ``‖Y‖²`` that a misfit is to exceed, so that it can be told from these sums.
    """

    gram: Gram
    C: Tensor
    squares: Tensor
    cancelled: float = _CANCELLED

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
        return found if float(found.sum()) > self.cancelled * float(self.squares.sum()) else None

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
    """One pass over ``(A, Y)`` chunk by chunk; ``G`` is summed up too where it is not there yet.

    Sums over the chunks are in float64. Those of a chunk of float32 numbers are in float32 if it is a large one, whose roundings average out.
    """
    known = gram.G is not None
    C = squares = None
    cancelled = _CANCELLED
    for A, Y in rows:
        N, M = A.shape[1], Y.shape[1]
        if len(A) * N * (N + M) < _MANY_PRODUCTS or torch.get_float32_matmul_precision() != "highest":
            A, Y = A.double(), Y.double()
        elif A.dtype != torch.float64:
            cancelled = _CANCELLED_ROUGH
            gram.cancelled = gram.cancelled if known else cancelled
        if C is None or squares is None:
            C, squares = Y.new_zeros(M, N, dtype=torch.float64), Y.new_zeros(M, dtype=torch.float64)
        if not known:
            gram.G = A.new_zeros(N, N, dtype=torch.float64) if gram.G is None else gram.G
            step = -(-N // _STRIPS)
            for start in range(0, N, step):  # of a symmetric matrix one half, strip by strip
                gram.G[: start + step, start : start + step] += A[:, : start + step].T @ A[:, start : start + step]
        C += Y.T @ A
        squares += Y.square().sum(0)
    assert C is not None
    assert squares is not None
    if not known and gram.G is not None:
        gram.G = gram.G.triu() + gram.G.triu(1).T
    return Moments(gram, C, squares, max(cancelled, gram.cancelled))


def rough_dtype(like: Tensor) -> torch.dtype | None:
    """What products of float32 matrices are taken in where few digits of them are enough: bfloat16, if the processor has instructions for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    rough = like.dtype == torch.float32 and like.device.type == "cpu" and supported is not None and supported()
    return torch.bfloat16 if rough else None
