"""What the benchmarks that set pruners side by side share: picking runs, tables, checks, and the plot of accuracy by weights."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.solver_session import Check

Run = dict[str, Any]


def of(runs: list[Run], **wanted: Any) -> list[Run]:
    """The runs with these settings."""
    return [run for run in runs if all(run["settings"].get(key) == value for key, value in wanted.items())]


def values(runs: list[Run], key: str) -> list[Any]:
    """The values of a setting, each once, in the order of the runs."""
    return list(dict.fromkeys(run["settings"][key] for run in runs))


def print_table(console: Console, title: str, headers: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> None:
    """A table with its first column to the left: boxed on a terminal, Markdown elsewhere, to go into a page as it is."""
    table = Table(title=title, caption=caption or None, header_style="bold", box=HEAVY_HEAD if console.is_terminal else MARKDOWN)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_checks(console: Console, checks: list[Check], full: bool) -> None:
    """What was asked for and what was found."""
    if checks:
        title = "what was asked for" + ("" if full else " of the full size, which this is not")
        rows = [(c.section, c.what, f"{c.found:.4g}", f"{c.relation} {c.asked:.4g}", "yes" if c.met else "NO") for c in checks]
        print_table(console, title, ("section", "figure", "found", "asked", "met"), rows)


def draw(
    runs: list[Run], path: Path, *, titles: dict[str, str], setting: str, across: Callable[[Run], float], label: str, logarithmic: bool
) -> list[Path]:
    """Plot accuracy and error of the logits, a column of panels a network, a line a method, where matplotlib is installed.

    Parameters
    ----------
    runs : list of dict
        Those without an accuracy are left out.
    path : Path
    titles : dict of str to str
        Of the networks.
    setting : str
        The share in the settings that the runs differ by; its values are the ticks.
    across : callable
        A run's place on the horizontal axis, as a share.
    label : str
        Of that axis.
    logarithmic : bool
        Whether it is.

    Returns
    -------
    list of Path
        The file written, or nothing.
    """
    runs = [run for run in runs if "accuracy" in run]
    if not runs:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("No figure: matplotlib is not installed (pip install 'nettrim[plot]').", err=True)
        return []
    networks = values(runs, "network")
    figure = Figure(figsize=(6 * len(networks), 8), layout="constrained")
    panels = figure.subplots(2, len(networks), squeeze=False)
    for column, network in enumerate(networks):
        members = of(runs, network=network)
        top, bottom = panels[0][column], panels[1][column]
        for method in values(members, "method"):
            line = sorted((100 * across(run), 100 * run["accuracy"], run["logit_error"]) for run in of(members, method=method))
            places, accuracies, errors = zip(*line, strict=True)
            top.plot(places, accuracies, "o-", markersize=4, label=method)
            bottom.plot(places, errors, "o-", markersize=4, label=method)
        top.axhline(100 * members[0]["dense_accuracy"], color="black", linewidth=0.8, linestyle=":", label="dense")
        top.set(title=titles[network], ylabel="test accuracy, not retrained (%)")
        bottom.set(ylabel="relative error of the logits", yscale="log" if any(run["logit_error"] > 0 for run in members) else "linear")
        ticks = [100 * share for share in values(members, setting)]
        for axis in (top, bottom):
            axis.set(xlabel=label, xscale="log" if logarithmic else "linear")
            axis.set_xticks([], minor=True)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        top.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return [path]
