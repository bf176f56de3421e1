"""What the page draws of a report: bars for the network and its layers, curves through the depth and of every solve."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nettrim.rendering.charts import Chart, Curve, line_chart
from nettrim.rendering.text import no_bound, number, relative_promise
from nettrim.rendering.text import percent as breakable_percent

if TYPE_CHECKING:
    from nettrim.report import Certificate, LayerReport


@dataclass(frozen=True)
class Bar:
    """A bar: what it is, its length in percent of the longest, and its value in words."""

    label: str
    kind: str
    length: float
    value: str


@dataclass(frozen=True)
class Bars:
    """The bars of one layer, or of the network."""

    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Solve:
    """How a layer was solved, in words and curves."""

    name: str
    status: str
    says: str
    charts: tuple[Chart, ...]


def percent(value: float | None) -> str:
    """As in a text, but its sign stays on the figure's line."""
    return breakable_percent(value).replace(" ", "\N{NO-BREAK SPACE}")


def _bars(rows: list[tuple[str, list[tuple[str, str, float | None, str]]]], longest: float | None = None) -> list[Bars]:
    """Bars on one scale: ``(name, [(label, kind, size, value)])`` each; a size that is None has no bar at all, one that is infinite the longest."""
    sizes = [size for _, bars in rows for _, _, size, _ in bars if size is not None and math.isfinite(size)]
    scale = longest or max(sizes, default=0.0) or 1.0

    def length(size: float) -> float:
        return 0.0 if math.isnan(size) else round(100 * min(size / scale, 1.0), 2)

    return [Bars(name, tuple(Bar(label, kind, length(size), said) for label, kind, size, said in bars if size is not None)) for name, bars in rows]


def network_bars(certificate: "Certificate") -> list[Bars]:
    promised = None
    if certificate.guaranteed is not None and certificate.measured > 0 and 0 < certificate.relative_measured < math.inf:
        promised = certificate.guaranteed * certificate.relative_measured / certificate.measured
    bars = [
        ("guaranteed", "promised", promised, percent(promised)),
        ("measured", "measured", certificate.relative_measured, percent(certificate.relative_measured)),
        ("held out", "holdout", certificate.holdout, percent(certificate.holdout)),
    ]
    return _bars([("the network", bars)])


def density_bars(layers: "tuple[LayerReport, ...]") -> list[Bars]:
    said = [f"{percent(layer.density)}: {layer.nonzeros:,} of {math.prod(layer.shape):,}" for layer in layers]
    return _bars([(layer.name, [("kept", "kept", layer.density, words)]) for layer, words in zip(layers, said, strict=True)], longest=1.0)


def discrepancy_bars(layers: "tuple[LayerReport, ...]") -> list[Bars]:
    shares = [
        (("promised", relative_promise(layer)), ("measured", layer.relative_discrepancy), ("holdout", layer.holdout)) for layer in layers
    ]
    return _bars(
        [
            (layer.name, [("held out" if kind == "holdout" else kind, kind, share, percent(share)) for kind, share in figures])
            for layer, figures in zip(layers, shares, strict=True)
        ]
    )


def depth_chart(layers: "tuple[LayerReport, ...]") -> Chart | None:
    """How the discrepancy grows from layer to layer; None for fewer than two layers."""
    if len(layers) < 2:
        return None
    places, names = [float(place) for place in range(len(layers))], [layer.name for layer in layers]
    figures: list[tuple[str, str, list[float | None]]] = [
        ("with what the layers before left", "measured", [layer.accumulated for layer in layers]),
        ("the layer's own", "own", [layer.relative_discrepancy for layer in layers]),
    ]
    if figures[0][2] == figures[1][2]:  # a cascade's targets are the dense network's: the two are one
        figures = figures[:1]
    curves = []
    for label, kind, values in figures:
        said = [f"{name}: {percent(value)}" for name, value in zip(names, values, strict=True)]
        curves.append(Curve(label, kind, places, [math.nan if value is None else value for value in values], said))
    first, last = (f"{percent(layer.accumulated)} behind {layer.name}" for layer in (layers[0], layers[-1]))
    return line_chart(
        curves,
        title="Discrepancy of each layer's output",
        x_label="layer, in the order of execution",
        y_label="relative to the dense output",
        summary=f"{len(layers)} layers, from {first} to {last}.",
        percent=True,
        names=names,
    )


def solve(layer: "LayerReport") -> Solve:
    gap = "no bound" if no_bound(layer) else f"gap {percent(layer.gap)}"
    says = f"{gap}, {layer.iterations:,} step{'' if layer.iterations == 1 else 's'} of {layer.solver}, {number(layer.seconds)} s"
    return Solve(layer.name, layer.status, says, tuple(chart for chart in (_bound_chart(layer), _gap_chart(layer)) if chart is not None))


def _bound_chart(layer: "LayerReport") -> Chart | None:
    proven = not no_bound(layer)
    bound = f"no weights within the budget have one below {number(layer.lower_bound)}" if proven else "nothing is proven about a smaller one"
    seconds = [point.seconds for point in layer.history]
    steps = [f"step {point.iteration:,}, {number(point.seconds)} s" for point in layer.history]
    return line_chart(
        [
            Curve(
                label,
                kind,
                seconds,
                [getattr(point, field) for point in layer.history],
                [f"{step}: {label} {number(getattr(point, field))}" for step, point in zip(steps, layer.history, strict=True)],
            )
            for label, kind, field in (("objective", "measured", "objective"), ("lower bound", "promised", "lower_bound"))
            if field == "objective" or proven
        ],
        from_zero=False,
        title="Objective and lower bound" if proven else "Objective",
        x_label="seconds",
        y_label="objective of the program",
        summary=f"The objective ends at {number(layer.objective)}, and {bound}.",
    )


def _gap_chart(layer: "LayerReport") -> Chart | None:
    known = [point for point in layer.history if 0 < point.gap < math.inf and not no_bound(layer)]
    return line_chart(
        [
            Curve(
                "gap",
                "measured",
                [float(point.iteration) for point in known],
                [point.gap for point in known],
                [f"step {point.iteration:,}: gap {percent(point.gap)}" for point in known],
            )
        ],
        title="Gap",
        x_label="steps",
        y_label="share of the objective, logarithmic",
        summary=f"The gap between the two ends at {percent(layer.gap)} after {layer.iterations:,} steps.",
        percent=True,
        log=True,
    )
