"""Tables and the plot of ``python -m benchmarks.sparsity``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.networks import TITLES
from benchmarks.solver_session import Check

Run = dict[str, Any]


def print_table(console: Console, title: str, headers: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> None:
    """A table with its first column to the left: boxed on a terminal, Markdown elsewhere, to go into a page as it is."""
    table = Table(title=title, caption=caption or None, header_style="bold", box=HEAVY_HEAD if console.is_terminal else MARKDOWN)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _of(runs: list[Run], **wanted: Any) -> list[Run]:
    """The runs with these settings."""
    return [run for run in runs if all(run["settings"].get(key) == value for key, value in wanted.items())]


def _values(runs: list[Run], key: str) -> list[Any]:
    """The values of a setting, each once, in the order of the runs."""
    return list(dict.fromkeys(run["settings"][key] for run in runs))


def _share(kept: float | str) -> str:
    return kept if isinstance(kept, str) else f"{100 * kept:g} %"


def _network_cell(run: Run) -> str:
    if "error" in run:
        return "failed"
    warning = "" if run["within"] else " (keeps too many)"
    return f"{100 * run['accuracy']:.2f} / {run['logit_error']:.3f} / {run['seconds']:.2f}{warning}"


def network_tables(console: Console, runs: list[Run]) -> None:
    """A table a network: accuracy, error of the logits and processor seconds, methods against shares; and one of the errors of its layers."""
    for network in _values(runs, "network"):
        members = _of(runs, network=network)
        shares = _values(members, "kept")
        settings = members[0]["settings"]
        dense = next((f"dense: {100 * run['dense_accuracy']:.2f} %; " for run in members if "error" not in run), "")
        print_table(
            console,
            f"{TITLES[network]}: test accuracy % / relative error of the logits / seconds of processor time, by weights kept",
            ("method", *map(_share, shares)),
            [
                (method, *(_network_cell(run) for share in shares for run in _of(members, method=method, kept=share)))
                for method in _values(members, "method")
            ],
            f"{dense}cascade, {settings['samples']:,} samples, last layer kept at {_share(settings['last'])}, not retrained",
        )
        done = [run for run in members if "error" not in run]
        if done:
            rows = [
                (run["settings"]["method"], _share(run["settings"]["kept"]), *(f"{error:.4f}" for error in run["layer_errors"].values()))
                for share in shares
                for run in _of(done, kept=share)
            ]
            names = (f"layer {name}" for name in done[0]["layer_errors"])
            print_table(console, f"{TITLES[network]}: relative error of each layer's output", ("method", "kept", *names), rows)


def layer_tables(console: Console, runs: list[Run]) -> None:
    """The section ``minilm``: mean relative error over the layers and processor seconds, methods against shares."""
    shares = _values(runs, "kept")
    rows = []
    for method in _values(runs, "method"):
        found = [run for share in shares for run in _of(runs, method=method, kept=share)]
        rows.append((method, *("failed" if "error" in run else f"{run['mean_error']:.4f} / {run['seconds']:.1f}" for run in found)))
    count = next((len(run["layers"]) for run in runs if "error" not in run), 0)
    title = "all-MiniLM-L6-v2: mean relative error / seconds of processor time, by weights kept"
    caption = f"{count} linear layers, each by itself on {runs[0]['settings']['rows']:,} tokens"
    print_table(console, title, ("method", *map(_share, shares)), rows, caption)


def network_checks(runs: list[Run], ours: str, by_layer: str, peer: str = "alps") -> list[Check]:
    """What is asked of ours, as far as these runs can tell: the figures of the project at the full size, and ALPS in the same call."""
    checks = []
    wanted = {0.1: (0.9825, 0.060), 0.05: (0.9815, 0.090)}
    for network in _values(runs, "network"):
        for share in _values(runs, "kept"):
            found = [_of(runs, network=network, kept=share, method=method) for method in (ours, peer)]
            if any(not one or "error" in one[0] for one in found):
                continue
            (mine,), (theirs,) = found
            what = f"{_share(share)} kept"
            if network == "fc" and share in wanted:
                checks.append(Check(network, f"accuracy, {what}", mine["accuracy"], "≥", wanted[share][0]))
                checks.append(Check(network, f"error of the logits, {what}", mine["logit_error"], "≤", wanted[share][1]))
            elif share < 0.05:
                lost, allowed = (mine["dense_accuracy"] - run["accuracy"] for run in (mine, theirs))
                checks.append(Check(network, f"loss of accuracy, half of {peer}'s, {what}", lost, "≤", allowed / 2))
            checks.append(Check(network, f"seconds, {peer}'s, {what}", mine["seconds"], "≤", theirs["seconds"]))
            for run in _of(runs, network=network, kept=share, method=by_layer):
                if "error" not in run:
                    worst = max(error / theirs["layer_errors"][name] for name, error in run["layer_errors"].items())
                    checks.append(Check(network, f"{by_layer}: a layer's error over {peer}'s, the worst, {what}", worst, "≤", 1.0))
    return checks


def option_checks(runs: list[Run]) -> list[Check]:
    """The same for the section ``options``."""
    checks = []
    fewest = {0.05: 0.65, 0.1: 0.5, 0.2: 0.28}
    for network in _values(runs, "network"):
        done = {run["settings"]["case"]: run for run in _of(runs, network=network) if "error" not in run}
        for case, run in done.items():
            even = done.get(case.replace(", auto", ", uniform"))
            if case.endswith(", auto") and even is not None:
                checks.append(Check(network, f"error of the logits, {case}, against uniform", run["logit_error"], "≤", even["logit_error"]))
            papers = done.get(case.replace(", l0", ", l1"))
            if case.endswith(", l0") and papers is not None:
                asked = next(share for epsilon, share in fewest.items() if case == f"epsilon {epsilon:g}, l0")
                checks.append(Check(network, f"weights over the papers' program's, {case}", run["density"] / papers["density"], "≤", asked))
            if case == "half the neurons":
                checks.append(Check(network, f"loss of accuracy, {case}", run["dense_accuracy"] - run["accuracy"], "≤", 0.005))
    return checks


def layer_checks(runs: list[Run], ours: str, peer: str = "alps") -> list[Check]:
    """The same for the section ``minilm``."""
    checks = []
    for share in _values(runs, "kept"):
        found = [_of(runs, kept=share, method=method) for method in (ours, peer)]
        if any(not one or "error" in one[0] for one in found):
            continue
        (mine,), (theirs,) = found
        checks += [
            Check("minilm", f"mean error, {peer}'s, {_share(share)} kept", mine["mean_error"], "≤", theirs["mean_error"]),
            Check("minilm", f"seconds, {peer}'s, {_share(share)} kept", mine["seconds"], "≤", theirs["seconds"]),
        ]
    return checks


def print_checks(console: Console, checks: list[Check], full: bool) -> None:
    """What was asked for and what was found."""
    if checks:
        title = "what was asked for" + ("" if full else " of the full size, which this is not")
        rows = [(c.section, c.what, f"{c.found:.4g}", f"{c.relation} {c.asked:.4g}", "yes" if c.met else "NO") for c in checks]
        print_table(console, title, ("section", "figure", "found", "asked", "met"), rows)


def option_table(console: Console, runs: list[Run]) -> None:
    """A table a network of the section ``options``: what was asked for, what is kept of all weights, and what it cost."""
    for network in _values(runs, "network"):
        rows = []
        for run in _of(runs, network=network):
            name = run["settings"]["case"]
            if "error" in run:
                rows.append((name, "failed", "", "", "", "", ""))
                continue
            figures = (f"{100 * run['density']:.2f}", f"{100 * run['accuracy']:.2f}", f"{run['logit_error']:.3f}", "yes" if run["holds"] else "NO")
            rows.append((name, *figures, f"{run['seconds']:.1f}", f"{run['speed_up']:.2f}" if "speed_up" in run else "–"))
        print_table(
            console,
            f"{TITLES[network]}: other ways to ask",
            ("asked", "kept % of all weights", "accuracy %", "error of the logits", "certificate holds", "s", "dense / shrunk forward pass"),
            rows,
            "sparsity, neurons: cascade; epsilon: parallel, every layer's own budget",
        )


def draw(runs: list[Run], path: Path) -> list[Path]:
    """Plot accuracy and error of the logits against density, a column of panels a network, where matplotlib is installed.

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
    networks = _values(runs, "network")
    figure = Figure(figsize=(6 * len(networks), 8), layout="constrained")
    rows = figure.subplots(2, len(networks), squeeze=False)
    for column, network in enumerate(networks):
        members = _of(runs, network=network)
        top, bottom = rows[0][column], rows[1][column]
        for method in _values(members, "method"):
            line = sorted((100 * run["density"], 100 * run["accuracy"], run["logit_error"]) for run in _of(members, method=method))
            density, accuracy, error = zip(*line, strict=True)
            top.plot(density, accuracy, "o-", markersize=4, label=method)
            bottom.plot(density, error, "o-", markersize=4, label=method)
        top.axhline(100 * members[0]["dense_accuracy"], color="black", linewidth=0.8, linestyle=":", label="dense")
        top.set(title=TITLES[network], xlabel="weights kept (%)", ylabel="test accuracy, not retrained (%)", xscale="log")
        bottom.set(xlabel="weights kept (%)", ylabel="relative error of the logits", xscale="log", yscale="log")
        for axis in (top, bottom):
            axis.set_xticks([], minor=True)
            axis.set_xticks([100 * share for share in _values(members, "kept")], [f"{100 * share:g}" for share in _values(members, "kept")])
        top.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return [path]
