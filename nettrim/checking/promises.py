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
import torch
from torch import nn

from nettrim.checking.behind import Behind
from nettrim.checking.streams import LayerPair, Measured, numbers
from nettrim.errors import ArgumentError
from nettrim.layers import Matrix

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
    "allocation": "auto", "fidelity": "layer", "repair": 1.0, "damping": 0.0, "preserve_zeros": False, "tol": 1e-3, "bias_weight": 1.0,
    "holdout": 0.1, "seed": 0, "recalibrate_batchnorm": False,
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
    "fidelity": lambda value: value in ("network", "diagonal", "layer"),
    "allocation": lambda value: value in ("auto", "uniform"),
    "repair": lambda value: _real(value, 0, 1),
    "damping": lambda value: _real(value, 0),
    "preserve_zeros": lambda value: isinstance(value, bool),
    "tol": lambda value: _real(value, 0),
    "bias_weight": lambda value: _real(value, 0),
    "holdout": lambda value: _real(value, 0) and value < 1,
    "seed": lambda value: _real(value) and isinstance(value, int) and abs(value) < 2**63,
    "recalibrate_batchnorm": lambda value: isinstance(value, bool),
    "max_rows": lambda value: value is None or _whole(value, 1),
}


@dataclass(frozen=True)
class Budget:
    """A layer's promise on its whole output; the part of it that the program itself is held to; and γ (κγ), where a cascade's rule sets it."""

    promise: float
    program: float
    inflation: float | None


def budget(asked: Asked, relative: float | None, pair: LayerPair, *, last: bool) -> Budget:
    """A layer's budget. ``relative`` is what ``epsilon`` says of it."""
    measured, solved, size, behind = pair.measured, pair.solved, size_of(pair), pair.behind
    if asked.counts or relative is None:
        return Budget(behind.lipschitz * math.sqrt(measured.on + measured.off) + size.noise, math.nan, None)
    own = isinstance(asked.epsilon, Mapping) or asked.mode == "parallel"
    if own or not measured.disturbed(size.kept):
        promise, program = (relative * math.sqrt(found.target_square) for found in (measured, solved))
        return Budget(promise, program / behind.lipschitz, None)
    inflation = asked.gamma * asked.kappa if last else asked.gamma
    if asked.consistency == "paper" and behind.relu and not behind.capped:
        promise = math.sqrt(inflation * measured.dense_on + measured.dense_off)
        return Budget(promise, math.sqrt(inflation * solved.dense_on), max(inflation, 1.0))
    promise, program = (math.sqrt(inflation * (found.dense_on + found.dense_off)) for found in (measured, solved))
    return Budget(behind.lipschitz * promise, program, inflation)


@dataclass(frozen=True)
class Size:
    """What rounding depends on: ``‖Y‖_F``, ``‖|A| |W|ᵀ‖_F``, the number of outputs, the terms of each sum, the weights' dtype, and ``Σ y⁴``."""

    output: float
    sums: float
    entries: int
    terms: int
    dtype: str
    fourth: float = 0.0

    @property
    def alike(self) -> float:
        """How many outputs of one size would have these moments, ``(Σ y²)² / Σ y⁴``: few where some samples are far larger than the others."""
        return (self.output / self.fourth**0.25) ** 4 if 0 < self.fourth < math.inf else 1.0

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


def of_norm(value: float, noise: float, size: Size) -> float:
    """How far the norm of a difference from the layer's output moves when each entry is rounded anew and all of it amounts to ``noise``.

    What is rounded is no larger than the output and the difference together. Rounding has no direction, so it adds in squares; the term beside is six
    standard deviations of what it does along the difference. It cannot move it by more than all of it.
    """
    if not math.isfinite(value):
        return 0.0
    noise += EPS[size.dtype] * value
    return min(math.hypot(value, noise) - value + 6 * noise / math.sqrt(max(size.alike, 1)), noise) + 1e-9 * value


def size_of(pair: LayerPair, measured: Measured | None = None, *, before: bool = False) -> Size:
    """The size of a layer's output on its rows; on other rows than all of them if they are given; ``before`` its activation, if that is wanted."""
    found = pair.measured if measured is None else measured
    terms = pair.pruned.shape[1] + pair.pruned.has_bias
    square, fourth = (found.before_square, found.before_fourth) if before else (found.target_square, found.target_fourth)
    return Size(math.sqrt(square), math.sqrt(found.sums_square), found.entries, terms, str(pair.pruned.weight.dtype), fourth)


@dataclass(frozen=True, eq=False)
class Link:
    """A layer of a chain, for the network's bound: both matrices, what follows them, and of a pruned one its promise and what is known of its rows.

    ``spread`` is by what factor its rows can differ more than its inputs do, and ``rows`` how many there are.
    """

    dense: Matrix
    pruned: Matrix
    behind: Behind
    spread: float
    rows: int
    promise: float | None = None
    inflation: float | None = None
    size: Size | None = None

    def reach(self, matrix: Matrix) -> float:
        """By what factor the outputs of one of the two can differ more than its inputs do."""
        weight = self.behind.folded(numbers(matrix.weights()))
        largest = max(float(np.linalg.norm(block, 2)) for block in np.split(weight, matrix.groups))
        return largest * self.spread * self.behind.lipschitz


def network_bound(links: list[Link], mode: str) -> float:
    """The bound on a chain's output (docs/method.md)."""
    bound, output = 0.0, 0.0
    for link in links:
        size = link.size
        if size is not None and link.promise is not None:
            output = size.output
        elif bound == 0:
            continue
        else:
            size, output = _passed(link, output)
        twice = 1.0
        if link.promise is None:
            bound *= link.reach(link.pruned)
        elif mode == "parallel":
            bound = link.reach(link.pruned) * bound + link.promise
        elif link.inflation is None:
            bound = link.promise
        else:
            bound *= math.sqrt(link.inflation) * link.reach(link.dense)
            twice = 1 + math.sqrt(link.inflation)  # the dense run, too, that the budget was measured against
        bound += Size(output + bound, size.sums, size.entries, size.terms, size.dtype).noise * twice
    return bound


def _passed(link: Link, output: float) -> tuple[Size, float]:
    """The size of a layer that was not pruned, and of its output, at most, where ``output`` is that of the layer before."""
    matrix, behind = link.pruned, link.behind
    M, N = matrix.shape
    bias = matrix.bias()
    constant = np.zeros(M) if bias is None else numbers(bias)
    if behind.scale is not None:
        constant = constant * behind.scale + behind.shift
    shift = behind.lipschitz * math.sqrt(link.rows) * float(np.linalg.norm(constant))
    sums = behind.lipschitz * output * link.spread * float(np.linalg.norm(behind.folded(numbers(matrix.weights())))) + shift
    size = Size(0.0, sums, link.rows * M, N + matrix.has_bias, str(matrix.weight.dtype))
    at_zero = math.sqrt(link.rows * M) * float(abs(behind.function(torch.zeros(1, dtype=torch.float64)))) if behind.function is not None else 0.0
    return size, output * link.reach(matrix) + shift + at_zero
