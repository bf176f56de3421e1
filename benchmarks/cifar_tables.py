"""Tables, checks and the plot of ``python -m benchmarks.cifar``."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.cifar_networks import TITLES
from benchmarks.solver_session import Check
from benchmarks.sparsity_tables import print_table

Run = dict[str, Any]


def of(runs: list[Run], **wanted: Any) -> list[Run]:
    """The runs with these settings."""
    return [run for run in runs if all(run["settings"].get(key) == value for key, value in wanted.items())]


def values(runs: list[Run], key: str) -> list[Any]:
    """The values of a setting, each once, in the order of the runs."""
    return list(dict.fromkeys(run["settings"][key] for run in runs))


def _cell(run: Run) -> str:
    if "error" in run:
        return "failed"
    return f"{100 * run['accuracy']:.2f} / {run['logit_error']:.3f}" + ("" if run["within"] else " (keeps too many)")


def _cost(run: Run) -> str:
    if "error" in run:
        return "failed"
    memory = "–" if run["extra_bytes"] is None else f"{run['extra_bytes'] / 2**20:,.0f}"
    return f"{run['seconds']:.1f} / {memory}"


def tables(console: Console, runs: list[Run]) -> None:
    """Two tables a network, methods against shares of zeros: accuracy and error of the logits; seconds and memory."""
    for network in values(runs, "network"):
        members = of(runs, network=network)
        levels, settings = values(members, "zeros"), members[0]["settings"]
        dense = next((f"dense: {100 * run['dense_accuracy']:.2f} %; " for run in members if "error" not in run), "")
        caption = f"{dense}cascade, {settings['samples']:,} images, at most {settings['rows']:,} rows a layer, not retrained"
        headers = ("method", *(f"{100 * zeros:g} % zeros" for zeros in levels))
        for title, cell in (("test accuracy % / relative error of the logits", _cell), ("seconds / peak MiB beyond model and data", _cost)):
            rows = [
                (method, *(cell(run) for zeros in levels for run in of(members, method=method, zeros=zeros))) for method in values(members, "method")
            ]
            print_table(console, f"{TITLES[network]}: {title}", headers, rows, caption)


def checks(runs: list[Run], ours: str, peers: tuple[str, ...]) -> list[Check]:
    """What is asked of ours, against the best of the peers in the same run: no less accuracy, and at 80 % zeros two thirds of the loss."""
    found = []
    for network in values(runs, "network"):
        for zeros in values(runs, "zeros"):
            members = [run for run in of(runs, network=network, zeros=zeros) if "error" not in run]
            mine = of(members, method=ours)
            theirs = [run for run in members if run["settings"]["method"] in peers]
            if not mine or not theirs:
                continue
            best = max(run["accuracy"] for run in theirs)
            what = f"{100 * zeros:g} % zeros"
            found.append(Check(network, f"accuracy, the best peer's, {what}", mine[0]["accuracy"], "≥", best))
            if zeros == 0.8:
                dense = mine[0]["dense_accuracy"]
                lost = dense - mine[0]["accuracy"]
                found.append(Check(network, f"loss of accuracy, two thirds of the best peer's, {what}", lost, "≤", (dense - best) * 2 / 3))
    return found


def draw(runs: list[Run], path: Path) -> list[Path]:
    """Plot accuracy and error of the logits against zeros, a column of panels a network, where matplotlib is installed; what was written."""
    runs = [run for run in runs if "error" not in run]
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
            line = sorted((100 * run["settings"]["zeros"], 100 * run["accuracy"], run["logit_error"]) for run in of(members, method=method))
            zeros, accuracy, error = zip(*line, strict=True)
            top.plot(zeros, accuracy, "o-", markersize=4, label=method)
            bottom.plot(zeros, error, "o-", markersize=4, label=method)
        top.axhline(100 * members[0]["dense_accuracy"], color="black", linewidth=0.8, linestyle=":", label="dense")
        top.set(title=TITLES[network], xlabel="zeros (%)", ylabel="test accuracy, not retrained (%)")
        positive = any(run["logit_error"] > 0 for run in members)
        bottom.set(xlabel="zeros (%)", ylabel="relative error of the logits", yscale="log" if positive else "linear")
        top.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return [path]
