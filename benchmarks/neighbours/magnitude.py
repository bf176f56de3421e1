"""Magnitude pruning (Han, Pool, Tran, Dally: Learning both weights and connections for efficient neural networks, NIPS 2015, section 3).

Train; remove the weights of least ``|w|``, the same share of each layer or by one threshold for all; retrain the rest. In one step here, where the
paper prunes and retrains in turns. How much goes is decided as for all criteria, before the retraining; or, *by test*, as for `nettrim.prune`: the
fewest weights that after their retraining are within 0.2 points of the test accuracy of the plain network, so that the two can be compared.
"""

import copy

import torch
from torch import nn

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.judge import FALL, sparsest
from benchmarks.neighbours.selection import kept_by_share, prune_weights
from benchmarks.networks import accuracy
from nettrim import criteria, penalties

TRIALS = 5  # each retrains a network from the same trained one


def per_layer(task: Task) -> Outcome:
    """The same share of each layer."""
    return prune_weights(task, task.trained(), criteria.magnitude, by_layer=True)


def globally(task: Task) -> Outcome:
    """One threshold."""
    return prune_weights(task, task.trained(), criteria.magnitude)


def by_test(task: Task) -> Outcome:
    """One threshold, found by bisection on the accuracy after the retraining. What is left has had the epochs of all; trials come on top."""
    trained = task.trained()
    scores = {name: criteria.magnitude(weight) for name, weight in penalties.weights(trained).items()}
    trial = task.aside()
    plain = trial.fit(trial.build(), trial.epochs)

    def prune(density: float) -> nn.Module:
        model = copy.deepcopy(trained)
        kept = kept_by_share(scores, 1 - density, by_layer=False)
        with torch.no_grad():
            for name, weight in penalties.weights(model).items():
                weight.mul_(kept[name])
        return trial.fit(model, trial.retraining, masks=zeros(model), learning_rate=5e-4)

    floor = accuracy(plain, task.data.test_inputs, task.data.test_labels) - FALL
    found = sparsest(task.data, plain, prune, floor, TRIALS)
    task.spent += task.retraining  # of the trial that is kept
    return outcome(found.model, tried=found.tried, trial_epochs=trial.spent)


METHODS = (
    Method("magnitude per layer", per_layer, "criterion"),
    Method("magnitude global", globally, "criterion", auto=True),
    Method("magnitude by test", by_test, "criterion", auto=True),
)
