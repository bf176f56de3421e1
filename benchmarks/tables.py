"""The MNIST benchmark's runs as a table: on the terminal, and in Markdown for the documentation."""

from typing import Any

from rich.table import Table

from benchmarks.results import Results

Run = dict[str, Any]

HEADERS = (
    "network",
    "training",
    "P",
    "mode",
    "set",
    "ε",
    "nonzeros",
    "kept %",
    "accuracy %",
    "magnitude %",
    "promised",
    "measured",
    "on test",
    "holds",
    "gap",
    "s",
)
_TEXT = {"network", "training", "mode", "set", "nonzeros", "holds"}


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _cells(run: Run) -> list[str]:
    """One run as the columns of `HEADERS`; a failed run shows its error's class and dashes."""
    settings = run["settings"]
    head = [
        settings["network"],
        settings["training"],
        f"{settings['samples']}",
        settings["mode"],
        settings["consistency"],
        f"{settings['epsilon']:g}",
    ]
    if "error" in run:
        return head + [run["error"].split(":")[0]] + ["–"] * (len(HEADERS) - len(head) - 1)
    # A gap that is not finite is written as text by the report.
    gap = max((float(layer["gap"]) for layer in run["layers"]), default=None)
    return [
        *head,
        " ".join(str(count) for count in run["nonzeros"].values()),
        f"{100 * run['density']:.2f}",
        f"{100 * run['accuracy']:.2f}",
        f"{100 * run['magnitude']['accuracy']:.2f}",
        _share(run["guaranteed"]),
        _share(run["measured"]),
        _share(run["test_discrepancy"]),
        "yes" if run["holds"] else "NO",
        "–" if gap is None else f"{gap:.1e}",
        f"{run['seconds']:.1f}",
    ]


def rich_table(runs: list[Run]) -> Table:
    """The runs as a table for the terminal, with the dense networks' accuracies in its caption."""
    dense = {
        f"{run['settings']['network']} ({run['settings']['training']})": run["dense_accuracy"]
        for run in runs
        if "error" not in run
    }
    caption = "dense: " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in dense.items())
    table = Table(caption=caption if dense else None, header_style="bold")
    for header in HEADERS:
        table.add_column(header, justify="left" if header in _TEXT else "right", overflow="fold")
    for run in runs:
        table.add_row(*_cells(run), style="red" if "error" in run or not run["holds"] else None)
    return table


def markdown_table(results: Results) -> str:
    """All runs of a results file in Markdown, below a line a machine that they were measured on.

    Rows follow the settings, not the time of the run, so that a table made again differs only where the figures do.
    """

    def order(run: Run) -> tuple[Any, ...]:
        settings = run["settings"]
        names = ("network", "training", "samples", "mode", "consistency", "epsilon", "gamma", "solver", "seed")
        return tuple(settings[name] for name in names)

    runs = sorted(results.runs, key=order)
    dense = {
        f"{run['settings']['network']}, {run['settings']['training']}": run["dense_accuracy"]
        for run in runs
        if "error" not in run
    }
    rules = [":--" if header in _TEXT else "--:" for header in HEADERS]
    rows = [list(HEADERS), rules, *(_cells(run) for run in runs)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    accuracies = "Dense networks: " + "; ".join(f"{name}: {100 * value:.2f} %" for name, value in dense.items()) + "."
    return "\n\n".join(part for part in (results.describe(runs), accuracies if dense else "", "\n".join(lines)) if part)
