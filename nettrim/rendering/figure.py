"""A report as a matplotlib figure: the page's drawings, for notebooks and papers."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from nettrim.rendering.pictures import checked, density_map
from nettrim.rendering.text import no_bound, relative_promise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nettrim.report import LayerReport, Report

_MASKS_A_ROW = 4
_PIXELS = 2**16  # of a mask
_BLUE, _ORANGE, _GREY = "tab:blue", "tab:orange", "lightgray"


def draw(report: "Report", figure_type: "type[Figure]", masks: Mapping[str, Tensor]) -> "Figure":
    """Draw a report on a new `figure_type`: densities, discrepancies, error through the depth and gaps; below them the masks."""
    shown = checked(masks, report.layers)
    rows = math.ceil(len(shown) / _MASKS_A_ROW)
    drawing = figure_type(figsize=(max(11.0, 0.9 * len(report.layers)), 7.5 + 2.5 * rows), layout="constrained")
    # a subfigure of its own for the masks: their grid has other columns
    parts = drawing.subfigures(2 if rows else 1, 1, height_ratios=[7.5, 2.5 * rows][: 2 if rows else 1], squeeze=False)[:, 0]
    ((kept, promise), (depth, gaps)) = parts[0].subplots(2, 2)
    _density(kept, report.layers)
    _discrepancy(promise, report.layers)
    _depth(depth, report.layers)
    _gaps(gaps, report.layers)
    if rows:
        for axes, (name, mask) in zip(parts[1].subplots(rows, _MASKS_A_ROW, squeeze=False).flat, shown, strict=False):
            axes.imshow(density_map(mask, _PIXELS)[0].numpy(), cmap="gray_r", vmin=0, aspect="auto", interpolation="nearest")
            axes.set_title(_plain(name), fontsize="small")
        for axes in parts[1].axes:
            axes.set(xticks=[], yticks=[])
            axes.set_visible(bool(axes.images))
    return drawing


def _plain(name: str) -> str:
    return name.replace("$", r"\$")  # a pair of $ would be read as TeX


def _name_places(axes: "Axes", layers: "tuple[LayerReport, ...]") -> None:
    axes.set_xticks(range(len(layers)), [_plain(layer.name) for layer in layers], rotation=30, ha="right")


def _finite(values: "list[float | None]") -> list[float]:
    """The values, those that cannot be drawn as NaN."""
    return [value if value is not None and math.isfinite(value) else math.nan for value in values]


def _density(axes: "Axes", layers: "tuple[LayerReport, ...]") -> None:
    axes.bar(range(len(layers)), [layer.density for layer in layers], color=_BLUE)
    axes.set(title="weights kept", ylabel="density", ylim=(0.0, 1.0))
    _name_places(axes, layers)


def _discrepancy(axes: "Axes", layers: "tuple[LayerReport, ...]") -> None:
    width = 0.27
    for shift, label, values, color in (
        (-width, "promised", [relative_promise(layer) for layer in layers], _GREY),
        (0.0, "measured", [layer.relative_discrepancy for layer in layers], _BLUE),
        (width, "held out", [layer.holdout for layer in layers], _ORANGE),
    ):
        axes.bar([place + shift for place in range(len(layers))], _finite(list(values)), width, label=label, color=color)
    axes.set(title="discrepancy of the output", ylabel="relative to the dense output")
    axes.margins(y=0.15)
    axes.legend(loc="upper center", ncols=3, fontsize="small")  # above the bars, in the room that the margin leaves
    _name_places(axes, layers)


def _depth(axes: "Axes", layers: "tuple[LayerReport, ...]") -> None:
    places = range(len(layers))
    axes.plot(places, _finite([layer.accumulated for layer in layers]), "o-", color=_BLUE, label="with what the layers before left")
    axes.plot(places, _finite([layer.relative_discrepancy for layer in layers]), "s--", color=_ORANGE, label="the layer's own")
    axes.set(title="error through the depth", ylabel="relative to the dense output")
    axes.set_ylim(bottom=0.0)
    axes.legend()
    _name_places(axes, layers)


def _gaps(axes: "Axes", layers: "tuple[LayerReport, ...]") -> None:
    axes.set(title="gap", xlabel="steps", ylabel="share of the objective")
    for layer in layers:
        points = [(point.iteration, point.gap) for point in layer.history if 0 < point.gap < math.inf and not no_bound(layer)]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=_plain(layer.name))
            axes.set_yscale("log")
    if axes.lines and len(axes.lines) <= 10:
        axes.legend(fontsize="small")
