"""One matrix of a module: its weights out and back, its rows of inputs and outputs, and the stored weights run on such rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nettrim.errors import ArgumentError
from nettrim.layers.base import Call, Kind, Part, find_kind, unsupported_reason
from nettrim.precision import all_finite

ROWS_PER_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix ``Z = A Wᵀ`` of a module.

    Attributes
    ----------
    module : nn.Module
    kind : Kind
        How the module's type is read.
    part : Part
        Which of its matrices this is.
    """

    module: nn.Module
    kind: Kind
    part: Part

    def of(self, module: nn.Module) -> Matrix:
        """The same matrix of a copy of the module."""
        return Matrix(module, self.kind, self.part)

    def name_in(self, prefix: str) -> str:
        """The matrix's name, that of its module being ``prefix``."""
        return ".".join(piece for piece in (prefix, self.part.label) if piece)

    @property
    def groups(self) -> int:
        return self.part.groups

    @property
    def has_bias(self) -> bool:
        """Whether the matrix ends in a bias column."""
        return self.part.bias is not None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that holds the weights (perhaps among others)."""
        return self.module.get_parameter(self.part.weight)

    def parameter_names(self) -> tuple[str, ...]:
        """Those of the weight and the bias in the module."""
        return (self.part.weight,) if self.part.bias is None else (self.part.weight, self.part.bias)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype that the matrix's program is solved in: float64 for float64 weights, float32 for all others."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """(M, N) without the bias column: M outputs, N inputs of each."""
        M, N = self.weights().shape
        return M, N

    def weights(self) -> Tensor:
        """(M, N) without the bias column, in the parameter's dtype; may share its memory."""
        weight = self.weight.detach()
        return self.kind.to_matrix(self.module, self.part, weight if self.part.rows is None else weight[self.part.rows])

    def bias(self) -> Tensor | None:
        """(M,), or None."""
        if self.part.bias is None:
            return None
        bias = self.module.get_parameter(self.part.bias).detach()
        return bias if self.part.bias_rows is None else bias[self.part.bias_rows]

    def as_matrix(self) -> Tensor:
        """See :func:`nettrim.layers.as_matrix`."""
        weights, bias = self.weights(), self.bias()
        return weights.clone() if bias is None else torch.cat([weights, bias.to(weights.dtype)[:, None]], dim=1)

    def write_back(self, matrix: Tensor) -> None:
        """See :func:`nettrim.layers.write_back`."""
        M, N = self.shape
        if matrix.shape != (M, N + self.has_bias):
            raise ArgumentError(f"got a matrix of shape {tuple(matrix.shape)}; expected {(M, N + self.has_bias)}")
        pieces = {self.part.weight: matrix[:, :N]}
        if self.part.bias is not None:
            pieces[self.part.bias] = matrix[:, -1]
        written: list[tuple[Tensor, Tensor]] = []
        for key, piece in pieces.items():  # all checks first: a refused matrix leaves the layer whole
            parameter = self.module.get_parameter(key).detach()
            taken = self.part.rows if key == self.part.weight else self.part.bias_rows
            target = parameter if taken is None else parameter[taken]
            if not all_finite(piece):
                raise ArgumentError(f"the matrix for {key!r} holds NaN or infinity; expected finite values")
            value = piece.detach().to(device=target.device, dtype=target.dtype)
            if not all_finite(value):
                raise ArgumentError(
                    f"a value of size {float(piece.abs().max()):.4g} for {key!r} is beyond the range of {target.dtype} "
                    f"(largest {torch.finfo(target.dtype).max:.4g}); rescale the layer or use a wider dtype"
                )
            if key == self.part.weight:
                value = self.kind.to_weight(self.module, self.part, value, tuple(target.shape))
            written.append((target, value))
        with torch.no_grad():
            for target, value in written:
                target.copy_(value)

    def with_ones(self, rows: Tensor) -> Tensor:
        """What `unfold` gives, (P, N) or (P, G, N), as rows of ``A``, (P, G·N): with a column of ones for the bias of each group."""
        if self.has_bias:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
        return rows.flatten(1)

    def input_rows(self, call: Call) -> Tensor:
        """All rows of ``A``, (P, G·N), of one call."""
        kept = self.kind.inputs(self.module, self.part, call)
        return self.with_ones(self.kind.unfold(self.module, self.part, kept))

    def output_rows(self, call: Call) -> Tensor:
        """``Z``, (P, M), of one call."""
        return self.kind.outputs(self.module, self.part, call)

    @torch.no_grad()
    def forward_rows(self, rows: Tensor) -> Tensor:
        """See :func:`nettrim.layers.forward_rows`."""
        weights, bias = self.weights(), self.bias()
        M, N = self.shape
        width = self.groups * (N + self.has_bias)
        if rows.dim() != 2 or rows.shape[1] != width:
            raise ArgumentError(
                f"got rows of shape {tuple(rows.shape)}; expected (P, {width}), the inputs" + (" and a column of ones" if self.has_bias else "")
            )
        out = torch.empty(rows.shape[0], M, dtype=self.compute_dtype, device=rows.device)
        for start in range(0, rows.shape[0], ROWS_PER_CHUNK):
            piece = rows[start : start + ROWS_PER_CHUNK].unflatten(1, (self.groups, -1))[..., :N]
            chunk = piece.to(device=weights.device, dtype=weights.dtype)
            # through the same kernels as a layer's own forward, so that it rounds as that does
            if self.groups == 1:
                done = nn.functional.linear(chunk.squeeze(1), weights, bias)
            else:
                stacked = torch.bmm(chunk.transpose(0, 1), weights.unflatten(0, (self.groups, -1)).transpose(1, 2))
                done = stacked.transpose(0, 1).flatten(1)
                done = done if bias is None else done + bias
            out[start : start + ROWS_PER_CHUNK] = done
        return out


def matrices_of(module: nn.Module) -> tuple[Matrix, ...]:
    """The matrices of a module, in the order in which they are used.

    Raises
    ------
    ArgumentError
        The module's type is not supported.
    """
    kind = find_kind(module)
    if kind is None:
        raise ArgumentError(f"got a module that cannot be read as a matrix: {unsupported_reason(module)}")
    return tuple(Matrix(module, kind, part) for part in kind.parts(module))


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """All matrices of a model by name: that of the module, and behind it, where a module has several, the matrix's own."""
    return {matrix.name_in(name): matrix for name, module in owners(model).items() for matrix in matrices_of(module)}


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The supported modules of a model by their first names, without those inside another supported one."""
    inner: set[nn.Module] = set()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # an outer module comes before those inside
        if module not in inner and find_kind(module) is not None:
            found[name] = module
            inner.update(child for child in module.modules() if child is not module)
    return found


def only_matrix(layer: nn.Module | Matrix) -> Matrix:
    """A matrix as it is, or the one that a module is.

    Raises
    ------
    ArgumentError
        The module's type is not supported, or it holds several.
    """
    if isinstance(layer, Matrix):
        return layer
    found = matrices_of(layer)
    if len(found) > 1:
        labels = ", ".join(matrix.part.label for matrix in found)
        raise ArgumentError(f"got a {type(layer).__name__}, which holds several matrices ({labels}); expected one of nettrim.layers.matrices(model)")
    return found[0]
