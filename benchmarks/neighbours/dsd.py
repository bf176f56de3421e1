"""Dense-sparse-dense (Han, Pool, Narang, Mao, et al.: DSD: dense-sparse-dense training for deep neural networks, ICLR 2017, arXiv 1607.04381).

Train; drop the weights of least magnitude, a share of each layer, and retrain with the zeros held; then let all weights go again, those that were
dropped from zero, with a tenth of the step. The second and the third part take a third of the epochs each, rounded down; the first has the rest. The
network in the end is dense: what it buys shows when it is pruned.
"""

import torch

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.selection import kept_by_share
from nettrim import criteria, penalties

SPARSITY = 0.5  # the paper's range is 25 to 50 %


def run(task: Task) -> Outcome:
    """Dense, sparse, dense."""
    third = max(1, task.epochs // 3)
    model = task.build()
    task.fit(model, max(1, task.epochs - 2 * third))
    kept = kept_by_share({name: criteria.magnitude(weight) for name, weight in penalties.weights(model).items()}, SPARSITY, by_layer=True)
    with torch.no_grad():
        for name, weight in penalties.weights(model).items():
            weight.mul_(kept[name])
    task.fit(model, third, masks=zeros(model), learning_rate=5e-4)
    sparse = task.held_accuracy(model)
    task.fit(model, third, learning_rate=1e-4)
    return outcome(model, sparse_accuracy=sparse)


METHODS = (Method("DSD", run, "schedule"),)
