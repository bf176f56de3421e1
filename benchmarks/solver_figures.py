"""The solver benchmark's plots: the proven gap against time, and time against size."""

import itertools
from pathlib import Path
from typing import Any

import click

from benchmarks.solver_mnist import LAYER
from benchmarks.solver_scaling import GROWTH, GROWTH_KINDS, exponent
from benchmarks.solver_session import Run, Session

FLOOR = 1e-8  # where a gap of 0 is drawn


def gap_against_time(runs: list[Run], path: Path) -> None:
    """Plot proven gap and distance from the best bound over the seconds of a solve.

    Parameters
    ----------
    runs : list of dict
        Of the section ``mnist-layer1``.
    path : Path
        File to write; its suffix decides the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    history = [run for run in runs if "cap" in run["settings"]]
    bound = max(run["lower_bound"] for run in history)
    above = [{**run, "above": run["objective"] / bound - 1} for run in history if run["feasible"] and bound > 0]
    for members, key, style, label in ((history, "gap", "o-", "proven gap"), (above, "above", "x:", "above the best bound")):
        points = [(run["seconds"], max(run[key], FLOOR)) for run in members if run[key] is not None]
        if points:
            axis.plot(*_columns(points), style, color="tab:blue", markersize=4, label=f"relaxed set, {label}")
    peers = [run for run in runs if "authors'" in run["settings"]["case"]]
    for run, style in zip(peers, itertools.cycle(("--", "-.", ":")), strict=False):
        label = f"{run['settings']['case']}: no bound"
        axis.axvline(run["seconds"], color="tab:gray", linestyle=style, linewidth=1, label=label)
    axis.set(xlabel="seconds", ylabel="relative gap", xscale="log", yscale="log", title=_title(runs[0]["settings"]))
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = sorted(points)
    return [x for x, _ in points], [y for _, y in points]


def _title(settings: dict[str, Any]) -> str:
    return f"{settings['data']}, layer 1: P = {settings['P']:,}, N = {settings['N']}, M = {settings['M']}"


def time_against_size(runs: list[Run], path: Path) -> None:
    """Plot seconds over P, N and M, a panel each, with the fitted exponents.

    Parameters
    ----------
    runs : list of dict
        Of the section ``growth``.
    path : Path
        File to write; its suffix decides the format.
    """
    from matplotlib.figure import Figure

    letters = list(dict.fromkeys(run["settings"]["varied"] for run in runs))
    figure = Figure(figsize=(4.5 * len(letters), 4), layout="constrained")
    for axis, letter in zip(figure.subplots(1, len(letters), squeeze=False)[0], letters, strict=True):
        for kind in GROWTH_KINDS:
            line = [run for run in runs if run["settings"]["varied"] == letter and run["settings"]["kind"] == kind]
            x, y = _columns([(run["settings"][letter], run["seconds"]) for run in line])
            power = f", power {exponent(x, y):.2f}" if len(set(x)) > 1 else ""
            axis.plot(x, y, "o-", markersize=4, label=f"{kind}{power}")
        axis.set(xlabel=letter, ylabel="seconds", xscale="log", yscale="log")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw(session: Session, results: Path) -> list[Path]:
    """Write the plots of what this call measured beside the results file, where matplotlib is installed.

    Returns
    -------
    list of Path
        The files written.
    """
    plots = {LAYER: gap_against_time, GROWTH: time_against_size}
    wanted = {section: plot for section, plot in plots.items() if session.of(section)}
    if not wanted:
        return []
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        click.echo("No figures: matplotlib is not installed (pip install 'nettrim[plot]').", err=True)
        return []
    paths = []
    for section, plot in wanted.items():
        path = results.with_name(f"{results.stem}-{section}.png")
        plot(session.of(section), path)
        paths.append(path)
    return paths
