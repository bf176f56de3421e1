"""What the benchmarks' commands share: comma-separated lists as options, and where their tables go."""

import math
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

_FILE_WIDTH = 160


class Choices(click.ParamType):
    """A comma-separated list of some of the given names."""

    name = "names"

    def __init__(self, *choices: str) -> None:
        self._choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The names given, each once, in their order."""
        words = [word.strip() for word in value.split(",")]
        for word in words:
            if word not in self._choices:
                self.fail(f"{word!r} is not one of {', '.join(self._choices)}.", param, ctx)
        return tuple(dict.fromkeys(words))


class Numbers(click.ParamType):
    """A comma-separated list of positive numbers of one kind."""

    name = "numbers"

    def __init__(self, kind: Callable[[str], float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers given, each once, in their order."""
        try:
            numbers = tuple(dict.fromkeys(self._kind(word) for word in value.split(",")))
        except ValueError as error:
            self.fail(
                f"{value!r} is no list of numbers such as {'1000,10000' if self._kind is int else '.02,.1'}: {error}.",
                param,
                ctx,
            )
        if not all(0 < number < math.inf for number in numbers):
            self.fail(f"{value!r}: every number must be positive.", param, ctx)
        return numbers


def open_console() -> Console:
    """Standard output: as wide as the terminal, and wide enough for every table where it is none."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)
