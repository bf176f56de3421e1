"""What a caller may ask of ``nettrim.prune``: the arguments that are neither data nor callables, refused early where they are out of range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from nettrim.errors import ArgumentError
from nettrim.patterns import parse
from nettrim.solvers import check_solver


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`nettrim.prune` by the same names."""

    epsilon: float | Mapping[str, float] | None
    sparsity: float | Mapping[str, float] | None
    budget: float | None
    pattern: str
    allocation: str
    fidelity: str
    repair: float | str
    damping: float
    preserve_zeros: bool
    mode: str
    gamma: float
    kappa: float
    consistency: str
    penalty: str
    reweight: int
    solver: str
    tol: float
    max_iter: int | None
    bias_weight: float
    holdout: float
    max_rows: int | None
    seed: int
    on_failure: str
    neurons: int | None
    recalibrate_batchnorm: bool

    def check(self) -> None:
        """Refuse what is out of range before anything is run (``epsilon`` is checked against the layers it is for).

        Raises
        ------
        ArgumentError
            Naming the argument, what was given and what was expected.
        """
        self._check_goal()
        for name, allowed in (
            ("mode", ("cascade", "parallel")),
            ("consistency", ("relaxed", "paper")),
            ("penalty", ("auto", "l0", "l1")),
            ("allocation", ("auto", "uniform")),
            ("fidelity", ("network", "diagonal", "layer")),
            ("on_failure", ("raise", "keep_dense")),
        ):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"{name}={getattr(self, name)!r}; expected {' or '.join(map(repr, allowed))}")
        only = self._only_l1()
        if self.penalty == "l0" and self.epsilon is not None and only is not None:
            raise ArgumentError(f"penalty='l0' was given with {only}; expected penalty='l1', which alone has that")
        if self.epsilon is None and self.consistency == "paper":
            raise ArgumentError("consistency='paper' was given without epsilon; expected 'relaxed': only budgets have the papers' constraints")
        if not isinstance(self.recalibrate_batchnorm, bool):
            raise ArgumentError(f"recalibrate_batchnorm={self.recalibrate_batchnorm!r}; expected True or False")
        if not isinstance(self.solver, str):
            raise ArgumentError(f"solver={self.solver!r}; expected the name of one, or 'auto'")
        check_solver(self.solver)
        self._number("gamma", lambda value: value >= 1, "a number at least 1: below it the dense weights would not be feasible")
        self._number("kappa", lambda value: 0 < value <= 1, "a number in (0, 1]")
        self._number("tol", lambda value: value > 0, "a number above 0")
        self._number("bias_weight", lambda value: value >= 0, "a number at least 0")
        self._number("holdout", lambda value: 0 <= value < 1, "a share in [0, 1), 0 to keep no sample out")
        for name in ("max_rows", "max_iter", "neurons"):
            if getattr(self, name) is not None:
                self._number(name, lambda value: isinstance(value, Integral) and int(value) >= 1, "None or a whole number, at least 1")
        self._number("reweight", lambda value: isinstance(value, Integral) and int(value) >= 0, "a whole number, 0 for the papers' objective")
        if self.epsilon is None:
            for name, default in (("reweight", 0), ("bias_weight", 1.0), ("gamma", 1.1)):
                if getattr(self, name) != default:
                    raise ArgumentError(f"{name}={getattr(self, name)!r} was given without epsilon; expected {default}: it belongs to budgets")
        if self.neurons is not None:
            self._check_neurons()
        self._number("seed", lambda value: isinstance(value, Integral) and 0 <= int(value) < 2**63, "a whole number from 0 to 2**63 - 1")
        if self.kappa != 1 and (self.mode == "parallel" or isinstance(self.epsilon, Mapping)):
            where = "mode='parallel'" if self.mode == "parallel" else "a mapping of budgets"
            raise ArgumentError(f"kappa={self.kappa} tightens the last budget that gamma sets in a cascade; with {where}, give that layer its own")

    def _only_l1(self) -> str | None:
        """What was asked for that only the papers' objective has; None for nothing."""
        if self.consistency == "paper":
            return "consistency='paper'"
        if self.reweight:
            return f"reweight={self.reweight}"
        if self.bias_weight != 1:
            return f"bias_weight={self.bias_weight}"
        if self.neurons is not None:
            return f"neurons={self.neurons}"
        return None if self.solver in ("auto", "topk_admm") else f"solver={self.solver!r}"

    def resolved(self) -> Options:
        """In plain numbers, and with the penalty that ``"auto"`` stands for: ``"l0"``, or ``"l1"`` where something was asked for that only it has."""
        plain = dataclasses.replace(self, **{name: _plain(value) for name, value in vars(self).items()})
        if plain.penalty != "auto":
            return plain
        return dataclasses.replace(plain, penalty="l0" if plain._only_l1() is None else "l1")

    def _check_goal(self) -> None:
        """What is asked for: a budget, or a number of zeros, and the options that belong to it."""
        pattern = parse(self.pattern)
        given = [name for name in ("epsilon", "sparsity", "budget") if getattr(self, name) is not None]
        if len(given) > 1 or (not given and pattern.share is None):
            values = " and ".join(f"{name}={getattr(self, name)!r}" for name in given or ("epsilon", "sparsity", "budget"))
            raise ArgumentError(f"{values}; expected exactly one of epsilon (a budget for every layer), sparsity and budget (one for the network)")
        if self.budget is not None:
            self._number("budget", lambda value: value > 0, "a number above 0")
            if pattern.share is not None:
                raise ArgumentError(f"budget={self.budget} with pattern={self.pattern!r}, which says the sparsity; expected another pattern")
        if self.repair != "auto":
            self._number("repair", lambda value: 0 <= value <= 1, "a number from 0 to 1")
        elif self.holdout == 0:
            raise ArgumentError("repair='auto' with holdout=0; expected samples kept out to choose it on")
        if self.repair != 1 and (self.epsilon is not None or self.mode == "parallel"):
            why = "a budget is promised against the dense network's output" if self.epsilon is not None else "only a cascade has two streams"
            raise ArgumentError(f"repair={self.repair!r}; expected 1 here: {why}")
        self._number("damping", lambda value: 0 <= value <= 1e9, "a number from 0 to 1e9 (noise of so many times the inputs' energy)")
        others = {"pattern": self.pattern != "unstructured", "preserve_zeros": self.preserve_zeros, "damping": self.damping != 0}
        if self.epsilon is not None and any(others.values()):
            raise ArgumentError(f"{next(name for name in others if others[name])} was given with epsilon; it goes with sparsity")
        if self.sparsity is not None and pattern.share is not None:
            shares = list(self.sparsity.values()) if isinstance(self.sparsity, Mapping) else [self.sparsity]
            if any(value != 1 - pattern.share for value in shares):
                raise ArgumentError(f"sparsity={self.sparsity!r} with pattern={self.pattern!r}, which says {1 - pattern.share:g}; leave sparsity out")

    def _check_neurons(self) -> None:
        """Which programs come apart into blocks of neurons: :mod:`nettrim.solvers.blocks`."""
        reason = None
        if self.epsilon is not None:
            if self.consistency == "paper":
                reason = "the paper's inequalities are met to a share of a budget that all neurons have together"
        elif self.pattern != "neuron" and parse(self.pattern).share is None:
            reason = f"pattern={self.pattern!r} counts weights over all neurons"
        elif self.pattern != "neuron" and self.fidelity == "network":
            reason = f"fidelity={self.fidelity!r} weighs the errors of all neurons together"
        if reason is not None:
            ways = "epsilon with penalty='l1', pattern='neuron', or 'n:m' with fidelity='layer' (or 'diagonal')"
            raise ArgumentError(f"neurons={self.neurons}: {reason}; leave it out, or ask for {ways}")

    def _number(self, name: str, good: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not good(value):
            raise ArgumentError(f"{name}={value!r}; expected {expected}")

    def describe(self) -> dict[str, object]:
        """As the report keeps them: the keys of a mapping are names, or the names of types."""
        described: dict[str, object] = dict(vars(self))
        for name in ("epsilon", "sparsity"):
            given = described[name]
            if isinstance(given, Mapping):
                described[name] = {getattr(key, "__name__", key): value for key, value in given.items()}
        return described


def _plain(value: Any) -> Any:
    """A number of any library as Python's own, those of a mapping too; all else as it is."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_device(device: object) -> None:
    """Refuse a device that holds no numbers here.

    Raises
    ------
    ArgumentError
    """
    if device is None:
        return
    try:
        torch.zeros(1, device=device).item()  # type: ignore[call-overload]
    except Exception as error:
        raise ArgumentError(
            f"device={device!r} cannot be used ({type(error).__name__}: {error}); expected None, 'cpu' or another device that torch has here"
        ) from error
