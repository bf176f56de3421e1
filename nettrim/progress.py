"""Telling a caller that a layer is done: a callable, or a bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nettrim.errors import ArgumentError


@dataclass(frozen=True)
class ProgressEvent:
    """One layer is done.

    Attributes
    ----------
    layer : str
        Its name in the model.
    index : int
        Its position among the layers to prune, from 1.
    total : int
        How many there are.
    status : str
        Of its solution.
    gap : float
        Of its solution, relative; infinite where there is none.
    """

    layer: str
    index: int
    total: int
    status: str
    gap: float


class Progress:
    """Use as ``with Progress(progress, total) as done: done(name, status, gap)``; ``progress`` is as for :func:`nettrim.prune`.

    Raises
    ------
    ArgumentError
        ``progress`` is neither None, a bool nor callable.
    """

    def __init__(self, progress: bool | Callable[[ProgressEvent], None] | None, total: int) -> None:
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise ArgumentError(f"progress={progress!r}; expected None, True for a bar, or a callable that takes a ProgressEvent")
        self._callback = progress if callable(progress) else None
        self._total, self._done = total, 0
        self._bar: Any = None
        if progress is True:
            from tqdm.auto import tqdm

            class Bar(tqdm):
                monitor_interval = 0  # its watching thread would outlive the call

            self._bar = Bar(total=total, desc="nettrim", unit="layer")

    def __enter__(self) -> Callable[[str, str, float], None]:
        return self._advance

    def _advance(self, name: str, status: str, gap: float) -> None:
        self._done += 1
        if self._callback is not None:
            self._callback(ProgressEvent(name, self._done, self._total, status, gap))
        if self._bar is not None:
            self._bar.set_postfix_str(f"{name}: {status}")
            self._bar.update()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
