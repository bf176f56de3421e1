"""The two tables and the figure: every method alone, and the same networks after `nettrim.prune`; means over the seeds that were run."""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks.neighbours.models import TITLES
from benchmarks.neighbours.registry import METHODS, constants
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
AFTER = (
    *("method", "network", "accuracy before %", "evenly: after %", "weights kept", "%", "units kept", "s a prune"),
    *("by default: after %", "weights kept", "%", "units kept", "s a prune", "seeds"),
)
PROTOCOL = ("data", "epochs", "samples", "batch", "calibration", "halvings", "auto_halvings")


def current(runs: list[Run]) -> list[Run]:
    """Finished runs of the methods with the constants of today's code, and of one protocol: that of which there are most."""
    done = [run for run in runs if run["settings"]["section"] == "methods" and "error" not in run]
    done = [run for run in done if (name := run["settings"]["method"]) in METHODS and run["settings"].get("constants") == constants(name)]
    protocols = Counter(tuple(run["settings"][key] for key in PROTOCOL) for run in done)
    most = protocols.most_common(1)[0][0] if protocols else ()
    return [run for run in done if tuple(run["settings"][key] for key in PROTOCOL) == most]


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """The current runs by method, in the registry's order."""
    done = current(runs)
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
    ]


def _pruned(members: list[Run], *keys: str) -> list[str]:
    """What a search of `nettrim.prune` left: accuracy, weights, their share, units, seconds."""
    return [
        _spread(members, *keys, "accuracy"),
        f"{_mean(members, *keys, 'weights'):,.0f}",
        f"{100 * _mean(members, *keys, 'weights') / _mean(members, 'whole', 'weights'):.1f}",
        f"{_mean(members, *keys, 'units'):.0f}",
        f"{_mean(members, *keys, 'seconds'):.1f}",
    ]


def after(runs: list[Run]) -> list[list[str]]:
    """Rows of table (b): zeros spread evenly, and by the defaults where that was run."""
    return [
        [
            name,
            TITLES[METHODS[name].network],
            _spread(members, "accuracy"),
            *_pruned(members, "after"),
            *(_pruned(members, "after", "auto") if all("auto" in run["after"] for run in members) else ["–"] * 5),
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
    done = [run["settings"] for run in current(runs)]
    one, seeds = done[0], sorted({each["seed"] for each in done})
    return f"{one['data']}, {one['samples'] or 'all'} training images, {one['epochs']} epochs in all, seeds {', '.join(map(str, seeds))}."


def where(runs: list[Run], results: Results) -> str:
    """The machine, the versions and the commit of the runs: one line, or that they are a mixture, and of what."""
    lines = results.describe(runs).splitlines()
    if len(lines) < 2:
        return "".join(lines)
    return "\n".join([f"These runs are a mixture of {len(lines)} commits or machines:", "", *[f"* {line}" for line in lines]])


def markdown(results: Results) -> str:
    """Both tables and what they were run on, and the oracle's where it was run."""
    from benchmarks.neighbours.oracle_report import ORACLE, oracle_rows

    programs = [run for run in results.runs if run["settings"]["section"] != "methods" and "error" not in run]
    runs = [*current(results.runs), *programs]
    parts = [where(runs, results)]
    if left := len(results.runs) - len(runs):
        parts.append(f"Left out: {left} runs that failed, are of another protocol, or of other constants than today's code has.")
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
    """Accuracy against weights kept, alone and after `nettrim.prune` both ways, where matplotlib is installed and a run has finished."""
    found = grouped(runs)
    if not found:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("No figure: matplotlib is not installed (pip install 'nettrim[plot]').", err=True)
        return []
    figure = Figure(figsize=(16, 6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    panels: tuple[tuple[tuple[str, ...], str], ...] = (
        ((), "each alone"),
        (("after",), "then nettrim.prune, evenly, 0.2 points lower"),
        (("after", "auto"), "by its defaults"),
    )
    for axis, (keys, title) in zip(axes, panels, strict=True):
        for place, (name, members) in enumerate(found.items()):
            if "auto" in keys and not all("auto" in run["after"] for run in members):
                continue
            x = 100 * _mean(members, *keys, "weights") / _mean(members, "whole", "weights")
            marker = "os^Dvp"[place % 6]
            axis.plot(x, 100 * _mean(members, *keys, "accuracy"), marker, color=f"C{place % 10}", label=name)
        axis.set(title=title, xlabel="weights kept (%)", xscale="log")
    axes[0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=120)
    return [path]
