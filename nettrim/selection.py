"""Which layers a user means: qualified names, globs, ``"re:..."`` and module types, and the options that are given by them."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real

from torch import nn

from nettrim.errors import ArgumentError
from nettrim.tracing import Trace

Pattern = str | type[nn.Module]


def matches(pattern: Pattern, name: str, module: nn.Module, owner: str | None = None) -> bool:
    """Whether ``pattern`` means the layer ``name``: its type, ``"re:<full match>"``, a glob, or the name itself.

    Of a module ``owner`` that holds several layers, its name means all of them.
    """
    if owner is not None and owner != name and matches(pattern, owner, module):
        return True
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ArgumentError(f"pattern {pattern!r} is no regular expression: {error}") from error
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _check(patterns: Iterable[object], argument: str, known: Mapping[str, tuple[nn.Module, str]]) -> list[Pattern]:
    checked: list[Pattern] = []
    for pattern in patterns:
        if not (isinstance(pattern, str) or (isinstance(pattern, type) and issubclass(pattern, nn.Module))):
            raise ArgumentError(f"{argument} holds {pattern!r}; expected a name, a glob, 're:...' or a module type")
        if not any(matches(pattern, name, *found) for name, found in known.items()):
            raise ArgumentError(
                f"{argument}: {pattern!r} matches no module of the model; layers that could be meant: {', '.join(known) or 'none'}"
            )
        checked.append(pattern)
    return checked


def select(
    model: nn.Module, trace: Trace, targets: Iterable[Pattern] | Pattern | None, ignore: Iterable[Pattern] | Pattern
) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to prune, in execution order, and the reason for every other layer.

    Raises
    ------
    ArgumentError
        A pattern that matches nothing, or nothing left to prune (the reasons are given).
    """
    traced = {layer.name: layer for layer in trace.layers}
    modules = dict(model.named_modules())  # a model's own parameters are skipped under its type's name
    known = {name: (modules.get(name, model), name) for name in trace.skipped}
    known |= {name: (layer.module, layer.module_name) for name, layer in traced.items()}
    wanted = None if targets is None else _check(listed(targets, "targets"), "targets", known)
    unwanted = _check(listed(ignore, "ignore"), "ignore", known)
    chosen: list[str] = []
    skipped = dict(trace.skipped)
    for name, layer in traced.items():
        if any(matches(pattern, name, *known[name]) for pattern in unwanted):
            skipped[name] = "ignored, as asked"
        elif wanted is not None and not any(matches(pattern, name, *known[name]) for pattern in wanted):
            skipped[name] = "not among the targets"
        elif layer.skip_reason is not None:
            skipped[name] = layer.skip_reason
        else:
            chosen.append(name)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no layers with weights"
        raise ArgumentError(f"the model has no layer to prune ({reasons}); expected at least one of a supported type that runs once a forward")
    return chosen, skipped


def listed(patterns: Iterable[Pattern] | Pattern, argument: str) -> list[Pattern]:
    """Patterns as a list, which can be read more than once.

    Raises
    ------
    ArgumentError
        They are no patterns at all.
    """
    if isinstance(patterns, (str, type)):
        return [patterns]
    if not isinstance(patterns, Iterable) or isinstance(patterns, nn.Module):
        raise ArgumentError(f"{argument}={patterns!r}; expected a name, a glob, 're:...', a module type, or several of them")
    return list(patterns)


def per_layer(
    trace: Trace, names: list[str], given: object, argument: str, checked: Callable[[object, str], float], skipped: dict[str, str]
) -> dict[str, float]:
    """What is given for every layer: one number for all, or a mapping.

    In a mapping a name counts before a pattern, and the first pattern that matches before later ones; layers that no key matches are added to
    ``skipped``.

    Raises
    ------
    ArgumentError
        A number that ``checked(value, what it is)`` refuses, or a key that matches no layer.
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, checked(given, argument))
    known = {layer.name: (layer.module, layer.module_name) for layer in trace.layers if layer.name in names}
    keys = _check(given, argument, known)
    values = {key: checked(given[key], f"{argument}[{key!r}]") for key in keys}
    found: dict[str, float] = {}
    for name, own in known.items():
        by_order = [name] * (name in values) + [key for key in keys if matches(key, name, *own)]
        if by_order:
            found[name] = values[by_order[0]]
        else:
            skipped[name] = f"no key of the {argument} mapping matches it"
    if not found:
        raise ArgumentError(f"the {argument} mapping is empty; expected {{name or pattern: number}}")
    return found


def positive(value: object, name: str) -> float:
    """A relative budget.

    Raises
    ------
    ArgumentError
        No finite number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ArgumentError(f"{name}={value!r}; expected a finite number above 0 (a share of the layer's output norm)")
    return float(value)


def share_of_zeros(value: object, name: str) -> float:
    """A sparsity.

    Raises
    ------
    ArgumentError
        No number from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ArgumentError(f"{name}={value!r}; expected a number from 0 to 1 (the share of the weights to be zero)")
    return float(value)
