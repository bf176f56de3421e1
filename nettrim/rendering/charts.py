"""Where things lie in a line chart: shares of its width and height, so that one drawing fits every screen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_TICKS = 4
_DECADES = 6  # of a logarithmic axis: what lies further below is drawn on its edge
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Tick:
    """A label at a place along an axis, in percent of its length from the left or from the bottom."""

    place: float
    label: str


@dataclass(frozen=True)
class Point:
    """A place in percent of the width from the left and of the height from the top, and what is shown when the pointer is there."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """A curve: its name, the name of its style, its points in order."""

    label: str
    kind: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """A line chart; `summary` says in words what it shows."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    summary: str


@dataclass(frozen=True)
class Curve:
    """What a line is drawn from: values at places; those that are not finite are left out."""

    label: str
    kind: str
    xs: Sequence[float]
    ys: Sequence[float]
    titles: Sequence[str]


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    summary: str,
    percent: bool = False,
    log: bool = False,
    from_zero: bool = True,
    names: Sequence[str] = (),
) -> Chart | None:
    """Lay out curves on common axes; None if there is no point to draw.

    Parameters
    ----------
    curves : sequence of Curve
    title, x_label, y_label, summary : str
    percent : bool
        The y values are shares, and shown in percent.
    log : bool
        The y axis is logarithmic; values that are not above 0 are left out.
    from_zero : bool
        Whether the y axis, where it is not logarithmic, starts at 0 and not at the least value.
    names : sequence of str
        What stands at x = 0, 1, 2, ... in the place of numbers.
    """
    shown = [
        Curve(curve.label, curve.kind, *(tuple(column) for column in zip(*kept, strict=True)))
        for curve in curves
        if (kept := [point for point in zip(curve.xs, curve.ys, curve.titles, strict=True) if math.isfinite(point[1]) and (point[1] > 0 or not log)])
    ]
    if not shown:
        return None
    xs, ys = [x for curve in shown for x in curve.xs], [y for curve in shown for y in curve.ys]
    if log:
        top = math.ceil(math.log10(max(ys)))
        low, high = float(max(math.floor(math.log10(min(ys))), top - _DECADES)), float(top)
        low = min(low, high - 1)
        y_ticks = [(float(decade), 10.0**decade) for decade in range(int(low), int(high) + 1, 1 if high - low <= _TICKS else 2)]
    else:
        steps = _nice(min(0.0, *ys) if from_zero else min(ys), max(ys))
        low, high = steps[0], steps[-1]
        y_ticks = [(step, step) for step in steps]
    x_steps = _named(len(names)) if names else _nice(0.0, max(xs))
    left, right = (x_steps[0], max(x_steps[-1], *xs)) if names else (0.0, x_steps[-1])

    def across(x: float) -> float:
        return 50.0 if right == left else round(100 * (x - left) / (right - left), 2)

    def up(y: float) -> float:
        return round(100 * (max(y, low) - low) / (high - low), 2)

    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=tuple(Tick(across(x), names[int(x)] if names else f"{x:.4g}") for x in x_steps),
        y_ticks=tuple(Tick(up(y), f"{100 * value:.4g} %" if percent else f"{value:.4g}") for y, value in y_ticks),
        lines=tuple(
            Line(
                curve.label,
                curve.kind,
                tuple(
                    Point(across(x), round(100 - up(math.log10(y) if log else y), 2), said)
                    for x, y, said in zip(curve.xs, curve.ys, curve.titles, strict=True)
                ),
            )
            for curve in shown
        ),
        summary=summary,
    )


def _nice(low: float, high: float) -> list[float]:
    """About four round numbers from at most ``low`` to at least ``high``."""
    size = max(high - low, abs(high) * 1e-9, 1e-300)
    power = 10.0 ** math.floor(math.log10(size / _TICKS))
    step = next(power * factor for factor in _STEPS if power * factor * _TICKS >= size * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [step * count for count in range(first, last + 1)]


def _named(count: int) -> list[float]:
    """The first and the last of so many places, and up to four between them."""
    step = max(1, math.ceil((count - 1) / 5))
    return [float(place) for place in range(0, count, step)]
