"""The Taylor criterion (Molchanov, Tyree, Karras, Aila, Kautz, ICLR 2017, arXiv 1611.06440).

``Θ_i = |mean_positions a_i ∂L/∂a_i|``, the mean over samples, scaled to norm 1 in each layer (eqs. 8 and 9), compared over all layers. Removed at
once here, by the rule of all criteria, where the paper removes a few, fine-tunes, and scores again.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.neighbours.contract import Method, Outcome, Task
from benchmarks.neighbours.models import hidden_units
from benchmarks.neighbours.selection import prune_units
from nettrim import criteria

SAMPLES = 2000


def scores(model: nn.Sequential, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The criterion of every hidden unit, by layer: of what is behind its ReLU."""
    names = [layer for layer, _ in hidden_units(model)]
    places = {name: place for place, (name, _) in enumerate(model.named_children())}
    kept: dict[str, Tensor] = {}
    x = inputs
    for place, module in enumerate(model):
        x = module(x)
        for name in names:
            if place == places[name] + 1:  # the ReLU
                x.retain_grad()
                kept[name] = x
    functional.cross_entropy(x, labels, reduction="sum").backward()
    return {name: criteria.taylor(value, value.grad) for name, value in kept.items()}  # type: ignore[arg-type]


def run(task: Task) -> Outcome:
    """Train, remove the units whose loss costs least, retrain."""
    model = task.trained()
    with torch.enable_grad():
        found = scores(model, task.inputs[:SAMPLES], task.labels[:SAMPLES])
    model.zero_grad()
    return prune_units(task, model, found)


METHODS = (Method("Taylor", run, "criterion", auto=True), Method("Taylor filters", run, "criterion", "filters"))
