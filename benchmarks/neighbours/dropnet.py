"""DropNet (Tan, Motani: DropNet: reducing neural network complexity via iterative pruning, ICML 2020, Algorithm 1).

The score of a node is the mean of |activation| over the training set. A cycle: train, drop the 20 % of the remaining nodes of least score, over all
layers, and put what is left back to its initial weights. It ends where the retrained network falls below κ of the accuracy that the first had; the
last network above it is kept. Cycles are of equal length, so that all of them together take the epochs of the other methods; what is left of them
goes to the network that is kept. The cycle that fails takes its epoch as well.
"""

import copy

import torch
from torch import Tensor, nn

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.models import drop_units, hidden_units
from benchmarks.neighbours.vip import hidden_outputs

SHARE = 0.2
KAPPA = 0.98


def node_scores(model: nn.Sequential, inputs: Tensor) -> dict[str, Tensor]:
    """Mean |activation| of every hidden node, by layer."""
    return {name: output.abs().mean(dim=0) for name, output in hidden_outputs(model, inputs).items()}


def dropped(scores: dict[str, Tensor], alive: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The nodes that stay: without the share of those alive whose score is least, but never without the last of a layer."""
    living = torch.cat([score[alive[name]] for name, score in scores.items()])
    count = round(share * len(living))
    threshold = living.sort().values[count - 1] if count else living.new_tensor(-1.0)
    kept = {}
    for name, score in scores.items():
        stays = alive[name] & (score > threshold)
        stays[torch.where(alive[name], score, -1.0).argmax()] = True
        kept[name] = stays
    return kept


def run(task: Task) -> Outcome:
    """Cycles of one epoch, as many as there are epochs."""
    start = task.build()
    readers = dict(hidden_units(start))
    alive = {name: torch.ones(start.get_submodule(name).weight.shape[0], dtype=torch.bool) for name in readers}
    best: nn.Module | None = None
    floor, kept_cycles = 0.0, 0
    for cycle in range(task.epochs):
        model = copy.deepcopy(start)
        for name, kept in alive.items():
            drop_units(model, name, readers[name], kept)
        task.fit(model, 1, masks=zeros(model) if cycle else None)
        found = task.held_accuracy(model)
        if cycle == 0:
            floor = KAPPA * found
        if found < floor:
            break
        best, kept_cycles = model, cycle + 1
        alive = dropped(node_scores(model, task.inputs), alive, SHARE)
    assert best is not None
    task.fit(best, task.epochs - task.spent, masks=zeros(best))
    return outcome(best, cycles=kept_cycles)


METHODS = (Method("DropNet", run, "schedule", auto=True),)
