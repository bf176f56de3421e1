"""``python -m benchmarks.convolution``: one convolution's budget, its patches held, streamed, or never unfolded.

The second convolution of the ConvNet (5 × 5, 64 to 64 channels) on a few of CIFAR-10's test images, on the dense network's inputs; every
way in a process of its own. With ``--data digits`` a convolution of the tiny network.
"""

import time
from typing import Any

import click
import torch
from torch import Tensor, nn

import nettrim
from benchmarks.cifar_data import LOADERS, centres
from benchmarks.cifar_networks import RECIPES, load_or_train
from benchmarks.memory import PeakMemory
from benchmarks.method_tables import print_table
from benchmarks.options import open_console
from benchmarks.results import environment
from benchmarks.solver_session import in_a_process
from nettrim import capture, layers
from nettrim.calibration import runner
from nettrim.operators import Convolution, of_matrix

# How the inputs are given, and which solver takes them: the first three unfold them.
WAYS = {
    "patches held": ("held", "auto"),
    "patches held, the papers' admm": ("held", "admm"),
    "patches streamed": ("streamed", "auto"),
    "the convolution itself, cg_admm": ("operator", "cg_admm"),
}
SETS: dict[str, dict[str, Any]] = {"relaxed": {}, "paper": {"consistency": "paper"}, "no ReLU": {"activation": None}}


def layer_of(data_name: str, images: int) -> tuple[Convolution, Tensor]:
    """The convolution's inputs, as the operator, and its outputs (P, M)."""
    data = LOADERS[data_name]()
    network = "convnet" if data_name == "cifar" else "tiny"
    model = load_or_train(data, network, RECIPES[network]).model
    matrix = [found for found in layers.matrices(model).values() if isinstance(found.module, nn.Conv2d)][1]
    ((kept, Z, _),) = capture.kept(model, [centres(data.test[:images])], runner(None), matrix)
    return of_matrix(matrix, 0, kept), Z


def measure(data_name: str, images: int, way: str, which: str, share: float, tol: float, max_iter: int, threads: int) -> dict[str, Any]:
    """One solve: seconds and bytes of program and solver together, the rows' unfolding included."""
    torch.set_num_threads(threads)
    operator, Z = layer_of(data_name, images)
    options = SETS[which]
    Y = Z if which == "no ReLU" else Z.clamp(min=0)
    form, solver = WAYS[way]
    epsilon = share * float(Y.norm())
    start = time.perf_counter()
    with PeakMemory() as memory:
        inputs: Any = {"held": lambda: torch.cat(list(operator())), "streamed": lambda: operator.__call__, "operator": lambda: operator}[form]()
        solution = nettrim.solve(nettrim.LayerProgram(inputs, Y, epsilon=epsilon, **options), solver, tol=tol, max_iter=max_iter)
    return {
        "seconds": time.perf_counter() - start,
        "extra_bytes": memory.extra,
        "solver": solution.solver,
        "status": solution.status,
        "objective": solution.objective,
        "gap": solution.gap,
        "iterations": solution.iterations,
        "shape": (operator.rows, operator.width, Y.shape[1]),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", "data_name", type=click.Choice(list(LOADERS)), default="cifar", show_default=True)
@click.option("--images", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--epsilon", type=click.FloatRange(min=0, min_open=True), default=0.1, show_default=True, help="Budget, relative.")
@click.option("--tol", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True, help="Gap asked for.")
@click.option("--max-iter", type=click.IntRange(min=1), default=1000, show_default=True, help="Iterations, at most.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(data_name: str, images: int, epsilon: float, tol: float, max_iter: int, threads: int) -> None:
    """Time and memory of the ways to solve for a convolution. Exits with 1 where they disagree on the optimum by more than their gaps."""
    console = open_console()
    apart = []
    shape: tuple[int, ...] = ()
    for which in SETS:
        rows, found = [], []
        for way, (_, solver) in WAYS.items():
            if solver == "admm" and which == "relaxed":
                continue  # it does not take that set
            if way == "patches streamed" and which == "paper":
                continue  # no solver takes that set of rows that are streamed
            run = in_a_process(measure, data_name, images, way, which, epsilon, tol, max_iter, threads)
            shape = run["shape"]
            found.append(run)
            memory = "–" if run["extra_bytes"] is None else f"{run['extra_bytes'] / 2**20:,.0f}"
            figures = (f"{run['objective']:.4f}", f"{run['gap']:.1e}", str(run["iterations"]), f"{run['seconds']:.1f}", memory)
            rows.append((way, run["solver"], run["status"], *figures))
        print_table(
            console,
            f"{which}: P, N, M = {', '.join(f'{size:,}' for size in shape)}, epsilon {epsilon:g}, tolerance {tol:g}",
            ("inputs", "solver", "status", "objective", "gap", "iterations", "s", "peak MiB beyond the input"),
            rows,
        )
        proven = [run for run in found if run["status"] == "optimal"]
        if proven and max(run["objective"] for run in proven) > min(run["objective"] for run in proven) * (1 + 3 * tol):
            apart.append(which)
    console.print(environment())
    if apart:
        raise click.ClickException(f"the ways disagree on the optimum: {', '.join(apart)}.")


if __name__ == "__main__":
    main()
