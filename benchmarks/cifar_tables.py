"""Tables and checks of ``python -m benchmarks.cifar``."""

from typing import Any

from rich.console import Console

from benchmarks.cifar_networks import TITLES
from benchmarks.method_tables import of, print_table, values
from benchmarks.solver_session import Check

Run = dict[str, Any]


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
