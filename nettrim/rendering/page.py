"""The report as one HTML page that needs no other file: what stands where. How it looks is in ``templates``."""

import functools
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nettrim.rendering.drawings import density_bars, depth_chart, discrepancy_bars, network_bars, percent, solve
from nettrim.rendering.pictures import pictures
from nettrim.rendering.text import no_bound, number

if TYPE_CHECKING:
    import jinja2

    from nettrim.report import Certificate, LayerReport, Report


def render(report: "Report", masks: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """Return the page.

    Parameters
    ----------
    report : Report
    masks : mapping of str to Tensor
        By parameter name, as `nettrim.PruneResult` has them; layers without one have no picture.
    facts : mapping of str to str
        What else to show at the top: a name, and its value in words.

    Raises
    ------
    ArgumentError
        The masks are not this report's.
    """
    template = _environment().get_template("report.html")
    return template.render(
        report=report,
        certificate=report.certificate,
        says=_says(report.certificate),
        tiles={**_tiles(report), **{str(name): str(value) for name, value in facts.items()}},
        network=network_bars(report.certificate),
        density=density_bars(report.layers),
        discrepancy=discrepancy_bars(report.layers),
        depth=depth_chart(report.layers),
        solves=[solve(layer) for layer in report.layers],
        pictures=pictures(masks, report.layers),
        rows=[_row(layer) for layer in report.layers],
        options={name: _option(value) for name, value in report.to_dict()["options"].items()},
    )


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("nettrim.rendering"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _says(certificate: "Certificate") -> str:
    """The verdict in a sentence."""
    if certificate.guaranteed is None:
        bound = ""  # the explanation says why
    elif certificate.measured <= certificate.guaranteed:
        bound = f" That is {number(certificate.measured)} in norm, and {number(certificate.guaranteed)} was guaranteed."
    else:
        bound = f" That is {number(certificate.measured)} in norm, which is not within the {number(certificate.guaranteed)} guaranteed."
    held_out = "" if certificate.holdout is None else f", and by {percent(certificate.holdout)} on samples kept out of the solving"
    return f"The output differs from the dense network's by {percent(certificate.relative_measured)} on the calibration samples{held_out}.{bound}"


def _tiles(report: "Report") -> dict[str, str]:
    entries, kept = sum(math.prod(layer.shape) for layer in report.layers), sum(layer.nonzeros for layer in report.layers)
    dense = sum(layer.weight_bytes for layer in report.layers)
    return {
        "Zeros": percent(1 - report.density),
        "Weights kept": f"{kept:,} of {entries:,}",
        "Output discrepancy": percent(report.certificate.relative_measured),
        "Held out": "no samples" if report.certificate.holdout is None else percent(report.certificate.holdout),
        "Size of these weights": f"{_bytes(dense)} dense, {_bytes(packed_bytes(report.layers))} packed",
        "Layers pruned": f"{len(report.layers)}; {len(report.skipped)} left dense",
        "Pruned in": f"{number(report.seconds)} s",
    }


def packed_bytes(layers: "tuple[LayerReport, ...]") -> int:
    """What the weight matrices take as one bit for every weight, and those that are kept in their dtype."""
    return sum(-(-math.prod(layer.shape) // 8) + layer.nonzeros * layer.weight_bytes // math.prod(layer.shape) for layer in layers)


def _bytes(count: float) -> str:
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**power:.3g}\N{NO-BREAK SPACE}{('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _row(layer: "LayerReport") -> dict[str, str]:
    """All figures of a layer, by the heading of their column."""
    return {
        "shape": "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}".join(map(str, layer.shape)),
        "kept": f"{layer.nonzeros:,}",
        "density": percent(layer.density),
        "promised": number(layer.epsilon),
        "measured": number(layer.discrepancy),
        "relative": percent(layer.relative_discrepancy),
        "held out": percent(layer.holdout),
        "accumulated": percent(layer.accumulated),
        "gap": percent(None if no_bound(layer) else layer.gap),
        "status": layer.status,
        "solver": layer.solver,
        "steps": f"{layer.iterations:,}",
        "seconds": number(layer.seconds),
    }


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
