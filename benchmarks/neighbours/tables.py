"""The two tables and the figure: every method alone, and the same networks after `nettrim.prune`; means over the seeds that were run."""

import statistics
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks.neighbours.models import TITLES
from benchmarks.neighbours.registry import METHODS
from benchmarks.results import Results

Run = dict[str, Any]
MARKS = ("<!-- tables: python -m benchmarks.neighbours --into -->", "<!-- end of tables -->")

ALONE = ("method", "kind", "network", "weights kept", "%", "units kept", "layers", "accuracy %", "s", "seeds")
PUBLISHED = ("method", "published", "ours")
# LeNet-300-100 on MNIST; the last an MLP on MNIST
FIGURES = {
    "DropNeuron li + lo": "26,386 of 266,200 weights at 98.17 %",
    "l1": "31,909 of 266,200 weights at 97.98 % (DropNeuron's authors)",
    "DropNet": "60 % of the nodes dropped, or more, without significant loss",
}
_TEXT = {"method", "kind", "network", "published", "ours", "program"}
AFTER = ("method", "network", "accuracy before %", "after %", "weights kept", "%", "units kept", "s a prune", "seeds")


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Finished runs of the section by method, in the registry's order."""
    done = [run for run in runs if run["settings"]["section"] == "methods" and "error" not in run]
    found = {name: [run for run in done if run["settings"]["method"] == name] for name in METHODS}
    return {name: members for name, members in found.items() if members}


def _mean(runs: list[Run], *keys: str) -> float:
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value[key]
        values.append(float(value))
    return statistics.fmean(values)


def _spread(runs: list[Run], *keys: str) -> str:
    """Mean of an accuracy in %, with half of its range where there are several seeds."""
    values = [100 * _mean([run], *keys) for run in runs]
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.2f}" + (f" ± {half:.2f}" if len(values) > 1 else "")


def alone(runs: list[Run]) -> list[list[str]]:
    """Rows of table (a)."""
    return [
        [
            name,
            METHODS[name].family,
            TITLES[METHODS[name].network],
            f"{_mean(members, 'weights'):,.0f} of {_mean(members, 'whole', 'weights'):,.0f}",
            f"{100 * _mean(members, 'weights') / _mean(members, 'whole', 'weights'):.1f}",
            f"{_mean(members, 'units'):.0f} of {_mean(members, 'whole', 'units'):.0f}",
            f"{_mean(members, 'layers'):.2g} of {_mean(members, 'whole', 'layers'):.0f}",
            _spread(members, "accuracy"),
            f"{_mean(members, 'seconds'):.0f}",
            f"{len(members)}",
        ]
        for name, members in grouped(runs).items()
        if not METHODS[name].auto
    ]


def after(runs: list[Run]) -> list[list[str]]:
    """Rows of table (b)."""
    return [
        [
            name,
            TITLES[METHODS[name].network],
            _spread(members, "accuracy"),
            _spread(members, "after", "accuracy"),
            f"{_mean(members, 'after', 'weights'):,.0f}",
            f"{100 * _mean(members, 'after', 'weights') / _mean(members, 'whole', 'weights'):.1f}",
            f"{_mean(members, 'after', 'units'):.0f}",
            f"{_mean(members, 'after', 'seconds'):.1f}",
            f"{len(members)}",
        ]
        for name, members in grouped(runs).items()
    ]


def published(runs: list[Run]) -> list[list[str]]:
    """Figures of the papers beside ours."""
    found = grouped(runs)
    rows = []
    for name, figure in FIGURES.items():
        if name in found:
            members = found[name]
            weights, units = _mean(members, "weights"), _mean(members, "units")
            whole = (_mean(members, "whole", "weights"), _mean(members, "whole", "units"))
            dropped = f"{100 * (1 - units / whole[1]):.0f} % of the units dropped"
            rows.append([name, figure, f"{weights:,.0f} of {whole[0]:,.0f} weights, {dropped}, at {_spread(members, 'accuracy')} %"])
    return rows


def rich_tables(runs: list[Run]) -> list[Table]:
    """Both, for the terminal."""
    tables = []
    for title, headers, rows in (("each alone", ALONE, alone(runs)), ("then nettrim.prune, 0.2 points lower", AFTER, after(runs))):
        table = Table(title=title, header_style="bold")
        for header in headers:
            table.add_column(header, justify="left" if header in _TEXT else "right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def _markdown(headers: tuple[str, ...], rows: list[list[str]]) -> str:
    rules = [":--" if header in _TEXT else "--:" for header in headers]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(headers), rules, *rows])


def settings_line(runs: list[Run]) -> str:
    """What was run, in words: data, epochs, seeds."""
    done = [run["settings"] for members in grouped(runs).values() for run in members]
    said = []
    for data, epochs, samples in sorted({(one["data"], one["epochs"], one["samples"] or 0) for one in done}):
        seeds = sorted({one["seed"] for one in done if (one["data"], one["epochs"], one["samples"] or 0) == (data, epochs, samples)})
        said.append(f"{data}, {samples or 'all'} training images, {epochs} epochs in all, seeds {', '.join(map(str, seeds))}")
    return "; ".join(said) + "."


def markdown(results: Results) -> str:
    """Both tables and what they were run on, and the oracle's where it was run."""
    from benchmarks.neighbours.oracle_report import ORACLE, oracle_rows

    runs = [run for run in results.runs if "error" not in run]
    parts = [results.describe(runs)]
    if grouped(runs):
        parts += [
            "Run on " + settings_line(runs),
            "### Every method alone",
            _markdown(ALONE, alone(runs)),
            "### The same networks, then Net-Trim",
            _markdown(AFTER, after(runs)),
        ]
    if published(runs):
        parts += ["### Published figures", _markdown(PUBLISHED, published(runs))]
    rows = oracle_rows(runs)
    if rows:
        parts += ["### Against the certified optimum", _markdown(ORACLE, rows)]
    return "\n\n".join(parts)


def put_into(path: Path, results: Results) -> None:
    """Replace what is between the marks of a page by the tables.

    Raises
    ------
    click.ClickException
        The page has no such marks.
    """
    text = path.read_text(encoding="utf-8")
    if not all(text.count(mark) == 1 for mark in MARKS):
        raise click.ClickException(f"{path} does not hold the lines {MARKS[0]!r} and {MARKS[1]!r} once each; put them where the tables go.")
    head, rest = text.split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    path.write_text(f"{head}{MARKS[0]}\n\n{markdown(results)}\n\n{MARKS[1]}{tail}", encoding="utf-8")


def draw(runs: list[Run], path: Path) -> list[Path]:
    """Accuracy against weights kept, alone and after `nettrim.prune`, where matplotlib is installed and a run has finished."""
    found = grouped(runs)
    if not found:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("No figure: matplotlib is not installed (pip install 'nettrim[plot]').", err=True)
        return []
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, title in ((axes[0], None, "each alone"), (axes[1], "after", "then nettrim.prune, 0.2 points lower")):
        for place, (name, members) in enumerate(found.items()):
            keys = (key,) if key else ()
            x = 100 * _mean(members, *keys, "weights") / _mean(members, "whole", "weights")
            marker = "os^Dvp"[place % 6]
            axis.plot(x, 100 * _mean(members, *keys, "accuracy"), marker, color=f"C{place % 10}", label=name)
        axis.set(title=title, xlabel="weights kept (%)", xscale="log")
    axes[0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=120)
    return [path]
