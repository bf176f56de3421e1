"""A module as matrices: its input and output as rows, its weights as matrices, and those written back.

One entry of the registry holds all that is particular to a module type (:func:`register`, docs/layers.md); the rest of the package sees matrices
only. Every function that takes a layer takes a module that is one matrix, or a :class:`Matrix` of one that holds several.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nettrim.errors import ArgumentError
from nettrim.layers import attention, convolution, linear, recurrent
from nettrim.layers.base import Call, Kind, Part, find_kind, is_registered, register, unsupported_reason
from nettrim.layers.views import ROWS_PER_CHUNK, Matrix, matrices, matrices_of, only_matrix, owners
from nettrim.precision import all_finite
from nettrim.sharing import turn

__all__ = [
    "ROWS_PER_CHUNK",
    "WEIGHT_DTYPES",
    "Call",
    "Kind",
    "Matrix",
    "Part",
    "as_matrix",
    "attention",
    "check_parameters",
    "compute_dtype",
    "convolution",
    "copy_of",
    "find_kind",
    "forward_rows",
    "has_bias",
    "input_rows",
    "is_supported",
    "linear",
    "matrices",
    "matrices_of",
    "matrix",
    "nonzeros",
    "only_matrix",
    "output_rows",
    "owners",
    "parameter_reason",
    "recurrent",
    "register",
    "unsupported_reason",
    "write_back",
]

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_supported(module: nn.Module) -> bool:
    """Whether the module's type, and the forward it runs, are ones that nettrim reads as matrices.

    A subclass counts when it inherits `forward` unchanged.
    """
    return find_kind(module) is not None


def matrix(model: nn.Module, name: str) -> Matrix:
    """The matrix of a model that has that name in reports.

    Raises
    ------
    ArgumentError
        There is none.
    """
    found = matrices(model)
    if name not in found:
        raise ArgumentError(f"the model has no matrix {name!r}; expected one of {', '.join(found) or 'none: it has no supported layer'}")
    return found[name]


def parameter_reason(module: nn.Module) -> str | None:
    """Say why a supported layer's parameters cannot be pruned (reparametrised, empty); None when they can."""
    for found in matrices_of(module):
        for name in found.parameter_names():
            path, _, key = name.rpartition(".")
            if key not in module.get_submodule(path)._parameters:
                return (
                    f"its {name} is computed from other parameters (a parametrization, weight norm or pruning mask); "
                    "make it permanent first (e.g. torch.nn.utils.parametrize.remove_parametrizations)"
                )
        if found.weight.numel() == 0:
            return f"empty: its {found.part.weight} has shape {tuple(found.weight.shape)}"
    return None


def check_initialised(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers that have no values yet.

    Raises
    ------
    ArgumentError
        Naming the first.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ArgumentError(f"parameter {name!r} is not initialised yet; run the model on one batch first")
        if tensor.is_meta:
            raise ArgumentError(f"parameter {name!r} is on the meta device and holds no values; load its weights first")


def check_parameters(model: nn.Module) -> None:
    """Refuse a model whose parameters cannot be computed with.

    Raises
    ------
    ArgumentError
        Naming the parameter: on the meta device, not initialised, quantised, of another dtype than float16, bfloat16,
        float32 or float64 in a layer, or holding NaN or infinity in a layer. Nothing is changed.
    """
    check_initialised(model)
    for key, value in model.state_dict().items():
        # quantised modules keep their weights out of `parameters()`, packed in tuples of the state dict
        packed = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(item, Tensor) and item.is_quantized for item in packed):
            raise ArgumentError(f"parameter {key!r} is quantised; give the floating-point model and quantise it after")
    for layer_name, module in model.named_modules():
        if not is_registered(module):
            continue
        for name, parameter in module.named_parameters(prefix=layer_name):
            if parameter.dtype not in WEIGHT_DTYPES or type(parameter.data) not in (Tensor, nn.Parameter):
                raise ArgumentError(
                    f"parameter {name!r} has dtype {parameter.dtype} in a {type(parameter.data).__name__}; expected a "
                    "plain float16, bfloat16, float32 or float64 tensor: give the model before quantisation"
                )
            if not all_finite(parameter.detach()):
                bad = int((~torch.isfinite(parameter)).sum())
                raise ArgumentError(
                    f"parameter {name!r} holds {bad} NaN or infinite value(s) among {parameter.numel()}; expected "
                    "finite weights: check how the model was trained or loaded"
                )


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises
    ------
    ArgumentError
        The model cannot be copied.
    """
    try:
        with turn():  # without the hooks and flags of a thread that is running it
            return copy.deepcopy(model)
    except Exception as error:
        raise ArgumentError(
            f"the model cannot be copied ({type(error).__name__}: {error}); expected a module that copy.deepcopy takes: "
            "drop what it caches, e.g. tensors that carry gradients"
        ) from error


def compute_dtype(layer: nn.Module | Matrix) -> torch.dtype:
    """Dtype that a layer's program is solved in: float64 for float64 weights, float32 for all others."""
    return only_matrix(layer).compute_dtype


def has_bias(layer: nn.Module | Matrix) -> bool:
    """Whether the layer's matrix ends in a bias column."""
    return only_matrix(layer).has_bias


def as_matrix(layer: nn.Module | Matrix) -> Tensor:
    """The layer's weights as one matrix, the bias as its last column.

    Parameters
    ----------
    layer : nn.Module or Matrix
        A supported layer (see `is_supported`).

    Returns
    -------
    Tensor, shape (M, N)
        A copy, in the parameter's dtype and on its device; N counts the bias column.

    Raises
    ------
    ArgumentError
        The module's type is not supported, or it holds several matrices.

    See Also
    --------
    write_back : the inverse.
    """
    return only_matrix(layer).as_matrix()


def nonzeros(layer: nn.Module | Matrix) -> Tensor:
    """Which entries of the matrix (M, N) are not zero; a bias always counts as such."""
    mask = as_matrix(layer) != 0
    if has_bias(layer):
        mask[:, -1] = True
    return mask


def write_back(layer: nn.Module | Matrix, matrix: Tensor) -> None:
    """Write a matrix into the layer's parameters, in place: the inverse of `as_matrix`, bit for bit.

    Parameters
    ----------
    layer : nn.Module or Matrix
        A supported layer. Its `Parameter` objects stay the same ones.
    matrix : Tensor, shape (M, N)
        In any floating dtype, on any device; rounded to the parameter's dtype.

    Raises
    ------
    ArgumentError
        Wrong shape, NaN or infinity, or a finite value beyond the range of the parameter's dtype (the parameter is
        named). Nothing is written then.
    """
    only_matrix(layer).write_back(matrix)


def input_rows(layer: nn.Module | Matrix, *args: object, out: object = None, **kwargs: object) -> Tensor:
    """The input that a layer's forward was called with as rows of ``A``, a column of ones appended when the layer has a bias.

    Parameters
    ----------
    layer : nn.Module or Matrix
        A supported layer.
    args : object
        What its forward was called with.
    out : object, optional
        What that returned; only layers whose rows depend on it (transposed convolutions) need it.
    kwargs : object
        What its forward was called with by name.

    Returns
    -------
    Tensor, shape (P, N)
        In the dtype of the input; may share its memory when there is no bias. The rows of a grouped layer are those of its groups side by side.
    """
    return only_matrix(layer).input_rows(Call(args, kwargs, out))


def output_rows(layer: nn.Module | Matrix, out: object) -> Tensor:
    """The layer's output as rows of ``Z``, (P, M); may share memory with `out`."""
    return only_matrix(layer).output_rows(Call((), {}, out))


def forward_rows(layer: nn.Module | Matrix, rows: Tensor) -> Tensor:
    """Run the stored weights on rows of ``A``.

    The rows are rounded to the parameter's dtype first, which is exact for rows that a layer of that dtype was given
    and that were captured in a wider one. Hooks are not run.

    Parameters
    ----------
    layer : nn.Module or Matrix
        A supported layer.
    rows : Tensor, shape (P, N)
        With the column of ones when the layer has a bias (it is not read: the layer adds its own bias).

    Returns
    -------
    Tensor, shape (P, M)
        In the compute dtype (`compute_dtype`), on the device of `rows`.

    Raises
    ------
    ArgumentError
        `rows` has another number of columns than the layer's matrix.
    """
    return only_matrix(layer).forward_rows(rows)
