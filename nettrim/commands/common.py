"""What the subcommands share: errors in one line, kinds of values."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click

from nettrim.errors import NetTrimError

TRACEBACK = "NETTRIM_TRACEBACK"
_P = ParamSpec("_P")
_R = TypeVar("_R")


def one_line_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn every failure into one line on stderr and the exit code 1; with NETTRIM_TRACEBACK set, let it through."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            with warnings.catch_warnings():
                for kind in (FutureWarning, DeprecationWarning):  # of libraries, for those who write code
                    warnings.simplefilter("ignore", kind)
                return command(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except NetTrimError as error:
            if os.environ.get(TRACEBACK):
                raise
            raise click.ClickException(in_a_line(error)) from error
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            # with its type: it was not meant for the user, and may be all there is to find it by
            raise click.ClickException(f"{type(error).__name__}: {in_a_line(error)} (set {TRACEBACK}=1 to see where)") from error

    return wrapped


def in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuse NaN and infinity, which click's ranges let pass."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


class Goal(click.ParamType):
    """``0.1`` for every layer, or ``PATTERN=0.1`` for some: ``(pattern or None, number)``."""

    name = "NUMBER or LAYER=NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str | None, float]:
        if isinstance(value, tuple):
            return value
        pattern, separator, text = str(value).rpartition("=")
        try:
            number = float(text)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor LAYER=NUMBER, such as 'encoder.*=0.1'", param, ctx)
        return (pattern if separator else None), number


def one_goal(context: click.Context, parameter: click.Parameter, values: tuple[tuple[str | None, float], ...]) -> float | dict[str, float] | None:
    """One number, a mapping, or None where the option was not given."""
    if not values:
        return None
    if any(pattern is None for pattern, _ in values):
        if len(values) > 1:
            raise click.BadParameter("give one number for all layers, or LAYER=NUMBER for each (a glob such as '*=0.1' for the others)")
        return values[0][1]
    found = {str(pattern): number for pattern, number in values}
    if len(found) < len(values):
        raise click.BadParameter("the same LAYER is given twice")
    return found


class Size(click.ParamType):
    """``224`` or ``224x320`` (height, then width)."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple | list) and len(value) == 2:
            return int(value[0]), int(value[1])
        sides = str(value).lower().split("x")
        if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) for side in sides):
            self.fail(f"{value!r} is no size; expected SIDE or HEIGHTxWIDTH in pixels", param, ctx)
        return int(sides[0]), int(sides[-1])


class Numbers(click.ParamType):
    """``0.5`` or ``0.485,0.456,0.406``."""

    name = "NUMBERS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple | list):
            return tuple(float(number) for number in value)
        try:
            return tuple(float(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}; expected a number, or one for each channel: 0.5,0.5,0.5", param, ctx)


class NumberOrAuto(click.ParamType):
    """A number, or ``auto``."""

    name = "NUMBER or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        try:
            return "auto" if value == "auto" else float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r}; expected a number, or auto", param, ctx)
