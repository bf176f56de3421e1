"""OICSR (Li, Qi, Wang, Ge, Li, Yue, Sun: Out-in-channel sparsity regularization for compact deep neural networks, CVPR 2019, arXiv 1905.11664).

``L + λ Σ_ℓ Σ_i ‖(W^ℓ_i·, W^{ℓ+1}_·i)‖₂``: the weights that make a channel and those that read it are one group. Channels of least joined norm, over
all layers, are removed (greedily in the paper, by one threshold here) and the rest is retrained.
"""

from benchmarks.neighbours.contract import Method, Outcome, Task
from benchmarks.neighbours.models import hidden_units
from benchmarks.neighbours.selection import prune_units
from nettrim import penalties

PENALTY = 1e-3


def run(task: Task) -> Outcome:
    """Train with joined groups, remove units, retrain."""
    model = task.build()
    pairs = hidden_units(model)
    task.fit(model, task.training, penalty=lambda: PENALTY * penalties.joined_channels(model, pairs))
    known = penalties.weights(model)
    return prune_units(task, model, {layer: penalties.joined_norms(known, layer, reader).detach() for layer, reader in pairs})


METHODS = (Method("OICSR", run, "penalty", auto=True),)
