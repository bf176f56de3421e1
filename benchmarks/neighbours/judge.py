"""What is measured on a network that a method left, and on the same network after `nettrim.prune`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import nettrim
from benchmarks.data import Dataset
from benchmarks.neighbours.contract import EpochsError, Method, Task
from benchmarks.neighbours.models import Residual
from benchmarks.networks import accuracy
from nettrim import penalties

FALL = 0.002  # of test accuracy, that the pruning after it may cost
ROWS = 20_000  # of a layer: images times positions
LEAST = 0.005  # of the weights, in the search


def live_units(model: nn.Module) -> tuple[int, int]:
    """Hidden units that are made and read, and all of them.

    A row of weights that is zero makes no unit, and one whose column in the next layer is zero is not read. In a chain both are known; elsewhere (a
    residual sum is read by many, and so is what a model names in ``hidden_layers``) only the rows are.
    """
    if hasattr(model, "hidden_layers"):
        rows = [model.get_submodule(name).weight.detach().any(dim=1) for name in model.hidden_layers]
        return sum(int(each.sum()) for each in rows), sum(len(each) for each in rows)
    known = list(penalties.weights(model).values())
    live = total = 0
    chain = isinstance(model, nn.Sequential) and not any(isinstance(module, Residual) for module in model)
    for weight, reader in zip(known[:-1], known[1:], strict=True):
        made = weight.detach().flatten(1).any(dim=1)
        if chain:
            made = made & reader.detach().transpose(0, 1).reshape(len(weight), -1).any(dim=1)
        live += int(made.sum())
        total += len(made)
    return live, total


def live_layers(model: nn.Module) -> int:
    """Layers with a weight that is not zero."""
    return sum(bool(weight.detach().any()) for weight in penalties.weights(model).values())


def sizes(model: nn.Module) -> dict[str, int]:
    """Weights that are not zero, live units and live layers."""
    units, _ = live_units(model)
    return {
        "weights": sum(int(weight.count_nonzero()) for weight in penalties.weights(model).values()),
        "units": units,
        "layers": live_layers(model),
    }


def _sparser(model: nn.Module, calibration: Tensor, density: float, seed: int, auto: bool) -> nn.Module:
    """`nettrim.prune` to a share of the weights of all layers that have any, zeros stay: spread by its defaults, or evenly but for the last layer,
    which keeps a quarter, or more where that is little."""
    known = penalties.weights(model)
    taken = [name for name, weight in known.items() if weight.detach().any()]
    options: dict[str, Any] = {"sparsity": 1 - density}
    if not auto:
        shares = {name: 1 - density for name in taken}
        shares[taken[-1]] = min(1 - density, 0.75)
        # zeros that are there stay; a layer that has more already is left to its own
        present = {name: 1 - int(known[name].count_nonzero()) / known[name].numel() for name in taken}
        options = {"sparsity": {name: max(share, present[name]) for name, share in shares.items()}, "allocation": "uniform", "fidelity": "layer"}
    result = nettrim.prune(model, calibration, targets=taken, holdout=0.0, preserve_zeros=True, max_rows=ROWS, seed=seed, **options)
    return result.model


@dataclass(frozen=True)
class Found:
    """What a search for the fewest weights ends with.

    Attributes
    ----------
    model : nn.Module
    density : float
        That it was asked for with; 1 where nothing could go.
    tried : list of (float, float)
        Every density, and the test accuracy there.
    """

    model: nn.Module
    density: float
    tried: list[tuple[float, float]]


def sparsest(data: Dataset, model: nn.Module, prune: Callable[[float], nn.Module], floor: float, halvings: int, *, most: float = 1.0) -> Found:
    """The network of fewest weights whose test accuracy is not below the floor, by bisection on the density's logarithm.

    Parameters
    ----------
    data : Dataset
        Accuracy is of its test images: the point that the table is about, the same for all.
    model : nn.Module
        What is given back where no density is enough.
    prune : callable(float) -> nn.Module
        To a density.
    floor : float
    halvings : int
    most : float
        Density that the search starts below.
    """
    low, high = math.log(min(LEAST, most / 2)), math.log(most)
    best, density = model, most
    tried = []
    for _ in range(halvings):
        middle = (low + high) / 2
        pruned = prune(math.exp(middle))
        found = accuracy(pruned, data.test_inputs, data.test_labels)
        tried.append((math.exp(middle), found))
        if found >= floor:
            best, density, high = pruned, math.exp(middle), middle
        else:
            low = middle
    return Found(best, density, tried)


def prune_after(model: nn.Module, data: Dataset, calibration: Tensor, seed: int, halvings: tuple[int, int]) -> dict[str, Any]:
    """The fewest weights that `nettrim.prune` leaves while test accuracy falls by at most 0.2 points: with zeros spread evenly, and by its defaults.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    data : Dataset
    calibration : Tensor, shape (samples, pixels)
    seed : int
    halvings : tuple of (int, int)
        Of the bisections: evenly, and by the defaults, which start where the even spread ended; 0 for none.

    Returns
    -------
    dict
        ``weights``, ``units``, ``layers``, ``accuracy``, ``seconds`` of one prune (the mean), ``tried``: every (density, accuracy); and the same by
        the defaults as ``auto``.
    """
    floor = accuracy(model, data.test_inputs, data.test_labels) - FALL

    def search(spread: bool, steps: int, before: Found) -> tuple[Found, dict[str, Any]]:
        start = time.perf_counter()
        one = sparsest(
            data, before.model, lambda density: _sparser(model, calibration, density, seed, spread), floor, steps, most=before.density
        )
        seconds = (time.perf_counter() - start) / steps
        found = {**sizes(one.model), "accuracy": accuracy(one.model, data.test_inputs, data.test_labels), "seconds": seconds}
        return one, {**found, "tried": one.tried}

    one, even = search(False, halvings[0], Found(model, 1.0, []))
    return {**even, "auto": search(True, halvings[1], one)[1]} if halvings[1] else even


def measure(method: Method, task: Task, *, calibration: int, halvings: tuple[int, int]) -> dict[str, Any]:
    """Run a method and judge what it left.

    Parameters
    ----------
    method : Method
    task : Task
    calibration : int
        Images for the pruning after it.
    halvings : tuple of (int, int)
        Steps of its two searches, see `prune_after`; the second only where the method says so.

    Returns
    -------
    dict
        For the results file: sizes of the network at its start (``whole``) and as left, accuracy on the test images, seconds, and ``after``.

    Raises
    ------
    NetTrimError
        The method trained for other than the task's epochs, the weights do not keep the zeros that it says that they have, or the network could not
        be pruned.
    """
    data = task.data
    start = time.perf_counter()
    left = method.run(task)
    seconds = time.perf_counter() - start + task.borrowed
    if task.spent != task.epochs:
        raise EpochsError(f"{method.name} trained for {task.spent} epochs, expected {task.epochs}, the same for all; mend its run()")
    nettrim.check_masks(left.model, left.masks)
    whole = left.start or task.build()
    return {
        "whole": {**sizes(whole), "units": live_units(whole)[1]},
        **sizes(left.model),
        "accuracy": accuracy(left.model, data.test_inputs, data.test_labels),
        "seconds": seconds,
        "notes": left.notes,
        "after": prune_after(left.model, data, task.inputs[:calibration], task.seed, (halvings[0], halvings[1] * method.auto)),
    }
