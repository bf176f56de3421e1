"""A module as matrices: its input and output as rows, its weights as one matrix, and that matrix written back.

One entry of `_KINDS` holds all that is particular to a module type; the rest of the package sees matrices only. The
orientation is that of torch: weights are ``(M, N)``, samples are rows. A bias is the last column of the weights, and
the rows of inputs then end in a one, so that ``Z = A Wᵀ`` holds with and without a bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nettrim.errors import ArgumentError
from nettrim.sharing import turn

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROWS_PER_CHUNK = 4096


@dataclass(frozen=True)
class _Kind:
    """How one module type is read as ``Z = A Wᵀ``: inputs and outputs as rows, and its own forward on such rows."""

    forward: Callable[..., Tensor]  # what the type's `forward` must be: an override may compute anything
    input_rows: Callable[[nn.Module, Tensor], Tensor]  # (..) -> (P, N without the bias column)
    output_rows: Callable[[nn.Module, Tensor], Tensor]  # (..) -> (P, M)
    run_rows: Callable[[nn.Module, Tensor], Tensor]  # (P, N without the bias column) -> (P, M)


def _last_dimension_rows(module: nn.Module, x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.reshape(1, -1)


_KINDS: dict[type[nn.Module], _Kind] = {
    nn.Linear: _Kind(
        forward=nn.Linear.forward,
        input_rows=_last_dimension_rows,
        output_rows=_last_dimension_rows,
        run_rows=lambda module, rows: nn.Linear.forward(module, rows),  # type: ignore[arg-type]
    ),
}


def _find_kind(module: nn.Module) -> _Kind | None:
    for module_type, kind in _KINDS.items():
        # an instance attribute named `forward` replaces the method too (some libraries hook modules that way)
        if isinstance(module, module_type) and type(module).forward is kind.forward and "forward" not in vars(module):
            return kind
    return None


def _kind(module: nn.Module) -> _Kind:
    kind = _find_kind(module)
    if kind is None:
        raise ArgumentError(f"got a module that cannot be read as a matrix: {unsupported_reason(module)}")
    return kind


def is_supported(module: nn.Module) -> bool:
    """Whether the module's type, and the forward it runs, are ones that nettrim reads as a matrix.

    A subclass counts when it inherits `forward` unchanged.
    """
    return _find_kind(module) is not None


def unsupported_reason(module: nn.Module) -> str:
    """Say why a module that holds weights is not one that nettrim reads as a matrix."""
    names = " or ".join(f"nn.{module_type.__name__}" for module_type in _KINDS)
    for module_type in _KINDS:
        if isinstance(module, module_type):
            return f"{type(module).__name__} replaces nn.{module_type.__name__}'s forward: what it computes is unknown"
    return f"{type(module).__name__} is not a supported layer type ({names})"


def parameter_reason(module: nn.Module) -> str | None:
    """Say why a supported layer's parameters cannot be pruned (reparametrised, empty); None when they can."""
    for key in ("weight", "bias"):
        if key not in module._parameters:
            return (
                f"its {key} is computed from other parameters (a parametrization, weight norm or pruning mask); "
                "make it permanent first (e.g. torch.nn.utils.parametrize.remove_parametrizations)"
            )
    weight = module._parameters["weight"]
    if weight is None or weight.numel() == 0:
        return f"empty: its weight has shape {None if weight is None else tuple(weight.shape)}"
    return None


def check_parameters(model: nn.Module) -> None:
    """Refuse a model whose parameters cannot be computed with.

    Raises
    ------
    ArgumentError
        Naming the parameter: on the meta device, not initialised, quantised, of another dtype than float16, bfloat16,
        float32 or float64 in a layer, or holding NaN or infinity in a layer. Nothing is changed.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ArgumentError(f"parameter {name!r} is not initialised yet; run the model on one batch first")
        if tensor.is_meta:
            raise ArgumentError(f"parameter {name!r} is on the meta device and holds no values; load its weights first")
    for key, value in model.state_dict().items():
        # quantised modules keep their weights out of `parameters()`, packed in tuples of the state dict
        packed = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(item, Tensor) and item.is_quantized for item in packed):
            raise ArgumentError(f"parameter {key!r} is quantised; give the floating-point model and quantise it after")
    for layer_name, module in model.named_modules():
        if not any(isinstance(module, module_type) for module_type in _KINDS):
            continue
        for name, parameter in module.named_parameters(prefix=layer_name):
            if parameter.dtype not in WEIGHT_DTYPES or type(parameter.data) not in (Tensor, nn.Parameter):
                raise ArgumentError(
                    f"parameter {name!r} has dtype {parameter.dtype} in a {type(parameter.data).__name__}; expected a "
                    "plain float16, bfloat16, float32 or float64 tensor: give the model before quantisation"
                )
            bad = int((~torch.isfinite(parameter)).sum())
            if bad:
                raise ArgumentError(
                    f"parameter {name!r} holds {bad} NaN or infinite value(s) among {parameter.numel()}; expected "
                    "finite weights: check how the model was trained or loaded"
                )


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Dtype that a layer's program is solved in: float64 for float64 weights, float32 for all others."""
    return torch.float64 if _weight(module).dtype == torch.float64 else torch.float32


def has_bias(module: nn.Module) -> bool:
    """Whether the layer's matrix ends in a bias column."""
    return getattr(module, "bias", None) is not None


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ArgumentError(f"got a layer whose weight cannot be written: {parameter_reason(module)}")
    return weight


def as_matrix(module: nn.Module) -> Tensor:
    """The layer's weights as one matrix, the bias as its last column.

    Parameters
    ----------
    module : nn.Module
        A supported layer (see `is_supported`).

    Returns
    -------
    Tensor, shape (M, N)
        A copy, in the parameter's dtype and on its device; N counts the bias column.

    Raises
    ------
    ArgumentError
        The module's type is not supported.

    See Also
    --------
    write_back : the inverse.
    """
    _kind(module)
    weight = _weight(module).detach()
    matrix = weight.reshape(weight.shape[0], -1)
    if not has_bias(module):
        return matrix.clone()
    return torch.cat([matrix, module.get_parameter("bias").detach()[:, None]], dim=1)


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


def nonzeros(module: nn.Module) -> Tensor:
    """Which entries of the matrix (M, N) are not zero; a bias always counts as such."""
    mask = as_matrix(module) != 0
    if has_bias(module):
        mask[:, -1] = True
    return mask


def write_back(module: nn.Module, matrix: Tensor) -> None:
    """Write a matrix into the layer's parameters, in place: the inverse of `as_matrix`, bit for bit.

    Parameters
    ----------
    module : nn.Module
        A supported layer. Its `Parameter` objects stay the same ones.
    matrix : Tensor, shape (M, N)
        In any floating dtype, on any device; rounded to the parameter's dtype.

    Raises
    ------
    ArgumentError
        Wrong shape, NaN or infinity, or a finite value beyond the range of the parameter's dtype (the parameter is
        named). Nothing is written then.
    """
    _kind(module)
    weight = _weight(module)
    columns = weight[0].numel() + has_bias(module)
    if matrix.shape != (weight.shape[0], columns):
        raise ArgumentError(f"got a matrix of shape {tuple(matrix.shape)}; expected {(weight.shape[0], columns)}")
    pieces: dict[str, Tensor] = {"weight": matrix}
    if has_bias(module):
        pieces = {"weight": matrix[:, :-1], "bias": matrix[:, -1]}
    written: list[tuple[Tensor, Tensor]] = []
    for key, piece in pieces.items():  # all checks first: a refused matrix leaves the layer whole
        target = module.get_parameter(key)
        if not torch.isfinite(piece).all():
            raise ArgumentError(f"the matrix for {key!r} holds NaN or infinity; expected finite values")
        value = piece.detach().to(device=target.device, dtype=target.dtype).reshape(target.shape)
        if not torch.isfinite(value).all():
            raise ArgumentError(
                f"a value of size {float(piece.abs().max()):.4g} for {key!r} is beyond the range of {target.dtype} "
                f"(largest {torch.finfo(target.dtype).max:.4g}); rescale the layer or use a wider dtype"
            )
        written.append((target, value))
    with torch.no_grad():
        for parameter, value in written:
            parameter.copy_(value)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The layer's input as rows of ``A``, a column of ones appended when the layer has a bias.

    Parameters
    ----------
    module : nn.Module
        A supported layer.
    x : Tensor, shape (..., in_features)
        What the layer's forward was called with.

    Returns
    -------
    Tensor, shape (P, N)
        In the dtype of `x`; may share its memory when there is no bias.
    """
    rows = _kind(module).input_rows(module, x)
    if not has_bias(module):
        return rows
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)


def output_rows(module: nn.Module, out: Tensor) -> Tensor:
    """The layer's output as rows of ``Z``: shape (..., out_features) to (P, M); may share memory with `out`."""
    return _kind(module).output_rows(module, out)


@torch.no_grad()
def forward_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Run the stored layer's own forward on rows of ``A``.

    The rows are rounded to the parameter's dtype first, which is exact for rows that a layer of that dtype was given
    and that were captured in a wider one. Hooks are not run.

    Parameters
    ----------
    module : nn.Module
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
    kind, weight = _kind(module), _weight(module)
    columns = weight[0].numel()
    if rows.dim() != 2 or rows.shape[1] != columns + has_bias(module):
        raise ArgumentError(
            f"got rows of shape {tuple(rows.shape)}; expected (P, {columns + has_bias(module)}), the inputs"
            + (" and a column of ones" if has_bias(module) else "")
        )
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=compute_dtype(module), device=rows.device)
    for start in range(0, rows.shape[0], ROWS_PER_CHUNK):
        chunk = rows[start : start + ROWS_PER_CHUNK, :columns].to(device=weight.device, dtype=weight.dtype)
        out[start : start + ROWS_PER_CHUNK] = kind.run_rows(module, chunk)
    return out
