"""A report in words: its verdict in a line, its table as plain text. No number is made here."""

import io
import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from nettrim.report import Certificate, LayerReport, Report

WIDTH = 120  # columns of a report as text, wherever it goes: it reads the same in a log and in a terminal


def number(value: float | None) -> str:
    """Return four significant digits, or a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Return a share in percent, or a dash for None; a share too small for its digits is not shown as zero."""
    if value is None:
        return "-"
    return "< 0.01 %" if 0 < value < 5e-5 else f"{value:.2%}".replace("%", " %")


def relative_promise(layer: "LayerReport") -> float | None:
    """The layer's budget as a share of the norm of its dense output; None where the report does not say that norm."""
    if not (layer.discrepancy > 0 and 0 < layer.relative_discrepancy < math.inf):
        return None
    return layer.epsilon * layer.relative_discrepancy / layer.discrepancy


def no_bound(layer: "LayerReport") -> bool:
    """Whether the solver proved nothing about the layer's optimum."""
    return layer.lower_bound == 0 and layer.objective > 0


def verdict(certificate: "Certificate") -> str:
    """Return one line: does the certificate hold, and what was measured against what was guaranteed."""
    judgement = "certificate holds" if certificate.holds else "CERTIFICATE DOES NOT HOLD"
    bound = f"measured {number(certificate.measured)}"
    if certificate.guaranteed is None:
        bound += ", no bound for the whole network"
    else:
        # "not <=" rather than ">": a NaN is no proof either
        relation = "<=" if certificate.measured <= certificate.guaranteed else "not <="
        bound += f" {relation} guaranteed {number(certificate.guaranteed)}"
    shares = f"{percent(certificate.relative_measured)} of the dense output"
    if certificate.holdout is not None:
        shares += f"; held-out {percent(certificate.holdout)}"
    return f"{judgement}: {bound} ({shares})"


def render(report: "Report") -> str:
    """Return the report as plain text: no escape codes, the same width everywhere."""
    out = io.StringIO()
    _print(report, Console(file=out, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _print(report: "Report", console: Console) -> None:
    """Print the verdict, the call, the table of layers and the layers left dense."""
    certificate = report.certificate
    console.print(Text(verdict(certificate), style="bold green" if certificate.holds else "bold red"))
    if certificate.explanation:
        console.print(Text(certificate.explanation))
    shown = [f"density {percent(report.density)}"]
    defaults = {"pattern": "unstructured", "budget": None, "sparsity": None, "epsilon": None}
    keys = ("mode", "consistency" if report.options.get("epsilon") is not None else "pattern", "epsilon", "budget", "sparsity")
    shown += [f"{key} {report.options[key]}" for key in keys if report.options.get(key, defaults.get(key)) != defaults.get(key)]
    console.print(Text(", ".join([*shown, f"{number(report.seconds)} s"])))
    checkpoint = report.options.get("checkpoint")
    if isinstance(checkpoint, dict):
        console.print(Text(f"checkpoint {checkpoint['folder']}: {checkpoint['resumed']} layers taken from it, {checkpoint['solved']} solved"))
        for note in checkpoint["notes"]:
            console.print(Text(f"checkpoint: {note}"))
    if report.layers:
        console.print(_layer_table(report.layers))  # this box has empty lines for its edges
    for name, reason in report.skipped.items():
        console.print(Text(f"left dense: {name}: {reason}"))


def _layer_table(layers: "tuple[LayerReport, ...]") -> Table:
    table = Table(box=box.MARKDOWN)  # plain ASCII: it prints everywhere, and pastes into an issue as a table
    table.add_column("layer", overflow="fold", min_width=16)
    for header in ("shape", "density", "promised", "measured", "relative", "gap"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    for header in ("steps", "seconds"):
        table.add_column(header, justify="right", no_wrap=True)
    for layer in layers:
        cells = (
            layer.name,
            "x".join(map(str, layer.shape)),
            percent(layer.density),
            number(layer.epsilon),
            number(layer.discrepancy),
            percent(layer.relative_discrepancy),
            percent(None if no_bound(layer) else layer.gap),
            layer.status,
            str(layer.iterations),
            number(layer.seconds),
        )
        table.add_row(*map(Text, cells))  # Text: a layer's name is never read as markup
    return table
