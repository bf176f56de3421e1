"""``Convolution``: the rows of a convolution's program, ``A`` never unfolded: its products are the convolution itself, and its adjoint.

A patch's entries are the input's many times over, so ``A`` (P, N) may not fit where the input does. ``A Wᵀ`` is the convolution with the kernels
``W``, and ``Aᵀ D`` what its gradient with respect to them would be (the operator form of Aghasi, Abdi, Romberg, SIAM J. Math. Data Sci. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as weight_gradients

from nettrim.errors import ArgumentError
from nettrim.layers import Matrix
from nettrim.layers.convolution import Convolutional, Geometry, patches

_ELEMENTS = 2**22  # of rows or outputs made at a time

Batches = Tensor | Sequence[Tensor]


class Convolution:
    """``A``, one row a position of the output: its patch of the input, and a one where there is a bias.

    It is a stream of those rows (call it, as any ``inputs`` of a :class:`nettrim.LayerProgram` may be called), with the products beside.

    Parameters
    ----------
    inputs : Tensor, (samples, channels, size...), or sequence of such
        What the kernels meet: padded. Batches of it may differ in size.
    kernel_size, stride, dilation : int or tuple of int
        As those of ``nn.Conv1d`` to ``nn.Conv3d``; a tuple says the number of dimensions, an int is for all of them.
    bias : bool
        Whether every row ends in a one.
    channels : slice
        The channels that are read, all by default: those of one group of a grouped convolution.
    dtype : torch.dtype, optional
        Of the rows; that of the inputs by default. Products are in the precision of what is multiplied.

    Attributes
    ----------
    rows, width : int
        P and N.

    Raises
    ------
    ArgumentError
        No batch, or one that is not of 3 to 5 dimensions, not floating, of another number of channels, or smaller than the kernel.
    """

    def __init__(
        self,
        inputs: Batches,
        kernel_size: int | tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        channels: slice = slice(None),
        dtype: torch.dtype | None = None,
    ) -> None:
        self._batches = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self._channels, self._dtype = channels, dtype
        self.bias, self.rows, self.width = bias, 0, 0
        self._geometry: Geometry | None = None
        self._taken = 0
        for x in self._batches:
            if not isinstance(x, Tensor) or not x.is_floating_point() or not 3 <= x.dim() <= 5:
                what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ArgumentError(f"inputs hold {what}; expected floating-point tensors (samples, channels, size...) of 1 to 3 dimensions")
            if self._geometry is None:
                dims = x.dim() - 2
                self._geometry = Geometry(*(self._per_dimension(value, dims) for value in (kernel_size, stride, dilation)))
                self._taken = len(range(*channels.indices(x.shape[1])))
                self.width = self._taken * math.prod(self._geometry.kernel) + bias
            if x.dim() != self._geometry.dims + 2 or len(range(*channels.indices(x.shape[1]))) != self._taken:
                raise ArgumentError(f"a batch has shape {tuple(x.shape)}; expected {self._taken} channels and {self._geometry.dims} dimensions")
            self.rows += len(x) * math.prod(self._positions(x))
        if not self.rows:
            raise ArgumentError("inputs hold no sample; expected at least one batch with one")

    @staticmethod
    def _per_dimension(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
        values = (value,) * dims if isinstance(value, int) else tuple(value)
        if len(values) != dims or any(not isinstance(each, int) or each < 1 for each in values):
            raise ArgumentError(f"got {value!r}; expected a whole number above 0, or one for each of {dims} dimensions")
        return values

    @property
    def geometry(self) -> Geometry:
        """Kernel, stride and dilation, one number a dimension."""
        assert self._geometry is not None
        return self._geometry

    def _positions(self, x: Tensor) -> tuple[int, ...]:
        """How many places the kernel has along each dimension."""
        found = self.geometry.positions(tuple(x.shape[2:]))
        if min(found) < 1:
            raise ArgumentError(f"a batch has size {tuple(x.shape[2:])}; expected no less than the kernel {self.geometry.kernel}, dilated and padded")
        return found

    def _pieces(self, outputs: int) -> Iterator[tuple[slice, Tensor]]:
        """Samples, as many at a time as a bounded number of rows of ``outputs`` entries is of, with the rows that are theirs."""
        start = 0
        for x in self._batches:
            each = math.prod(self._positions(x))
            for piece in x[:, self._channels].split(max(1, _ELEMENTS // (each * max(1, outputs)))):
                stop = start + len(piece) * each
                yield slice(start, stop), piece
                start = stop

    def __call__(self) -> Iterator[Tensor]:
        """The rows, chunk by chunk, (p, N): what the products are the products of."""
        for _, x in self._pieces(self.width):
            rows = patches(x if self._dtype is None else x.to(self._dtype), *self.geometry, 1).squeeze(1)
            yield torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if self.bias else rows

    def product(self, W: Tensor) -> Tensor:
        """``A Wᵀ``, (P, M), of weights (M, N), in their precision."""
        kernels, bias = self._kernels(W), W[:, -1] if self.bias else None
        out = W.new_empty(self.rows, len(W))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.geometry.dims - 1]
        for rows, x in self._pieces(len(W)):
            Z = convolve(x.to(W), kernels, bias, self.geometry.stride, 0, self.geometry.dilation)
            out[rows] = Z.movedim(1, -1).flatten(0, -2)
        return out

    def adjoint(self, D: Tensor) -> Tensor:
        """``Dᵀ A``, (M, N), of (P, M), in its precision."""
        total = D.new_zeros(D.shape[1], self.width)
        for rows, x in self._pieces(D.shape[1]):
            self._add(total, x.to(D), D[rows])
        if self.bias:
            total[:, -1] = D.sum(0)
        return total

    def squares(self, dtype: torch.dtype) -> Tensor:
        """``Σ_p a_pj²`` of each column, (N,): the diagonal of ``AᵀA``."""
        total: Tensor | None = None
        for rows, x in self._pieces(1):
            total = torch.zeros(1, self.width, dtype=dtype, device=x.device) if total is None else total
            self._add(total, x.to(dtype).square(), torch.ones(rows.stop - rows.start, 1, dtype=dtype, device=x.device))
        assert total is not None
        if self.bias:
            total[:, -1] = self.rows
        return total[0]

    def _kernels(self, W: Tensor) -> Tensor:
        return W[:, : self.width - self.bias].reshape(len(W), self._taken, *self.geometry.kernel)

    def _add(self, total: Tensor, x: Tensor, D: Tensor) -> None:
        """Add what the samples ``x`` bring to the kernels' part of the adjoint."""
        gradient = (weight_gradients.conv1d_weight, weight_gradients.conv2d_weight, weight_gradients.conv3d_weight)[self.geometry.dims - 1]
        shape = (D.shape[1], self._taken, *self.geometry.kernel)
        outputs = D.reshape(len(x), *self._positions(x), D.shape[1]).movedim(-1, 1).contiguous()
        found = gradient(x, shape, outputs, self.geometry.stride, 0, self.geometry.dilation)
        total[:, : self.width - self.bias] += found.flatten(1)


def of_matrix(matrix: Matrix, group: int, inputs: Batches) -> Convolution:
    """The rows of one group of a convolutional layer, from what its kind keeps of the input."""
    assert isinstance(matrix.kind, Convolutional)
    kernel, stride, dilation = matrix.kind.geometry(matrix.module)
    taken = matrix.shape[1] // math.prod(kernel)
    channels = slice(group * taken, (group + 1) * taken)
    return Convolution(inputs, kernel, stride=stride, dilation=dilation, bias=matrix.has_bias, channels=channels, dtype=matrix.compute_dtype)
