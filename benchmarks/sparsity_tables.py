"""Tables and checks of ``python -m benchmarks.sparsity``."""

from typing import Any

from rich.console import Console

from benchmarks.method_tables import of, print_table, values
from benchmarks.networks import TITLES
from benchmarks.solver_session import Check

Run = dict[str, Any]


def _share(kept: float | str) -> str:
    return kept if isinstance(kept, str) else f"{100 * kept:g} %"


def _network_cell(run: Run) -> str:
    if "error" in run:
        return "failed"
    warning = "" if run["within"] else " (keeps too many)"
    return f"{100 * run['accuracy']:.2f} / {run['logit_error']:.3f} / {run['seconds']:.2f}{warning}"


def network_tables(console: Console, runs: list[Run]) -> None:
    """A table a network: accuracy, error of the logits and processor seconds, methods against shares; and one of the errors of its layers."""
    for network in values(runs, "network"):
        members = of(runs, network=network)
        shares = values(members, "kept")
        settings = members[0]["settings"]
        dense = next((f"dense: {100 * run['dense_accuracy']:.2f} %; " for run in members if "error" not in run), "")
        print_table(
            console,
            f"{TITLES[network]}: test accuracy % / relative error of the logits / seconds of processor time, by weights kept",
            ("method", *map(_share, shares)),
            [
                (method, *(_network_cell(run) for share in shares for run in of(members, method=method, kept=share)))
                for method in values(members, "method")
            ],
            f"{dense}cascade, {settings['samples']:,} samples, last layer kept at {_share(settings['last'])}, not retrained",
        )
        done = [run for run in members if "error" not in run]
        if done:
            rows = [
                (run["settings"]["method"], _share(run["settings"]["kept"]), *(f"{error:.4f}" for error in run["layer_errors"].values()))
                for share in shares
                for run in of(done, kept=share)
            ]
            names = (f"layer {name}" for name in done[0]["layer_errors"])
            print_table(console, f"{TITLES[network]}: relative error of each layer's output", ("method", "kept", *names), rows)


def layer_tables(console: Console, runs: list[Run]) -> None:
    """The section ``minilm``: mean relative error over the layers and processor seconds, methods against shares."""
    shares = values(runs, "kept")
    rows = []
    for method in values(runs, "method"):
        found = [run for share in shares for run in of(runs, method=method, kept=share)]
        rows.append((method, *("failed" if "error" in run else f"{run['mean_error']:.4f} / {run['seconds']:.1f}" for run in found)))
    count = next((len(run["layers"]) for run in runs if "error" not in run), 0)
    title = "all-MiniLM-L6-v2: mean relative error / seconds of processor time, by weights kept"
    caption = f"{count} linear layers, each by itself on {runs[0]['settings']['rows']:,} tokens"
    print_table(console, title, ("method", *map(_share, shares)), rows, caption)


def network_checks(runs: list[Run], ours: str, by_layer: str, peer: str = "alps") -> list[Check]:
    """What is asked of ours, as far as these runs can tell: the figures of the project at the full size, and ALPS in the same call."""
    checks = []
    wanted = {0.1: (0.9825, 0.060), 0.05: (0.9815, 0.090)}
    for network in values(runs, "network"):
        for share in values(runs, "kept"):
            found = [of(runs, network=network, kept=share, method=method) for method in (ours, peer)]
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
            for run in of(runs, network=network, kept=share, method=by_layer):
                if "error" not in run:
                    worst = max(error / theirs["layer_errors"][name] for name, error in run["layer_errors"].items())
                    checks.append(Check(network, f"{by_layer}: a layer's error over {peer}'s, the worst, {what}", worst, "≤", 1.0))
    return checks


def option_checks(runs: list[Run]) -> list[Check]:
    """The same for the section ``options``."""
    checks = []
    fewest = {0.05: 0.65, 0.1: 0.5, 0.2: 0.28}
    for network in values(runs, "network"):
        done = {run["settings"]["case"]: run for run in of(runs, network=network) if "error" not in run}
        for case, run in done.items():
            even = done.get(case.replace(", auto", ", uniform"))
            if case.endswith(", auto") and even is not None:
                checks.append(Check(network, f"error of the logits, {case}, against uniform", run["logit_error"], "≤", even["logit_error"]))
            papers = done.get(case.replace(", l0", ", the papers'"))
            if case.endswith(", l0") and papers is not None:
                asked = next(share for epsilon, share in fewest.items() if case == f"epsilon {epsilon:g}, l0")
                checks.append(Check(network, f"weights over the papers' program's, {case}", run["density"] / papers["density"], "≤", asked))
                for name, count in run["nonzeros"].items():
                    what = f"weights over the papers' program's, {case}, layer {name}"
                    checks.append(Check(network, what, count / max(papers["nonzeros"][name], 1), "≤", asked))
            if case == "half the neurons":
                checks.append(Check(network, f"loss of accuracy, {case}", run["dense_accuracy"] - run["accuracy"], "≤", 0.005))
    return checks


def layer_checks(runs: list[Run], ours: str, peer: str = "alps") -> list[Check]:
    """The same for the section ``minilm``."""
    checks = []
    for share in values(runs, "kept"):
        found = [of(runs, kept=share, method=method) for method in (ours, peer)]
        if any(not one or "error" in one[0] for one in found):
            continue
        (mine,), (theirs,) = found
        checks += [
            Check("minilm", f"mean error, {peer}'s, {_share(share)} kept", mine["mean_error"], "≤", theirs["mean_error"]),
            Check("minilm", f"seconds, {peer}'s, {_share(share)} kept", mine["seconds"], "≤", theirs["seconds"]),
        ]
    return checks


def option_table(console: Console, runs: list[Run]) -> None:
    """A table a network of the section ``options``: what was asked for, what is kept of all weights, and what it cost."""
    for network in values(runs, "network"):
        rows = []
        for run in of(runs, network=network):
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
