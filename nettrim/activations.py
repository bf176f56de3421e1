"""What may follow a layer: normalisation folded into it, and activations, each with what it does to a difference of its inputs.

An activation is a function of each entry alone. ``lipschitz`` is a constant L with ``|act(z) − act(y)| ≤ L|z − y|`` for all z and y, so that a budget
of ``ε/L`` on the pre-activations keeps ε on the outputs; the ReLU, ReLU6 and
Hardtanh have sets of their own (:mod:`nettrim.programs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One activation with its parameters.

    Attributes
    ----------
    name : str
    lipschitz : float
    monotone : bool
        Whether it never falls, so that it commutes with taking a maximum.
    operation : str
        Of ``torch.ops.aten``.
    arguments, options : tuple
        What the operation is called with behind the tensor.
    """

    name: str
    lipschitz: float
    monotone: bool
    operation: str = ""
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, Z: Tensor) -> Tensor:
        """Of pre-activations of any shape."""
        if self.name == "relu":
            return Z.clamp(min=0)
        done: Tensor = getattr(_ATEN, self.operation).default(Z, *self.arguments, **dict(self.options))
        return done

    @property
    def at_zero(self) -> float:
        """``|act(0)|``: with it, ``|act(z)| ≤ L|z| + |act(0)|``."""
        return abs(float(self(torch.zeros((), dtype=torch.float64))))

    @property
    def interval(self) -> tuple[float, float | None] | None:
        """The ends of an activation that is the identity between them and flat beyond (the upper one None where there is none); None for others."""
        if self.name == "relu":
            return 0.0, None
        if self.operation != "hardtanh":
            return None
        low = self.arguments[0] if self.arguments else -1.0
        high = self.arguments[1] if len(self.arguments) > 1 else 1.0
        return (float(low), float(high)) if not self.options else None


RELU = Activation("relu", 1.0, True)


def _slope(arguments: tuple[Any, ...], options: dict[str, Any]) -> float | None:
    """Of LeakyReLU: the larger of its two slopes; None where it falls on one side."""
    slope = float(arguments[0] if arguments else options.get("negative_slope", 0.01))
    return max(1.0, slope) if slope >= 0 else None


def _elu(arguments: tuple[Any, ...], options: dict[str, Any]) -> float | None:
    if options or len(arguments) > 1:
        return None  # SELU and CELU call it with scales of their own
    return max(1.0, abs(float(arguments[0]))) if arguments else 1.0


def _constant(value: float) -> Callable[[tuple[Any, ...], dict[str, Any]], float | None]:
    return lambda arguments, options: value


# the largest slope, rounded up; for the smooth ones at z = √2 (GELU), 2.3994 (SiLU), 1.4906 (Mish)
_FOUND: dict[str, tuple[Callable[[tuple[Any, ...], dict[str, Any]], float | None], bool]] = {
    "hardtanh": (_constant(1.0), True),  # ReLU6 is hardtanh from 0 to 6
    "leaky_relu": (_slope, True),
    "elu": (_elu, True),
    "tanh": (_constant(1.0), True),
    "sigmoid": (_constant(0.25), True),
    "hardsigmoid": (_constant(1 / 6), True),
    "gelu": (_constant(1.13), False),
    "silu": (_constant(1.1), False),
    "mish": (_constant(1.09), False),
    "hardswish": (_constant(1.5), False),
}


def find(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
    """The activation that an operation of ``torch.ops.aten`` is, if it is one that is known."""
    if _is_relu(func, args, kwargs):
        return RELU
    name = str(getattr(func, "_schema", func)).partition("(")[0].removeprefix("aten::").partition(".")[0].removesuffix("_")
    if name not in _FOUND or getattr(_ATEN, name, None) is None:
        return None
    slope, monotone = _FOUND[name]
    lipschitz = slope(args[1:], kwargs)
    if lipschitz is None:
        return None
    shown = "relu6" if name == "hardtanh" and tuple(args[1:]) == (0, 6) else name
    return Activation(shown, lipschitz, monotone, name, tuple(args[1:]), tuple(sorted(kwargs.items())))


def _is_relu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func in (_ATEN.relu.default, _ATEN.relu_.default):
        return True
    if func in (_ATEN.clamp.default, _ATEN.clamp_.default, _ATEN.clamp_min.default, _ATEN.clamp_min_.default):
        low = args[1] if len(args) > 1 else kwargs.get("min")
        high = args[2] if len(args) > 2 else kwargs.get("max")
        return low is not None and low == 0 and high is None
    return func in (_ATEN.threshold.default, _ATEN.threshold_.default) and tuple(args[1:]) == (0, 0)


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation that is one scale and one shift of each output: ``s z + t``, of an eval-mode BatchNorm.

    Attributes
    ----------
    scale, shift : Tensor, (M,) float64
    """

    scale: Tensor
    shift: Tensor

    def same_as(self, other: Norm) -> bool:
        return torch.equal(self.scale, other.scale) and torch.equal(self.shift, other.shift)


def output(Z: Tensor, norm: Norm | None, function: Activation | None) -> Tensor:
    """What becomes of pre-activations (p, M) behind a layer: ``act(s z + t)``, in their dtype."""
    if norm is not None:
        Z = (Z.double() * norm.scale.to(Z.device) + norm.shift.to(Z.device)).to(Z.dtype)
    return Z if function is None else function(Z)


def find_norm(func: Any, args: tuple[Any, ...]) -> Norm | None:
    """The scale and shift that an operation applies to the second dimension of its first argument, if it is an eval-mode BatchNorm."""
    name = str(getattr(func, "_schema", func)).partition("(")[0].removeprefix("aten::").partition(".")[0]
    if name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"):
        _, weight, bias, mean, variance, training, _, eps = args[:8]
        if training:
            return None
    elif name in ("_native_batch_norm_legit_no_training", "_batch_norm_no_update"):
        _, weight, bias, mean, variance, _, eps = args[:7]
    else:
        return None
    if mean is None or variance is None:
        return None
    scale = (variance.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return Norm(scale.detach(), (shift if bias is None else shift + bias.double()).detach())
