"""The two figures that the Net-Trim papers show: accuracy against density, and parallel against cascade."""

from pathlib import Path
from typing import Any

import click

from benchmarks.networks import TITLES

Run = dict[str, Any]
COLORS = {"parallel": "tab:blue", "cascade": "tab:orange"}
STYLES = {"relaxed": "-", "paper": "--"}


def _panels(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Finished runs by (network, training), each panel with its largest number of samples only, to stay readable."""
    panels: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if "error" not in run:
            panels.setdefault((run["settings"]["network"], run["settings"]["training"]), []).append(run)
    for key, members in panels.items():
        most = max(run["settings"]["samples"] for run in members)
        panels[key] = [run for run in members if run["settings"]["samples"] == most]
    return panels


def _series(runs: list[Run], mode: str, consistency: str) -> list[Run]:
    """The runs of one mode and set, in the order of epsilon."""
    chosen = [r for r in runs if (r["settings"]["mode"], r["settings"]["consistency"]) == (mode, consistency)]
    return sorted(chosen, key=lambda run: run["settings"]["epsilon"])


def _title(key: tuple[str, str], runs: list[Run]) -> str:
    return f"{TITLES[key[0]]}, {key[1]}, P = {runs[0]['settings']['samples']:,}"


def accuracy_against_density(runs: list[Run], path: Path) -> None:
    """Plot test accuracy without retraining against the share of weights kept, Net-Trim against magnitude pruning.

    Parameters
    ----------
    runs : list of dict
        Runs of the results file; failed ones are left out.
    path : Path
        File to write; its suffix decides the format.
    """
    from matplotlib.figure import Figure

    panels = _panels(runs)
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, members) in zip(axes, panels.items(), strict=True):
        for mode, color in COLORS.items():
            for consistency, style in STYLES.items():
                line = _series(members, mode, consistency)
                if line:
                    x, y = [100 * r["density"] for r in line], [100 * r["accuracy"] for r in line]
                    label = f"Net-Trim, {mode}, {consistency} set"
                    axis.plot(x, y, style, color=color, marker="o", markersize=4, label=label)
        baseline = sorted((100 * r["density"], 100 * r["magnitude"]["accuracy"]) for r in members)
        axis.plot(*zip(*baseline, strict=True), "x", color="tab:gray", markersize=5, label="magnitude, same nonzeros")
        axis.axhline(100 * members[0]["dense_accuracy"], color="black", linewidth=0.8, linestyle=":", label="dense")
        axis.set(title=_title(key, members), xlabel="weights kept (%)", ylabel="test accuracy, not retrained (%)")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def parallel_against_cascade(runs: list[Run], path: Path) -> None:
    """Plot density and the output's discrepancy, promised and measured, against epsilon, for both modes.

    Parameters
    ----------
    runs : list of dict
        Runs of the results file; failed ones are left out. The relaxed set is shown where it was run.
    path : Path
        File to write; its suffix decides the format.
    """
    from matplotlib.figure import Figure

    panels = _panels(runs)
    figure = Figure(figsize=(6 * len(panels), 8), layout="constrained")
    rows = figure.subplots(2, len(panels), squeeze=False)
    for column, (key, members) in enumerate(panels.items()):
        sets = {run["settings"]["consistency"] for run in members}
        shown = "relaxed" if "relaxed" in sets else "paper"
        density, discrepancy = rows[0][column], rows[1][column]
        for mode, color in COLORS.items():
            line = _series(members, mode, shown)
            if not line:
                continue
            x = [run["settings"]["epsilon"] for run in line]
            density.plot(x, [100 * run["density"] for run in line], "o-", color=color, label=mode)
            measured = [run["measured"] for run in line]
            discrepancy.plot(x, measured, "o-", color=color, label=f"{mode}, measured")
            promised = [(e, run["guaranteed"]) for e, run in zip(x, line, strict=True) if run["guaranteed"] is not None]
            if promised:
                discrepancy.plot(*zip(*promised, strict=True), ":", color=color, label=f"{mode}, guaranteed")
        density.set(title=f"{_title(key, members)}, {shown} set", ylabel="weights kept (%)", xlabel="epsilon")
        discrepancy.set(ylabel="logits' relative discrepancy", xlabel="epsilon", yscale="log")
        density.legend(fontsize="small")
        discrepancy.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw(runs: list[Run], results: Path) -> list[Path]:
    """Write both figures beside the results file, where matplotlib is installed and a run has finished.

    Returns
    -------
    list of Path
        The files written.
    """
    if all("error" in run for run in runs):
        return []
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        click.echo("No figures: matplotlib is not installed (pip install 'nettrim[plot]').", err=True)
        return []
    paths = [results.with_name(f"{results.stem}-accuracy.png"), results.with_name(f"{results.stem}-modes.png")]
    accuracy_against_density(runs, paths[0])
    parallel_against_cascade(runs, paths[1])
    return paths
