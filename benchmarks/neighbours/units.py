"""Units and filters by the norm of their weights.

``‖W_i·‖₁`` of a filter, removed with what the next layer reads from it, the same share of each layer (Li, Kadav, Durdanovic, Samet, Graf: Pruning
filters for efficient ConvNets, ICLR 2017, arXiv 1608.08710, section 3.1); and ``‖W_i·‖₂`` of the units of a fully connected network.
"""

from torch import nn

from benchmarks.neighbours.contract import Method, Outcome, Task
from benchmarks.neighbours.models import hidden_units
from benchmarks.neighbours.selection import prune_units
from nettrim import criteria


def unit_norm(task: Task) -> Outcome:
    """Hidden units by ``‖W_i·‖₂``."""
    model = task.trained()
    scores = {layer: criteria.unit_norms(model.get_submodule(layer).weight, order=2) for layer, _ in hidden_units(model)}
    return prune_units(task, model, scores, by_layer=True)


def l1_filters(task: Task) -> Outcome:
    """Filters by ``‖W_i·‖₁``; fully connected layers keep their units."""
    model = task.trained()
    layers = [layer for layer, _ in hidden_units(model) if isinstance(model.get_submodule(layer), nn.Conv2d)]
    scores = {layer: criteria.unit_norms(model.get_submodule(layer).weight) for layer in layers}
    return prune_units(task, model, scores, by_layer=True)


METHODS = (Method("unit norm", unit_norm, "criterion", auto=True), Method("L1 filters", l1_filters, "criterion", "filters"))
