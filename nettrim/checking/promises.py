"""What a report must have promised, from the arguments of the call and from what is measured: budgets, numbers of weights, the network's bound.

The formulas are those of docs/method.md, written a second time; :mod:`nettrim.budgets`, :mod:`nettrim.patterns` and :mod:`nettrim.certificate` have
the ones that are checked by these.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from nettrim.checking.streams import Array, Measured, numbers
from nettrim.errors import ArgumentError

EPS = {"torch.float16": 2.0**-10, "torch.bfloat16": 2.0**-7, "torch.float32": 2.0**-23, "torch.float64": 2.0**-52}
_PATTERN = r"[1-9]\d{0,5}:[1-9]\d{0,5}|block:[1-9]\d{0,5}x[1-9]\d{0,5}"
_SMALLEST = {"torch.float16": 2.0**-14, "torch.bfloat16": 2.0**-126, "torch.float32": 2.0**-126, "torch.float64": 2.0**-1022}


@dataclass(frozen=True)
class Asked:
    """The arguments of the call, as a report keeps them, with the defaults of those that it does not."""

    options: Mapping[str, Any]

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Asked:
        """The options of a report, whose author is unknown.

        Raises
        ------
        ArgumentError
            One is not of its type, or out of range.
        """
        for name, good in _GOOD.items():
            value = options.get(name, _DEFAULTS.get(name))
            if not good(value):
                raise ArgumentError(f"the report's option {name}={value!r} is none that nettrim.prune takes; use a report that it made")
        return cls(options)

    def __getattr__(self, name: str) -> Any:
        return self.options.get(name, _DEFAULTS.get(name))

    def of_layer(self, argument: str, name: str, module: nn.Module) -> float | None:
        """What an argument, a number or a mapping, says of one layer; a name counts before patterns, an earlier pattern before a later one."""
        given = self.options.get(argument)
        if not isinstance(given, Mapping):
            return None if given is None else float(given)
        if name in given:
            return float(given[name])
        types = {kind.__name__ for kind in type(module).__mro__}
        for key, value in given.items():
            pattern = key.startswith("re:") and re.fullmatch(key[3:], name)
            if pattern or fnmatch.fnmatchcase(name, key) or key in types:
                return float(value)
        return None

    @property
    def counts(self) -> bool:
        """Whether a number of weights was asked for, and no budget of each layer."""
        return self.epsilon is None

    @property
    def kept_of(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return None if found is None else (int(found[1]), int(found[2]))

    @property
    def block(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"block:(\d+)x(\d+)", self.pattern)
        return None if found is None else (int(found[1]), int(found[2]))

    @property
    def shared(self) -> bool:
        """Whether one sparsity was spread over all layers, so that only their total is promised."""
        share = self.sparsity
        return self.pattern == "unstructured" and self.allocation == "auto" and isinstance(share, int | float) and 0 < share < 1

    def kept(self, entries: int, share: float) -> int:
        """How many of so many weights stay at a share of zeros: the nearest number of whole blocks, halves kept."""
        if self.kept_of is not None:
            return entries // self.kept_of[1] * self.kept_of[0]
        size = math.prod(self.block or (1, 1))
        return math.floor((1 - share) * entries / size + 0.5 + 1e-9) * size


_DEFAULTS = {
    "mode": "cascade", "gamma": 1.1, "kappa": 1.0, "consistency": "relaxed", "penalty": "l1", "reweight": 0, "pattern": "unstructured",
    "allocation": "auto", "fidelity": "layer", "repair": 1.0, "preserve_zeros": False, "tol": 1e-3, "bias_weight": 1.0, "holdout": 0.1, "seed": 0,
}  # fmt: skip


def _real(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most


def _whole(value: Any, least: int = 0) -> bool:
    return _real(value, least) and isinstance(value, int)


def _numbers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _real(item, 0) and _compiles(key) for key, item in value.items())
    return value is None or _real(value, 0)


def _compiles(key: str) -> bool:
    try:
        re.compile(key.removeprefix("re:") if key.startswith("re:") else "")
    except re.error:
        return False
    return True


_GOOD: dict[str, Callable[[Any], bool]] = {
    "epsilon": _numbers,
    "sparsity": _numbers,
    "budget": lambda value: value is None or _real(value, 0),
    "mode": lambda value: value in ("cascade", "parallel"),
    "gamma": lambda value: _real(value, 0),
    "kappa": lambda value: _real(value, 0),
    "consistency": lambda value: value in ("relaxed", "paper"),
    "penalty": lambda value: value in ("l1", "l0"),
    "reweight": _whole,
    "pattern": lambda value: value in ("unstructured", "neuron") or (isinstance(value, str) and bool(re.fullmatch(_PATTERN, value))),
    "fidelity": lambda value: value in ("network", "layer"),
    "allocation": lambda value: value in ("auto", "uniform"),
    "repair": lambda value: _real(value, 0, 1),
    "preserve_zeros": lambda value: isinstance(value, bool),
    "tol": lambda value: _real(value, 0),
    "bias_weight": lambda value: _real(value, 0),
    "holdout": lambda value: _real(value, 0) and value < 1,
    "seed": lambda value: _real(value) and isinstance(value, int) and abs(value) < 2**63,
    "max_rows": lambda value: value is None or _whole(value, 1),
}


@dataclass(frozen=True)
class Budget:
    """A layer's promise on its whole output; the part of it that the program itself is held to; and γ (κγ), where a cascade's rule sets it."""

    promise: float
    program: float
    inflation: float | None


def budget(asked: Asked, relative: float | None, measured: Measured, size: Size, relu: bool, *, last: bool) -> Budget:
    """A layer's budget. ``relative`` is what ``epsilon`` says of it; ``size`` what rounding depends on."""
    if asked.counts or relative is None:
        return Budget(math.sqrt(measured.on + measured.off) + size.noise, math.nan, None)
    own = isinstance(asked.epsilon, Mapping) or asked.mode == "parallel"
    if own or not measured.disturbed(size.kept):
        epsilon = relative * math.sqrt(measured.target_square)
        return Budget(epsilon, epsilon, None)
    inflation = asked.gamma * asked.kappa if last else asked.gamma
    if asked.consistency == "paper" and relu:
        on = inflation * measured.dense_on
        return Budget(math.sqrt(on + measured.dense_off), math.sqrt(on), max(inflation, 1.0))
    epsilon = math.sqrt(inflation * (measured.dense_on + measured.dense_off))
    return Budget(epsilon, epsilon, inflation)


@dataclass(frozen=True)
class Size:
    """What rounding depends on: ``‖Y‖_F``, ``‖|A| |W|ᵀ‖_F``, the number of outputs, the terms of each sum, and the weights' dtype."""

    output: float
    sums: float
    entries: int
    terms: int
    dtype: str

    @property
    def kept(self) -> float:
        """One unit of the dtype that programs of such weights are kept in."""
        return EPS["torch.float64" if self.dtype == "torch.float64" else "torch.float32"]

    @property
    def noise(self) -> float:
        """How far two computed outputs may lie apart where the exact ones are equal, Frobenius norm (docs/method.md)."""
        stored, summed = EPS[self.dtype], self.kept
        subnormal = math.sqrt(self.entries) * _SMALLEST[self.dtype] * stored
        return stored * self.output + subnormal + math.sqrt(self.terms) * summed * self.sums


def of_norm(value: float, noise: float, entries: int) -> float:
    """How far a norm over so many entries moves when each is rounded anew and all of it amounts to ``noise``.

    Rounding has no direction, so it adds in squares; the term beside is six standard deviations of what it does along the difference.
    """
    if not math.isfinite(value):
        return 0.0
    return math.hypot(value, noise) - value + 6 * noise / math.sqrt(max(entries, 1)) + 1e-9 * value


def size_of(module: nn.Module, measured: Measured) -> Size:
    """The size of a layer on its rows."""
    weight = module.get_parameter("weight")
    terms = weight[0].numel() + (getattr(module, "bias", None) is not None)
    return Size(math.sqrt(measured.target_square), math.sqrt(measured.sums_square), measured.entries, terms, str(weight.dtype))


@dataclass(frozen=True)
class Link:
    """A layer of a chain, for the network's bound: both modules, and of a pruned one its promise as reported and what is known of its rows."""

    dense: nn.Module
    pruned: nn.Module
    promise: float | None
    inflation: float | None
    measured: Measured | None


def network_bound(links: list[Link], mode: str) -> float | None:
    """The bound on a chain's output (docs/method.md); None where a layer that the bound passes through is no plain matrix here."""
    bound, output, entries_per_output = 0.0, 0.0, 0.0
    for link in links:
        pruned = _matrix(link.pruned)
        if pruned is None:
            return None
        weight, bias = pruned
        terms, dtype = weight.shape[1] + (bias is not None), str(link.pruned.get_parameter("weight").dtype)
        if link.measured is not None and link.promise is not None:
            size = size_of(link.pruned, link.measured)
            rows = link.measured.entries / len(weight)
            output = size.output
        elif bound == 0:
            continue
        else:
            rows = entries_per_output
            shift = 0.0 if bias is None else math.sqrt(rows) * float(np.linalg.norm(bias))
            whole = weight if bias is None else np.c_[weight, bias]
            size = Size(0.0, output * float(np.linalg.norm(whole)) + shift, round(rows * len(weight)), terms, dtype)
            output = output * _spectral(weight) + shift
        entries_per_output = rows
        twice = 1.0
        if link.promise is None:
            bound *= _spectral(weight)
        elif mode == "parallel":
            bound = _spectral(weight) * bound + link.promise
        elif link.inflation is None:
            bound = link.promise
        else:
            dense = _matrix(link.dense)
            assert dense is not None
            bound *= math.sqrt(link.inflation) * _spectral(dense[0])
            twice = 1 + math.sqrt(link.inflation)  # the dense run, too, that the budget was measured against
        bound += Size(output + bound, size.sums, size.entries, terms, dtype).noise * twice
    return bound


def _matrix(module: nn.Module) -> tuple[Array, Array | None] | None:
    """Weights and bias of a layer that is nothing but them."""
    if not isinstance(module, nn.Linear):
        return None
    return numbers(module.weight), None if module.bias is None else numbers(module.bias)


def _spectral(weight: Array) -> float:
    return float(np.linalg.norm(weight, 2))
