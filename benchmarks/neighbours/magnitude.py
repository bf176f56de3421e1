"""Magnitude pruning (Han, Pool, Tran, Dally: Learning both weights and connections for efficient neural networks, NIPS 2015, section 3).

Train; remove the weights of least ``|w|``, the same share of each layer or by one threshold for all; retrain the rest.
"""

from benchmarks.neighbours.contract import Method, Outcome, Task
from benchmarks.neighbours.selection import prune_weights
from nettrim import criteria


def per_layer(task: Task) -> Outcome:
    """The same share of each layer."""
    return prune_weights(task, task.trained(), criteria.magnitude, by_layer=True)


def globally(task: Task) -> Outcome:
    """One threshold."""
    return prune_weights(task, task.trained(), criteria.magnitude)


METHODS = (Method("magnitude per layer", per_layer, "criterion"), Method("magnitude global", globally, "criterion"))
