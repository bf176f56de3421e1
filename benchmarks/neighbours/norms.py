"""What plain ways of training leave to prune: nothing, ``ℓ1``, ``ℓ2``, dropout (Han, Pool, Tran, Dally, NIPS 2015, study the same three).

``L + λ Σ|w|``, ``L + λ Σ w²``, or each hidden unit off with probability ½ in training (Srivastava et al., JMLR 2014). Then the smallest weights go,
and the rest is retrained with the penalty off.
"""

from torch import nn

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome
from benchmarks.neighbours.selection import prune_weights
from nettrim import criteria, penalties

L1 = 3e-5
L2 = 3e-4
KEEP = 0.5


def plain(task: Task) -> Outcome:
    """Train for all epochs; prune nothing."""
    return outcome(task.fit(task.build(), task.epochs))


def l1(task: Task) -> Outcome:
    """``λ Σ|w|`` while training."""
    model = task.build()
    task.fit(model, task.training, penalty=lambda: L1 * penalties.l1(model))
    return prune_weights(task, model, criteria.magnitude)


def l2(task: Task) -> Outcome:
    """``λ Σ w²`` while training."""
    model = task.build()
    task.fit(model, task.training, penalty=lambda: L2 * penalties.l2(model))
    return prune_weights(task, model, criteria.magnitude)


def with_dropout(model: nn.Sequential, keep: float) -> nn.Sequential:
    """The same modules, shared, with dropout behind every ReLU."""
    modules: list[nn.Module] = []
    for module in model:
        modules.append(module)
        if isinstance(module, nn.ReLU):
            modules.append(nn.Dropout(1 - keep))
    return nn.Sequential(*modules)


def dropout(task: Task) -> Outcome:
    """Half of the hidden units off at every step."""
    model = task.build()
    task.fit(with_dropout(model, KEEP), task.training)
    return prune_weights(task, model.eval(), criteria.magnitude)


METHODS = (
    Method("plain", plain, "training", auto=True),
    Method("plain LeNet-5", plain, "training", "filters"),
    Method("plain residual", plain, "training", "residual"),
    Method("l1", l1, "penalty", auto=True),
    Method("l2", l2, "penalty", auto=True),
    Method("dropout", dropout, "penalty"),
)
