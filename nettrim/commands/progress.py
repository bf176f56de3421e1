"""A bar on stderr: which layer, the gap of the one just solved, the time left. Nothing where stderr is no terminal."""

from __future__ import annotations

import math
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nettrim.progress import ProgressEvent
from nettrim.rendering import percent


class Bar:
    """Use as ``with Bar(quiet) as bar: prune(..., progress=bar)``."""

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True)
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
        self._progress = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._progress.add_task("reading the network", total=None)
        self._round = 0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __call__(self, event: ProgressEvent) -> None:
        if event.index == 1:  # a budget and repair="auto" go through the network several times
            self._round += 1
            self._progress.reset(self._task, total=event.total)
        gap = f", gap {percent(event.gap)}" if math.isfinite(event.gap) and event.gap < 1 else ""
        rounds = f"round {self._round}: " if self._round > 1 else ""
        self._progress.update(self._task, completed=event.index, total=event.total, description=f"{rounds}{event.layer}: {event.status}{gap}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
