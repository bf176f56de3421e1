"""Our supports against the certified optimum, on small programs."""

import statistics
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import nettrim
from benchmarks.neighbours.oracle import best_of_size, fewest_within, least_misfit, misfit
from benchmarks.results import Results
from nettrim.dispatch import reweighted

Run = dict[str, Any]
SIZES = (8, 10, 12)
EPSILONS = (0.1, 0.2, 0.3)
ROUNDS = 3  # of reweighting
ORACLE = ("program", "ours", "programs", "optimal", "%", "above it, mean", "at most")
TITLES = {
    "l1": "ℓ1",
    "reweighted": "reweighted ℓ1",
    "l0": "`penalty=\"l0\"`",
    "topk": "top-k",
}


def example(seed: int) -> dict[str, Any]:
    """A neuron on correlated inputs: every second one behind a ReLU; a third of its weights large, the others small.

    Returns
    -------
    dict
        ``A`` (P, N) and ``y`` (P,) in float64, ``relu``, ``epsilon`` (relative), ``k``.
    """
    draw = np.random.default_rng(seed)
    N = SIZES[seed % len(SIZES)]
    relu = bool(seed % 2)
    P = 6 * N
    A = draw.standard_normal((P, N)) + 1.5 * draw.standard_normal((P, 2)) @ draw.standard_normal((2, N))
    large = draw.permutation(N) < N // 3
    w = np.where(large, draw.choice([-1, 1], N) * (1 + draw.random(N)), 0.3 * draw.standard_normal(N))
    y = A @ w + 0.05 * draw.standard_normal(P)
    return {"A": A, "y": np.maximum(y, 0) if relu else y, "relu": relu, "epsilon": EPSILONS[(seed // 6) % len(EPSILONS)], "k": N // 2}


def ours_within(A: np.ndarray, y: np.ndarray, epsilon: float, relu: bool) -> dict[str, int]:
    """Weights that ours leave within the budget: the ℓ1 program, three rounds of reweighting, and the search for the smallest support."""

    def program(penalty: str) -> nettrim.LayerProgram:
        return nettrim.LayerProgram(
            torch.from_numpy(A), torch.from_numpy(y)[:, None], epsilon=epsilon, penalty=penalty, activation="relu" if relu else None
        )

    first = program("l1")
    solution = nettrim.solve(first, tol=1e-6)
    found = {"l1": int(solution.weights.count_nonzero())}
    for _ in range(ROUNDS):
        solution = nettrim.solve(reweighted(first, solution.weights), tol=1e-6)
    found["reweighted"] = int(solution.weights.count_nonzero())
    found["l0"] = int(nettrim.solve(program("l0")).weights.count_nonzero())
    return found


def measure(seed: int) -> Run:
    """One small program both ways round: the fewest weights within a budget, and the least misfit with k weights.

    Returns
    -------
    dict
        ``fewest`` and ``ours`` (numbers of weights); ``least`` and ``topk`` (relative discrepancies with k weights, each the best of its support,
        by the relaxed misfit); ``rounds`` of cuts.
    """
    case = example(seed)
    A, y, relu = case["A"], case["y"], case["relu"]
    norm = float(np.linalg.norm(y))
    epsilon = case["epsilon"] * norm
    optimum = fewest_within(A, y, epsilon, relu=relu)
    run: Run = {"fewest": len(optimum.support), "rounds": optimum.rounds, "ours": ours_within(A, y, epsilon, relu)}
    if not relu:  # with a ReLU their program is the paper's set, ours the relaxed one: not the same optimum
        best = best_of_size(A, y, case["k"])
        program = nettrim.LayerProgram(torch.from_numpy(A), torch.from_numpy(y)[:, None], nonzeros=case["k"], penalty="l0", activation=None)
        weights = nettrim.solve(program).weights[0].double().numpy()
        _, value = least_misfit(A, y, [int(j) for j in np.flatnonzero(weights)], relu)
        run |= {"least": best.misfit**0.5 / norm, "topk": value**0.5 / norm, "topk stored": misfit(A, y, weights, relu) ** 0.5 / norm}
    return run


def oracle_runs(programs: int, results: Results, console: Console) -> list[Run]:
    """What the results file does not hold yet is solved."""
    runs = []
    for seed in range(programs):
        settings = {"section": "oracle", "seed": seed}
        run = results.find(settings)
        if run is None:
            with console.status(f"oracle, program {seed}"):
                run = results.append(settings, measure(seed))
        runs.append(run)
    return runs


def oracle_rows(runs: list[Run]) -> list[list[str]]:
    """How often ours are optimal, and by how much they are above the optimum."""
    done = [run for run in runs if run["settings"]["section"] == "oracle" and "error" not in run]
    rows = []
    for name in ("l1", "reweighted", "l0"):
        above = [run["ours"][name] - run["fewest"] for run in done]
        if above:
            optimal = [each == 0 for each in above]
            rows.append(_row("fewest weights within a budget", TITLES[name], above, optimal, "{:.2f} weights", "{:.0f} weights"))
    ratios = [run["topk"] / run["least"] for run in done if "topk" in run]
    if ratios:
        above = [100 * (ratio - 1) for ratio in ratios]
        rows.append(_row("least error with k weights", TITLES["topk"], above, [each < 1e-3 for each in above], "{:.2f} %", "{:.1f} %"))
    return rows


def _row(program: str, name: str, above: list[float], optimal: list[bool], mean: str, most: str) -> list[str]:
    share = 100 * sum(optimal) / len(optimal)
    figures = (mean.format(statistics.fmean(above) + 0.0), most.format(max(above) + 0.0))  # no -0
    return [program, name, f"{len(above)}", f"{sum(optimal)}", f"{share:.0f}", *figures]


def oracle_table(runs: list[Run]) -> Table:
    """The same for the terminal."""
    table = Table(title="against the certified optimum", header_style="bold")
    for header in ORACLE:
        table.add_column(header)
    for row in oracle_rows(runs):
        table.add_row(*row)
    return table
