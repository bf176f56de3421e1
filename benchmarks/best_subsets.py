"""``python -m benchmarks.best_subsets``: how few weights a network's last layer can have within a budget, every support tried.

Without a ReLU the outputs share nothing but the budget. The least misfit of an output with k of its weights, and a bias that is free, is a best
subset: here by trying all subsets, which 100 inputs allow for k up to 5. More than that counts as if it left no misfit, so what follows is a
bound: fewer weights there cannot be, whatever finds them. (Of two inputs whose directions differ by less than 1e-5 one is taken to do for both.)
Beside it stand the papers' program and ``penalty="l0"`` at the same budget.
"""

import math
from typing import Any

import click
import torch
from torch import Tensor, nn

import nettrim
from benchmarks.data import LOADERS, load
from benchmarks.method_tables import print_table
from benchmarks.mnist import calibration_samples, linear_layers
from benchmarks.networks import RECIPES, TITLES, load_or_train
from benchmarks.options import Choices, open_console
from benchmarks.results import environment

_LARGEST = 5  # weights of an output
_COLLINEAR = 1e-10  # of a pair's determinant: below it the second adds nothing


def least_misfits(A: Tensor, Y: Tensor, largest: int = _LARGEST) -> Tensor:
    """The least ``‖A w + b − y_m‖²`` over ``w`` with at most k nonzeros and ``b``, for every output m and k up to ``largest``: (largest + 1, M).

    Parameters
    ----------
    A : Tensor, shape (P, N)
    Y : Tensor, shape (P, M)
    largest : int
        At least 2.
    """
    A, Y = (X.double() - X.double().mean(0) for X in (A, Y))
    A = A[:, A.square().sum(0) > 0]
    G, C, left = A.T @ A, A.T @ Y, Y.square().sum(0)
    scale = G.diagonal().sqrt()
    best = torch.full((largest + 1, Y.shape[1]), math.inf, dtype=torch.float64)
    best[0] = left
    _try_all(G / scale / scale[:, None], C / scale[:, None], left, 0, best)
    return best.cummin(0).values.clamp(min=0)


def _try_all(H: Tensor, R: Tensor, left: Tensor, chosen: int, best: Tensor) -> None:
    """Add one or two of the columns that remain; and one, and then more behind it.

    ``H`` (n, n) and ``R`` (n, M) are their Gram matrix and correlations with the outputs, orthogonal to what was ``chosen``; ``left`` (M,) are the
    outputs' misfits.
    """
    if len(H) == 0:
        return
    diagonal = H.diagonal()
    gains = torch.where(diagonal[:, None] > _COLLINEAR, R.square() / diagonal[:, None], 0.0)
    best[chosen + 1] = torch.minimum(best[chosen + 1], left - gains.max(0).values)
    if len(H) == 1:
        return
    i, j = torch.triu_indices(len(H), len(H), 1)
    a, b, x = diagonal[i, None], diagonal[j, None], H[i, j, None]
    determinant = a * b - x * x
    together = (b * R[i].square() - 2 * x * R[i] * R[j] + a * R[j].square()) / determinant
    together = torch.where(determinant > _COLLINEAR * a * b, together, 0.0)
    best[chosen + 2] = torch.minimum(best[chosen + 2], left - together.max(0).values)
    if chosen + 3 == len(best):
        return
    for first in range(len(H) - 1):
        if float(diagonal[first]) > _COLLINEAR:
            behind = slice(first + 1, None)
            along = H[behind, first] / diagonal[first]
            inner = H[behind, behind] - torch.outer(along, H[first, behind])
            _try_all(inner, R[behind] - torch.outer(along, R[first]), left - gains[first], chosen + 1, best)


def fewest(misfits: Tensor, budget: float) -> int:
    """The least number of weights in all outputs together whose `least_misfits` keep the budget, where one more than was tried leaves none."""
    table = torch.cat([misfits, misfits.new_zeros(1, misfits.shape[1])])
    total = table.new_full((1 + table.shape[1] * (len(table) - 1),), math.inf)
    total[0] = 0
    for column in table.T:
        shifted = [torch.cat([total.new_full((count,), math.inf), total[: len(total) - count]]) + own for count, own in enumerate(column)]
        total = torch.stack(shifted).amin(0)
    return int((total <= budget).nonzero()[0])


def measure(data_name: str, network: str, samples: int, epsilon: float) -> dict[str, Any]:
    """Weights of the last layer within ``epsilon`` of its outputs: the papers' program's, ``penalty="l0"``'s, and the least there can be."""
    data = load(data_name)
    model = load_or_train(data, network, RECIPES["plain"], seed=0).model
    inputs = calibration_samples(data, samples, 0)
    name, last = list(linear_layers(model).items())[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        A = model[:-1](inputs)
        Y = last(A)
    asked: dict[str, Any] = {"epsilon": {name: epsilon}, "mode": "parallel", "holdout": 0.0}
    counts = {
        penalty: nettrim.prune(model, inputs, penalty=penalty, consistency=consistency, **asked).report.layers[0].nonzeros
        for penalty, consistency in (("l1", "paper"), ("l0", "relaxed"))
    }
    misfits = least_misfits(A, Y)
    return {**counts, "least": fewest(misfits, epsilon**2 * float(Y.double().square().sum())), "shape": tuple(last.weight.shape)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", "data_name", type=click.Choice(list(LOADERS)), default="mnist", show_default=True)
@click.option("--networks", type=Choices(*TITLES), default="fc,lenet", show_default=True, help=f"Of {','.join(TITLES)}.")
@click.option("--samples", type=click.IntRange(min=1), default=10_000, show_default=True, help="Calibration samples.")
@click.option("--epsilon", type=click.FloatRange(min=0, min_open=True), default=0.2, show_default=True, help="Budget, relative.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(data_name: str, networks: tuple[str, ...], samples: int, epsilon: float, threads: int) -> None:
    """The last layers' weights within a budget, and how few there can be. Exits with 1 where fewer were found than that."""
    torch.set_num_threads(threads)
    console = open_console()
    found = {network: measure(data_name, network, samples, epsilon) for network in networks}
    rows = []
    for network, run in found.items():
        shares = (f"{run['l0'] / run['l1']:.2f}", f"{run['least'] / run['l1']:.2f}")
        rows.append((TITLES[network], "x".join(map(str, run["shape"])), str(run["l1"]), str(run["l0"]), str(run["least"]), *shares))
    print_table(
        console,
        f"the last layer within {epsilon:g} of its outputs, {samples:,} samples",
        ("network", "shape", "the papers' program", "l0", "least there can be", "l0 / papers'", "least / papers'"),
        rows,
    )
    console.print(environment())
    if any(run["l0"] < run["least"] for run in found.values()):
        raise click.ClickException("fewer weights were found than there can be.")


if __name__ == "__main__":
    main()
