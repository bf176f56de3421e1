"""The section ``options`` of ``python -m benchmarks.sparsity``: what ours does besides a number of weights in every layer.

One sparsity spread over the layers or not; half of all hidden neurons, taken out; and the fewest weights within the papers' budgets.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

import nettrim
from benchmarks.data import Dataset
from benchmarks.mnist import calibration_samples, relative_discrepancy
from benchmarks.networks import Trained, accuracy

SPARSITIES = (0.9, 0.95)
EPSILONS = (0.05, 0.1, 0.2)
PROGRAMS: dict[str, dict[str, Any]] = {"the papers'": {"penalty": "l1", "consistency": "paper"}, "l1": {"penalty": "l1"}, "l0": {"penalty": "l0"}}
_REPEATS = 10  # of a forward pass, of which the fastest counts

CASES: dict[str, dict[str, Any]] = {
    **{
        f"sparsity {sparsity:g}, {how}": {"sparsity": sparsity, "allocation": how, "holdout": 0.0}
        for sparsity in SPARSITIES
        for how in ("uniform", "auto")
    },
    "half the neurons": {"sparsity": 0.5, "pattern": "neuron", "holdout": 0.0},
    **{
        f"epsilon {epsilon:g}, {name}": {"epsilon": epsilon, "mode": "parallel", "holdout": 0.0, **program}
        for epsilon in EPSILONS
        for name, program in PROGRAMS.items()
    },
}


def measure_option(trained: Trained, data: Dataset, settings: dict[str, Any]) -> dict[str, Any]:
    """Prune with one of `CASES` (``settings["case"]``), and judge what is stored.

    Returns
    -------
    dict
        Test accuracies, dense and pruned; ``logit_error`` on the test images; ``density`` of all weights; ``nonzeros`` of each layer; whether the
        certificate ``holds``; seconds; for neurons also the sizes of the shrunk network and its ``speed_up``.
    """
    model, inputs = trained.model, data.test_inputs
    calibration = calibration_samples(data, settings["samples"], settings["seed"])
    start = time.perf_counter()
    result = nettrim.prune(model, calibration, seed=settings["seed"], **CASES[settings["case"]])
    seconds = time.perf_counter() - start
    pruned: nn.Module = result.model
    found: dict[str, Any] = {}
    if "neuron" in settings["case"]:
        pruned = nettrim.shrink(result.model, calibration[:100])
        found["speed_up"] = _forward_seconds(model, inputs) / _forward_seconds(pruned, inputs)
    weights = [parameter for parameter in pruned.parameters() if parameter.ndim == 2]
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    return {
        **found,
        "dense_accuracy": accuracy(model, inputs, data.test_labels),
        "accuracy": accuracy(pruned, inputs, data.test_labels),
        "logit_error": relative_discrepancy(pruned, model, inputs),
        "density": sum(int(weight.count_nonzero()) for weight in weights) / total,
        "nonzeros": {layer.name: layer.nonzeros for layer in result.report.layers},
        "holds": result.report.certificate.holds,
        "seconds": seconds,
        "within": True,
    }


@torch.no_grad()
def _forward_seconds(model: nn.Module, inputs: Tensor) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        model(inputs)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
