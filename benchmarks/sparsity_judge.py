"""The judge of ``python -m benchmarks.sparsity``: one protocol for every method, and what is measured on the weights that it left.

A network is pruned in cascade: layer by layer in the order in which they run, each method seeing the inputs of the network that it has pruned
so far. How many weights each layer keeps is decided here, the same for all; nothing is retrained; no figure is taken from a method's report.
"""

import copy
import functools
import time
from typing import Any

import torch
from torch import Tensor, nn

import nettrim
from benchmarks.data import Dataset
from benchmarks.mnist import calibration_samples, linear_layers, relative_discrepancy
from benchmarks.networks import Trained, accuracy
from benchmarks.pruners import PRUNERS, Kept, fistapruner, parse_pattern

# Ours by the name in the tables: what each adds to the same call of `nettrim.prune`.
OURS: dict[str, dict[str, Any]] = {"nettrim": {}, "nettrim-layer": {"fidelity": "layer"}}
METHODS = (*PRUNERS, *OURS)


def gram(left: Tensor, right: Tensor | None = None, *, rows: int = 4096) -> Tensor:
    """``leftᵀ right`` (``leftᵀ left``) in float64, a chunk of rows at a time: no copy of all rows in float64.

    Parameters
    ----------
    left : Tensor, shape (P, N)
    right : Tensor, shape (P, K), optional
    rows : int
        In a chunk.

    Returns
    -------
    Tensor, shape (N, K)
    """
    right = left if right is None else right
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for one, other in zip(left.split(rows), right.split(rows), strict=True):
        total += one.double().T @ other.double()
    return total


def kept_weights(model: nn.Sequential, share: float, last: float) -> dict[str, int]:
    """How many weights each linear layer keeps: this share of them, to one weight, and ``last`` of the last layer's."""
    sizes = {name: layer.weight.numel() for name, layer in linear_layers(model).items()}
    final = list(sizes)[-1]
    return {name: round((last if name == final else share) * size) for name, size in sizes.items()}


@torch.no_grad()
def prune_by_peer(model: nn.Sequential, calibration: Tensor, kept: dict[str, int], method: str) -> nn.Sequential:
    """A copy of the network, pruned in cascade by one of `PRUNERS`; biases stay.

    Parameters
    ----------
    model : nn.Sequential
    calibration : Tensor, shape (P, inputs)
    kept : dict of str to int
        Weights kept in each linear layer.
    method : str
    """
    pruned = copy.deepcopy(model)
    x = dense = calibration
    for (name, before), after in zip(model.named_children(), pruned, strict=True):
        if isinstance(after, nn.Linear):
            prune = PRUNERS[method]
            # the one peer that corrects what the layers before have broken
            if prune is fistapruner:
                prune = functools.partial(fistapruner, streams=(gram(dense, x), gram(dense)))
            after.weight.copy_(prune(after.weight.detach(), gram(x), kept[name]))
        x = after(x)
        if PRUNERS[method] is fistapruner:
            dense = before(dense)
    return pruned


def prune_by_ours(model: nn.Sequential, calibration: Tensor, kept: dict[str, int], method: str, seed: int) -> nn.Sequential:
    """As `prune_by_peer`, by one of `OURS`: the public call, with the same number of weights kept in every layer."""
    sizes = {name: layer.weight.numel() for name, layer in linear_layers(model).items()}
    arguments: dict[str, Any] = {"sparsity": {name: 1 - kept[name] / size for name, size in sizes.items()}, **OURS[method]}
    result = nettrim.prune(model, calibration, mode="cascade", holdout=0.0, seed=seed, **arguments)
    assert isinstance(result.model, nn.Sequential)
    return result.model


@torch.no_grad()
def layer_errors(model: nn.Sequential, pruned: nn.Sequential, inputs: Tensor) -> dict[str, float]:
    """Each linear layer's output, after its ReLU where one follows: ``‖pruned − dense‖_F / ‖dense‖_F``, both networks run on the inputs."""
    errors: dict[str, float] = {}
    x = dense = inputs
    current = ""
    for (name, before), after in zip(model.named_children(), pruned, strict=True):
        x, dense = after(x), before(dense)
        current = name if isinstance(after, nn.Linear) else current
        if current:
            errors[current] = float((x - dense).norm() / dense.norm())
    return errors


def measure(trained: Trained, data: Dataset, settings: dict[str, Any]) -> dict[str, Any]:
    """Prune once and measure what the tables show.

    Parameters
    ----------
    trained : Trained
        The dense network; it is left as it is.
    data : Dataset
        Calibration samples come from its training images; accuracy and logits are of its test images.
    settings : dict
        ``method``, ``kept``, ``last``, ``samples``, ``repeats`` and ``seed``.

    Returns
    -------
    dict
        For the results file. Errors are relative to the norm of the dense network's output.

    Raises
    ------
    NetTrimError
        If the network could not be pruned.
    """
    model, method = trained.model, settings["method"]
    calibration = calibration_samples(data, settings["samples"], settings["seed"])
    kept = kept_weights(model, settings["kept"], settings["last"])
    seconds = []
    for _ in range(settings["repeats"]):
        start = time.process_time()
        if method in OURS:
            pruned = prune_by_ours(model, calibration, kept, method, settings["seed"])
        else:
            pruned = prune_by_peer(model, calibration, kept, method)
        seconds.append(time.process_time() - start)
    nonzeros = {name: int(layer.weight.count_nonzero()) for name, layer in linear_layers(pruned).items()}
    return {
        "dense_accuracy": trained.accuracy,
        "accuracy": accuracy(pruned, data.test_inputs, data.test_labels),
        "logit_error": relative_discrepancy(pruned, model, data.test_inputs),
        "layer_errors": layer_errors(model, pruned, calibration),
        "seconds": min(seconds),
        "wanted": kept,
        "nonzeros": nonzeros,
        "density": sum(nonzeros.values()) / sum(layer.weight.numel() for layer in linear_layers(pruned).values()),
        # more than was allowed is no fair comparison; fewer is the method's own choice (FISTA's shrinkage, inputs that are always 0)
        "within": all(nonzeros[name] <= count for name, count in kept.items()),
    }


def layer_error(W: Tensor, pruned: Tensor, G: Tensor) -> float:
    """``‖A (pruned − W)ᵀ‖_F / ‖A Wᵀ‖_F`` from ``G = AᵀA``, in float64."""
    W, change = W.double(), (pruned - W).double()
    return float(((change @ G) * change).sum().clamp_min(0) / ((W @ G) * W).sum()) ** 0.5


def prune_layer(method: str, W: Tensor, G: Tensor, A: Tensor, kept: Kept) -> Tensor:
    """One layer without a ReLU by any method, ours through the public `nettrim.solve`.

    Parameters
    ----------
    method : str
    W : Tensor, shape (M, N)
    G : Tensor, shape (N, N)
        ``AᵀA``, float64.
    A : Tensor, shape (P, N)
    kept : int or "n:m"
    """
    if method not in OURS:
        return PRUNERS[method](W, G, kept)
    chosen: dict[str, Any] = {"nonzeros": kept}
    if isinstance(kept, str):
        n, m = parse_pattern(kept)
        chosen = {"nonzeros": W.numel() // m * n, "pattern": kept}
    program = nettrim.LayerProgram(A, A @ W.T, activation=None, penalty="l0", **chosen)
    return nettrim.solve(program).weights
