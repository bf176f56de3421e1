"""The judge of ``python -m benchmarks.cifar``: as `benchmarks.sparsity_judge`, for networks with convolutions, BatchNorm and sums.

A network is pruned in cascade: layer by layer in the order in which they run, each method seeing the inputs of the network that it has pruned so
far. A convolution is the matrix that `nettrim.layers` says it is, its patches as rows: the peers, which stop at linear layers, are given those.
Every layer keeps the same share of its weights, whatever the method; nothing is retrained; no figure is taken from a method's report.
"""

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

import nettrim
from benchmarks.cifar_data import LOADERS, Images, centres
from benchmarks.cifar_networks import Recipe, Trained, accuracy, load_or_train, logits
from benchmarks.memory import PeakMemory
from benchmarks.pruners import PRUNERS
from benchmarks.sparsity_judge import gram
from nettrim import capture, layers
from nettrim.calibration import runner
from nettrim.layers import Matrix

PEERS = ("magnitude", "sparsegpt", "alps")
# Ours by the name in the tables: what each adds to the same call of `nettrim.prune`. The first is what is compared: all else is told to be the same.
OURS: dict[str, dict[str, Any]] = {
    "nettrim": {},
    "nettrim-batchnorm": {"recalibrate_batchnorm": True},
    "nettrim-spread": {"allocation": "auto"},
}
METHODS = (*PEERS, *OURS)
BATCH = 250  # images


def kept_weights(model: nn.Module, share: float) -> dict[str, int]:
    """How many weights each matrix of a network keeps: this share of them, to one weight."""
    return {name: round(share * matrix.weights().numel()) for name, matrix in layers.matrices(model).items()}


def calibration_images(data: Images, samples: int, seed: int) -> list[Tensor]:
    """The middles of so many training images, drawn with the seed, in batches; no labels."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    return list(centres(data.train[order[:samples]]).split(BATCH))


@torch.no_grad()
def layer_gram(model: nn.Module, matrix: Matrix, batches: list[Tensor], rows: int, seed: int) -> Tensor:
    """``AᵀA`` (N, N) in float64 of a matrix's rows in this network, without the bias' column; of at most ``rows`` of them, drawn evenly.

    The network is run no further than this layer.
    """
    generator = torch.Generator().manual_seed(seed)
    images = sum(map(len, batches))
    N = matrix.shape[1]
    total = torch.zeros(N, N, dtype=torch.float64)
    for kept, *_ in capture.kept(model, batches, runner(None), matrix):
        A = matrix.kind.unfold(matrix.module, matrix.part, kept).flatten(1)
        share = round(rows * len(kept) / images)
        if share < len(A):
            A = A[torch.randperm(len(A), generator=generator)[:share]]
        total += gram(A)
    return total


@torch.no_grad()
def prune_by_peer(model: nn.Module, batches: list[Tensor], kept: dict[str, int], method: str, rows: int, seed: int) -> nn.Module:
    """A copy of the network, its matrices pruned in cascade by one of `PEERS`; biases and BatchNorms stay."""
    pruned = copy.deepcopy(model)
    for name, matrix in layers.matrices(pruned).items():
        G = layer_gram(pruned, matrix, batches, rows, seed) if method != "magnitude" else torch.empty(0)
        whole = matrix.as_matrix()
        whole[:, : matrix.shape[1]] = PRUNERS[method](matrix.weights().clone(), G, kept[name])
        matrix.write_back(whole)
    return pruned


def prune_by_ours(model: nn.Module, batches: list[Tensor], kept: dict[str, int], method: str, rows: int, seed: int) -> nn.Module:
    """As `prune_by_peer`, by one of `OURS`: the public call, with as many weights kept in every layer, or as many in all."""
    sizes = {name: matrix.weights().numel() for name, matrix in layers.matrices(model).items()}
    arguments = dict(OURS[method])
    sparsity: Any = {name: 1 - kept[name] / size for name, size in sizes.items()}
    if arguments.get("allocation") == "auto":
        sparsity = 1 - sum(kept.values()) / sum(sizes.values())
    return nettrim.prune(model, batches, sparsity=sparsity, mode="cascade", holdout=0.0, max_rows=rows, seed=seed, **arguments).model


def measure(trained: Trained, data: Images, settings: dict[str, Any]) -> dict[str, Any]:
    """Prune once and measure what the tables show.

    Parameters
    ----------
    trained : Trained
        The dense network; it is left as it is.
    data : Images
        Calibration images come from its training images; accuracy and logits are of its test images.
    settings : dict
        ``method``, ``zeros``, ``samples``, ``rows`` and ``seed``.

    Returns
    -------
    dict
        For the results file: accuracies in [0, 1], ``logit_error`` relative to the norm of the dense logits, seconds and bytes of the pruning alone.

    Raises
    ------
    NetTrimError
        If the network could not be pruned.
    """
    model, method = trained.model, settings["method"]
    batches = calibration_images(data, settings["samples"], settings["seed"])
    kept = kept_weights(model, 1 - settings["zeros"])
    prune = prune_by_ours if method in OURS else prune_by_peer
    start = time.perf_counter()
    with PeakMemory() as memory:
        pruned = prune(model, batches, kept, method, settings["rows"], settings["seed"])
    seconds = time.perf_counter() - start
    test = centres(data.test)
    dense, found = logits(model, test), logits(pruned, test)
    nonzeros = {name: int(matrix.weights().count_nonzero()) for name, matrix in layers.matrices(pruned).items()}
    spread = OURS.get(method, {}).get("allocation") == "auto"
    return {
        "dense_accuracy": accuracy(dense, data.test_labels),
        "accuracy": accuracy(found, data.test_labels),
        "logit_error": float((found - dense).norm() / dense.norm()),
        "seconds": seconds,
        "extra_bytes": memory.extra,
        "nonzeros": nonzeros,
        "density": sum(nonzeros.values()) / sum(matrix.weights().numel() for matrix in layers.matrices(model).values()),
        # more than was allowed, in a layer or in all, is no comparison
        "within": sum(nonzeros.values()) <= sum(kept.values()) if spread else all(nonzeros[name] <= count for name, count in kept.items()),
    }


def measure_apart(network: str, recipe: Recipe, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """`measure` with the data and the network read anew: for a process of its own, where nothing that ran before is in its memory."""
    torch.set_num_threads(threads)
    data = LOADERS[settings["data"]]()
    return measure(load_or_train(data, network, recipe, settings["seed"]), data, settings)
