"""``python -m benchmarks.recovery``: how many samples a sparse layer needs to be found again.

Theorem 3 of the 2017 paper (Aghasi et al., NIPS 2017): let the inputs be standard Gaussian and the outputs
``relu(⟨w, x⟩)`` for weights with ``s`` nonzeros among ``N``. Then ``P = (11 s + 7) log N`` samples suffice, with high
probability, for ``w`` to be the one solution of the program with ``ε = 0``. This benchmark plants such weights and
shows where recovery begins, over the ratio ``P / (s log N)``; the theorem's own ``P`` is the last column.
"""

import itertools
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import nettrim
from benchmarks.options import Numbers, open_console
from benchmarks.results import Results
from nettrim.errors import NetTrimError

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "recovery.json"
# ε = 0 is not a budget that a numerical solver can meet: this share of ‖Y‖ stands for it.
EPSILON = 1e-4
# A neuron is recovered when its error is below this share of ‖w‖: far above what EPSILON allows near the truth, far
# below the distance of another solution.
RECOVERED = 1e-2


def plant(inputs: int, nonzeros: int, neurons: int, generator: torch.Generator) -> Tensor:
    """Weights (neurons, inputs), float64, with ``nonzeros`` standard Gaussian entries at random places in each row."""
    places = torch.rand(neurons, inputs, generator=generator).argsort(dim=1)[:, :nonzeros]
    values = torch.randn(neurons, nonzeros, generator=generator, dtype=torch.float64)
    return torch.zeros(neurons, inputs, dtype=torch.float64).scatter_(1, places, values)


def sufficient_samples(inputs: int, nonzeros: int) -> int:
    """``⌈(11 s + 7) log N⌉``, the number of samples that Theorem 3 asks for."""
    return math.ceil((11 * nonzeros + 7) * math.log(inputs))


def recover(settings: dict[str, Any]) -> dict[str, Any]:
    """Plant layers, solve for them, and count the neurons found again.

    Parameters
    ----------
    settings : dict
        ``inputs`` N, ``nonzeros`` s, ``samples`` P, ``neurons`` in a layer, ``trials`` (layers, each with samples of
        its own), ``consistency``, ``solver`` and ``seed``.

    Returns
    -------
    dict
        ``success``, the share of neurons recovered, in [0, 1]; ``errors``, the relative error of each; ``statuses`` of
        the trials; ``seconds``.

    Raises
    ------
    NetTrimError
        If a program was refused.
    """
    generator = torch.Generator().manual_seed(settings["seed"])
    errors: list[float] = []
    statuses: list[str] = []
    start = time.perf_counter()
    for _ in range(settings["trials"]):
        planted = plant(settings["inputs"], settings["nonzeros"], settings["neurons"], generator)
        samples = torch.randn(settings["samples"], settings["inputs"], generator=generator, dtype=torch.float64)
        outputs = (samples @ planted.T).relu()
        program = nettrim.LayerProgram(
            samples,
            outputs,
            epsilon=EPSILON * float(outputs.norm()),
            activation="relu",
            consistency=settings["consistency"],
        )
        solution = nettrim.solve(program, solver=settings["solver"])
        errors += ((solution.weights - planted).norm(dim=1) / planted.norm(dim=1)).tolist()
        statuses.append(solution.status)
    return {
        "success": sum(error < RECOVERED for error in errors) / len(errors),
        "errors": errors,
        "statuses": statuses,
        "seconds": time.perf_counter() - start,
    }


def _cells(inputs: int, sparsities: tuple[int, ...], ratios: tuple[float, ...]) -> list[tuple[int, str, int]]:
    """(s, heading, P) for every cell of the table, the theorem's P at the end of each row."""
    cells: list[tuple[int, str, int]] = []
    for nonzeros in sparsities:
        cells += [(nonzeros, f"{r:g}", math.ceil(r * nonzeros * math.log(inputs))) for r in ratios]
        cells.append((nonzeros, "theorem", sufficient_samples(inputs, nonzeros)))
    return cells


def _table(runs: dict[tuple[int, str], dict[str, Any]], inputs: int) -> Table:
    """Success by sparsity (rows) and samples (columns)."""
    table = Table(
        title=f"Neurons recovered (%) and samples, N = {inputs}, by P / (s log N)",
        caption="in brackets: P; theorem: P = (11 s + 7) log N",
        header_style="bold",
    )
    table.add_column("s", justify="right")
    headings = list(dict.fromkeys(heading for _, heading in runs))
    for heading in headings:
        table.add_column(heading, justify="right")
    for nonzeros in dict.fromkeys(nonzeros for nonzeros, _ in runs):
        row = [runs[nonzeros, heading] for heading in headings]
        texts = ["failed" if "error" in r else f"{100 * r['success']:.0f}\n({r['settings']['samples']})" for r in row]
        table.add_row(str(nonzeros), *texts)
    return table


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot the share of neurons recovered against P / (s log N), a line a sparsity.

    Parameters
    ----------
    runs : list of dict
        Runs of the results file; failed ones are left out.
    path : Path
        File to write; its suffix decides the format.

    Raises
    ------
    click.ClickException
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise click.ClickException("--plot needs matplotlib: pip install 'nettrim[plot]'.") from error

    def nonzeros(run: dict[str, Any]) -> int:
        return int(run["settings"]["nonzeros"])

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    finished = sorted((run for run in runs if "error" not in run), key=nonzeros)
    for sparsity, line in itertools.groupby(finished, key=nonzeros):
        points = []
        for run in line:
            settings = run["settings"]
            points.append((settings["samples"] / (sparsity * math.log(settings["inputs"])), 100 * run["success"]))
        axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=f"s = {sparsity}")
    axis.set(xlabel="P / (s log N)", ylabel="neurons recovered (%)", xscale="log")
    axis.legend()
    figure.savefig(path, dpi=120)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--inputs", type=click.IntRange(min=2), default=100, show_default=True, help="N, inputs of the layer.")
@click.option("--sparsities", type=Numbers(int), default="2,4,8", show_default=True, help="s, nonzeros of a neuron.")
@click.option("--ratios", type=Numbers(float), default="1,1.5,2,3,4,6,8", show_default=True, help="P / (s log N).")
@click.option("--neurons", type=click.IntRange(min=1), default=10, show_default=True, help="Neurons in a layer.")
@click.option("--trials", type=click.IntRange(min=1), default=5, show_default=True, help="Layers in a cell.")
@click.option("--set", "consistency", type=click.Choice(["paper", "relaxed"]), default="paper", show_default=True)
@click.option("--solver", default="admm", show_default=True, help="As for nettrim.solve; 'cvxpy' takes both sets.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the curves into this file.")
def main(
    inputs: int,
    sparsities: tuple[int, ...],
    ratios: tuple[float, ...],
    neurons: int,
    trials: int,
    consistency: str,
    solver: str,
    seed: int,
    out: Path,
    plot: Path | None,
) -> None:
    """Plant sparse ReLU layers, solve for them from Gaussian samples, and show where recovery begins.

    Each cell of the table is the share of neurons recovered (neurons x trials of them), with the number of samples.
    Every cell is written to the results file as soon as it is done, and is not repeated by the next call.
    """
    if max(sparsities) > inputs:
        raise click.UsageError(f"--sparsities: a neuron of {inputs} inputs cannot have {max(sparsities)} nonzeros.")
    console = open_console()
    results = Results(out, "recovery")
    runs: dict[tuple[int, str], dict[str, Any]] = {}
    with Progress(console=console, transient=True) as progress:
        cells = _cells(inputs, sparsities, ratios)
        for nonzeros, heading, samples in progress.track(cells, description="recovery"):
            settings = {
                "inputs": inputs,
                "nonzeros": nonzeros,
                "samples": samples,
                "neurons": neurons,
                "trials": trials,
                "consistency": consistency,
                "solver": solver,
                "seed": seed,
            }
            done = results.find(settings)
            if done is None:
                try:
                    done = results.append(settings, recover(settings))
                except NetTrimError as error:
                    done = results.append(settings, {"error": f"{type(error).__name__}: {error}"})
                    console.print(f"[red]failed[/red] s = {nonzeros}, P = {samples}: {error}")
            runs[nonzeros, heading] = done
    console.print(_table(runs, inputs))
    console.print(f"written: {out}", highlight=False, soft_wrap=True)
    if plot is not None:
        draw(list(runs.values()), plot)
        console.print(f"written: {plot}", highlight=False, soft_wrap=True)
    failed = [run for run in runs.values() if "error" in run]
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(runs)} cells failed; see {out}.")


if __name__ == "__main__":
    main()
