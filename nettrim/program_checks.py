"""What a layer program may be given: its arguments refused where they are not as described, and turned into what the program computes with."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from nettrim.errors import ArgumentError
from nettrim.metrics import Metric
from nettrim.rows import Rows, as_rows

_SMALLEST, _LARGEST = 1e-150, 1e150
_INDEFINITE = 1e-5  # of a metric's largest row sum: an eigenvalue so far below 0 is no rounding


def one_level(epsilon: object, regularization: object, nonzeros: object) -> None:
    """Refuse anything but exactly one of the three."""
    levels = {"epsilon": epsilon, "regularization": regularization, "nonzeros": nonzeros}
    given = [name for name, value in levels.items() if value is not None]
    if len(given) != 1:
        raise ArgumentError(
            f"{' and '.join(given) or 'nothing'} given; expected exactly one of epsilon (a budget), regularization (a penalty) and nonzeros"
        )


def level(name: str, given: object) -> float:
    """``epsilon`` or ``regularization`` as a number; a tensor that holds one is one."""
    expected = f"expected a finite number {'at least' if name == 'epsilon' else 'above'} 0"
    single = isinstance(given, Tensor) and given.numel() == 1 and not given.is_complex() and given.dtype != torch.bool
    if not single and (isinstance(given, bool) or not isinstance(given, Real)):
        raise ArgumentError(f"{name}={given!r}; {expected}")
    value = float(given)  # type: ignore[arg-type]
    if not math.isfinite(value) or value < 0 or (value == 0 and name != "epsilon"):
        raise ArgumentError(f"{name}={value}; {expected}")
    if value != 0 and not _SMALLEST <= value <= _LARGEST:
        raise ArgumentError(f"{name}={value}; expected one whose square float64 holds, from {_SMALLEST:g} to {_LARGEST:g}: scale the data")
    return value


def floor(given: object, rows: Rows) -> Tensor:
    """The lower end of every neuron's ReLU, (M,), in the rows' dtype."""
    found = as_rows(given, "floor").to(rows.device, rows.dtype)
    if found.shape != (rows.outputs,):
        raise ArgumentError(f"floor has shape {tuple(found.shape)}; expected ({rows.outputs},), one for each neuron")
    return found


def ceiling(given: object, floor: Tensor | None, rows: Rows) -> Tensor:
    """The upper end of every neuron's ReLU, (M,), in the rows' dtype; no target is above it."""
    found = as_rows(given, "ceiling").to(rows.device, rows.dtype)
    if found.shape != (rows.outputs,) or bool((found <= (0 if floor is None else floor)).any()):
        raise ArgumentError(f"ceiling has shape {tuple(found.shape)}; expected ({rows.outputs},), one for each neuron, above its floor")
    if any(bool((Y > found).any()) for _, Y, _ in rows.target_chunks(rows.dtype)):
        raise ArgumentError("targets hold numbers above the ceiling; expected outputs after the activation")
    return found


def l1_weights(given: object, rows: Rows) -> Tensor:
    """``ω``, (N,) or (M, N), in the rows' dtype; 1 where nothing is given."""
    M, N = rows.outputs, rows.width
    like = torch.empty(0, dtype=rows.dtype, device=rows.device)
    if given is None or (isinstance(given, Real) and not isinstance(given, bool)):
        given = torch.full((N,), 1.0 if given is None else float(given))
    omega = as_rows(given, "l1_weights", like)
    if omega.shape not in ((N,), (M, N)):
        raise ArgumentError(f"l1_weights have shape {tuple(omega.shape)}; expected a number, ({N},) or ({M}, {N})")
    if bool((omega < 0).any()):
        raise ArgumentError("l1_weights hold negative numbers; the objective would not be convex")
    return omega


def support(given: object, shape: tuple[int, int]) -> Tensor | None:
    """The only weights that may be kept, (M, N) bool."""
    found = torch.tensor(given) if isinstance(given, np.ndarray) and given.dtype == np.bool_ else given
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.dtype != torch.bool or tuple(found.shape) != shape:
        is_array = isinstance(found, Tensor | np.ndarray)
        what = f"{type(found).__name__} of {found.dtype} {tuple(found.shape)}" if is_array else type(found).__name__  # type: ignore[attr-defined]
        raise ArgumentError(f"support is a {what}; expected a tensor or a numpy array of bool {shape}")
    return found


def metric(given: object, outputs: int, like: Tensor) -> Metric:
    """``S`` on the device and in the dtype of ``like``."""
    if isinstance(given, Metric):
        return given.to(like)
    found = as_rows(given, "metric", like)
    if found.shape not in ((outputs,), (outputs, outputs)):
        raise ArgumentError(f"metric has shape {tuple(found.shape)}; expected ({outputs}, {outputs}) or ({outputs},)")
    diagonal = found if found.ndim == 1 else found.diagonal()
    good = bool((diagonal > 0).all())
    if good and found.ndim == 2:
        good = torch.allclose(found, found.T, rtol=1e-5) and _semidefinite(found)
    if not good:
        raise ArgumentError("metric is no inner product; expected a symmetric positive semidefinite matrix with a positive diagonal")
    return Metric.of(found)


def _semidefinite(S: Tensor) -> bool:
    """Whether a symmetric matrix has no eigenvalue below 0 by more than rounding: then it has a Cholesky factor once that much is added."""
    lifted = S + _INDEFINITE * float(S.abs().sum(1).max()) * torch.eye(len(S), dtype=S.dtype, device=S.device)
    return int(torch.linalg.cholesky_ex(lifted).info) == 0
