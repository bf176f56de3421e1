"""Prune the *large* weights (Bartoldson, Barbu, Erlebacher: Enhancing the regularization effect of weight pruning in artificial neural networks,
2018).

The score is ``−|w|``: removing what the network leans on disturbs it most, and what it learns afterwards generalises better, they find. The rule of
the other criteria, a point of accuracy before the retraining, lets no weight go here: so it is a tenth of the weights, in rounds of equal shares,
each with an epoch of retraining.
"""

import torch
from torch import Tensor

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.selection import kept_by_share
from nettrim import penalties

SHARE = 0.1  # in all


def score(weight: Tensor) -> Tensor:
    """``−|w|``; what is zero already stays last."""
    size = weight.detach().abs()
    return (-size).masked_fill(size == 0, float("inf"))


def run(task: Task) -> Outcome:
    """Train; in each epoch of retraining prune the next of the largest weights, then retrain."""
    model = task.trained()
    for _ in range(task.retraining):
        kept = kept_by_share({name: score(weight) for name, weight in penalties.weights(model).items()}, SHARE / task.retraining, by_layer=False)
        with torch.no_grad():
            for name, weight in penalties.weights(model).items():
                weight.mul_(kept[name])
        task.fit(model, 1, masks=zeros(model), learning_rate=5e-4)
    return outcome(model)


METHODS = (Method("large weights", run, "criterion"),)
