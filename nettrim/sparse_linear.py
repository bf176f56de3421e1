"""``SparseLinear``: what an ``nn.Linear`` computes, from its nonzeros alone.

The weights are in compressed rows (CSR), or in compressed rows of square blocks (BSR), with 32-bit indices: MKL reads these without converting
them. One row of inputs is a matrix-vector product, several are one product with the rows as columns, so that the inner loop runs over them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.errors import ArgumentError

LARGEST = 2**31 - 1  # of a 32-bit index
_EXACT = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # MKL has no sparse products of these; float32 holds them exactly


class SparseLinear(nn.Module):
    """An ``nn.Linear`` for inference that stores and multiplies nonzeros only.

    The buffers ``crow``, ``columns``, ``values`` and ``bias`` are its state: ``state_dict``, ``to``, ``deepcopy`` and ``torch.save`` take them as
    they take any others, and ``load_state_dict`` also where the number of nonzeros differs. float16 and bfloat16 values are multiplied in float32.
    Gradients reach the inputs, not the weights.

    Parameters
    ----------
    in_features, out_features : int
        As of ``nn.Linear``.
    crow : Tensor, (out_features / B + 1,) int32
        Where the rows of blocks begin in ``columns``; B = 1 where ``values`` has one dimension.
    columns : Tensor, (blocks,) int32
        Column of each block, ascending in a row.
    values : Tensor, (blocks,) or (blocks, B, B)
        Of a floating dtype.
    bias : Tensor or None, (out_features,)

    Raises
    ------
    ArgumentError
        The tensors are no such matrix.

    See Also
    --------
    nettrim.to_sparse, nettrim.to_dense : for whole networks.
    """

    crow: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, crow: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        _check(crow, columns, values, (out_features, in_features))
        if bias is not None and (bias.shape != (out_features,) or bias.dtype != values.dtype):
            raise ArgumentError(f"bias is {bias.dtype} {tuple(bias.shape)}; expected {values.dtype} {(out_features,)}")
        self.register_buffer("crow", crow)
        self.register_buffer("columns", columns)
        self.register_buffer("values", values)
        self.register_buffer("bias", bias)
        self._ready: tuple[Tensor, int, Tensor] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, block: int = 1) -> SparseLinear:
        """The same function as a dense layer's, which is left as it is.

        Parameters
        ----------
        linear : nn.Linear
        block : int
            Side of the blocks; a block with a nonzero is kept whole.

        Raises
        ------
        ArgumentError
            The weights are no (block by block) whole matrix, or have more nonzeros than a 32-bit index counts.
        """
        weight = linear.weight.detach()
        if block < 1 or any(size % block for size in weight.shape):
            raise ArgumentError(f"weights of shape {tuple(weight.shape)} are not cut by blocks of {block}x{block}; choose a divisor of both")
        if int(weight.count_nonzero()) > LARGEST:
            raise ArgumentError(f"the weights have more than {LARGEST} nonzeros, the most that a 32-bit index counts; leave the layer dense")
        with _quiet():
            matrix = weight.to_sparse_csr() if block == 1 else weight.to_sparse_bsr((block, block))
        bias = None if linear.bias is None else linear.bias.detach().clone()
        sparse = cls(
            linear.in_features, linear.out_features, matrix.crow_indices().int(), matrix.col_indices().int(), matrix.values().clone(), bias
        )
        return sparse.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer: the inverse of :meth:`from_linear`, bit for bit (a negative zero apart)."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The dense weights (out_features, in_features), made anew at each access: for code that looks at a layer's weight."""
        shape = (self.out_features, self.in_features)
        return _matrix(self.crow, self.columns, self.values, shape).to_dense()

    @property
    def form(self) -> str:
        """``"csr"``, or the blocks as in ``"bsr 8x8"``."""
        return "csr" if self.values.dim() == 1 else f"bsr {self.values.shape[1]}x{self.values.shape[2]}"

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        stored = f"nonzeros={self.values.numel()}, form={self.form!r}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {stored}"

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + bias`` for (..., in_features), in the dtype of the weights, or in autocast's.

        Raises
        ------
        ArgumentError
            Another width or dtype; or, chained to torch's own error, the network is being exported to ONNX, which has no sparse product.
        """
        values = self._buffers["values"]
        assert values is not None
        lowered = torch.is_autocast_enabled(x.device.type) and values.dtype != torch.float64
        if lowered and x.is_floating_point():
            x = x.to(values.dtype)
        if x.dim() == 0 or x.shape[-1] != self.in_features or x.dtype != values.dtype:
            raise ArgumentError(f"got inputs {x.dtype} {tuple(x.shape)}; expected {values.dtype} (..., {self.in_features}), as the weights are")
        if torch.compiler.is_compiling():
            out = _operator(x, self.crow, self.columns, values, self.bias, self.out_features)
        elif lowered:
            out = _alone(x, self._ready_matrix(values), self._buffers["bias"])
        else:
            return _product(x, self._ready_matrix(values), self._buffers["bias"])
        return out.to(torch.get_autocast_dtype(x.device.type)) if lowered else out

    def _ready_matrix(self, values: Tensor) -> Tensor:
        """The matrix as it is multiplied: made once, and anew when the values were replaced or written to."""
        ready = self._ready
        version = 0 if values.is_inference() else values._version
        if ready is None or ready[0] is not values or ready[1] != version:
            matrix = _computable(self.crow, self.columns, values, (self.out_features, self.in_features))
            self._ready = ready = (values, version, matrix)
        return ready[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}  # a copy's matrix is to be made of the copy's values

    def _apply(self, *args: Any, **kwargs: Any) -> SparseLinear:
        self._ready = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for what is loaded, after checking it: an index out of range would be read as an address."""
        self._ready = None
        keys = ("crow", "columns", "values")
        given = [state_dict[prefix + key] for key in keys if isinstance(state_dict.get(prefix + key), Tensor)]
        if len(given) == len(keys):
            try:
                _check(given[0], given[1], given[2], (self.out_features, self.in_features))
            except ArgumentError as error:
                args[-1].append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
                return
            for key, value in zip(keys, given, strict=True):
                own = self.get_buffer(key)
                setattr(self, key, torch.empty(value.shape, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning, once a process, that its compressed tensors are in beta: what they compute is checked by ``to_sparse``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta", UserWarning)
        yield


def _matrix(crow: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], check: bool = False) -> Tensor:
    layout = torch.sparse_csr if values.dim() == 1 else torch.sparse_bsr
    return torch.sparse_compressed_tensor(crow, columns, values, shape, layout=layout, device=values.device, check_invariants=check)


def _check(crow: Any, columns: Any, values: Any, shape: tuple[int, int]) -> None:
    """Refuse what is no matrix of a shape in compressed rows."""
    if any(tensor.dtype != torch.int32 for tensor in (crow, columns)) or not values.is_floating_point():
        given = ", ".join(str(tensor.dtype) for tensor in (crow, columns, values))
        raise ArgumentError(f"crow, columns and values are {given}; expected int32, int32 and a floating dtype")
    if values.dim() not in (1, 3) or (values.dim() == 3 and values.shape[1] != values.shape[2]):
        raise ArgumentError(f"values have shape {tuple(values.shape)}; expected (blocks,) or (blocks, B, B)")
    try:
        with _quiet():
            _matrix(crow, columns, values, shape, check=True)
    except RuntimeError as error:
        raise ArgumentError(f"crow, columns and values are no compressed rows of a matrix of shape {shape}: {error}") from error


def _computable(crow: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return _matrix(crow, columns, values.detach().to(_EXACT.get(values.dtype, values.dtype)), shape)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias`` for at least one dimension of x. At one row the calls around the product cost as much as it does: there are few of them."""
    shape, (M, N) = x.shape, matrix.shape
    inputs = x if x.dtype == matrix.dtype else x.to(matrix.dtype)
    if bias is not None and bias.dtype != matrix.dtype:
        bias = bias.to(matrix.dtype)
    if x.numel() == N and N and matrix.layout == torch.sparse_csr:
        vector = inputs.reshape(N)
        out = torch.mv(matrix, vector) if bias is None else torch.addmv(bias, matrix, vector)
        for _ in shape[1:]:  # all other sizes are 1, and this is the quickest way to put them back
            out = out.unsqueeze(0)
        return out if out.dtype == x.dtype else out.to(x.dtype)
    if x.numel() == 0:
        out = inputs.new_zeros(shape[:-1].numel(), M) if bias is None else bias.repeat(shape[:-1].numel(), 1)
    else:
        columns = inputs.reshape(-1, N).t()
        out = (torch.mm(matrix, columns) if bias is None else torch.addmm(bias[:, None], matrix, columns)).t().contiguous()
    return out.to(x.dtype).reshape(*shape[:-1], M)


def _alone(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """The product outside of autocast, which would cast the matrix to a dtype that has no sparse product."""
    with torch.autocast(x.device.type, enabled=False):
        return _product(x, matrix, bias)


@torch.library.custom_op("nettrim::sparse_linear", mutates_args=())
def _operator(x: Tensor, crow: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """The product as one operator, for ``torch.compile`` and ``torch.export``, which do not look into sparse tensors."""
    return _alone(x, _computable(crow, columns, values, (out_features, x.shape[-1])), bias)


@_operator.register_fake
def _(x: Tensor, crow: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        raise ArgumentError("ONNX has no sparse product; export nettrim.to_dense(model), which has the same weights, in place of this network")
    return x.new_empty(*x.shape[:-1], out_features)
