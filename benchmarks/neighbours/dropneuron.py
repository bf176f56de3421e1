"""DropNeuron (Pan, Dong, Guo: Simplifying the structure of deep neural networks, arXiv 1606.07326).

``L + λ₁ Σ|w| + λ_li Σ_ℓ Σ_i ‖W_i·‖₂ + λ_lo Σ_ℓ Σ_j ‖W_·j‖₂`` (section 3.1): incoming and outgoing connections of a neuron go to 0 together, so that
it can be dropped. Adam comes near 0 and not to it: weights below one threshold are cut afterwards, and a neuron all of whose incoming or all of whose
outgoing weights are cut goes whole, with its bias.
"""

import torch
from torch import Tensor, nn

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.models import drop_units, hidden_units
from benchmarks.neighbours.selection import kept_by_share, largest_share
from nettrim import criteria, penalties

L1 = 1e-5
LI = 1e-4
LO = 1e-4


@torch.no_grad()
def cut(model: nn.Module, scores: dict[str, Tensor], share: float) -> None:
    """Cut the share of the weights of least size, over all layers, then the neurons left with no incoming or no outgoing weight. In place."""
    kept = kept_by_share(scores, share, by_layer=False)
    known = penalties.weights(model)
    for name, weight in known.items():
        weight.mul_(kept[name])
    for layer, reader in hidden_units(model):
        made, read = known[layer].flatten(1).any(dim=1), known[reader].transpose(0, 1).reshape(len(known[layer]), -1).any(dim=1)
        drop_units(model, layer, reader, made & read)


def run(task: Task, li: float, lo: float) -> Outcome:
    """Train with the penalties, cut weights and neurons, retrain without penalties.

    Parameters
    ----------
    task : Task
    li, lo : float
        λ of the incoming and of the outgoing groups.
    """
    model = task.build()

    def penalty():
        total = L1 * penalties.l1(model)
        if li:
            total = total + li * penalties.incoming_groups(model)
        if lo:
            total = total + lo * penalties.outgoing_groups(model)
        return total

    task.fit(model, task.training, penalty=penalty)
    scores = {name: criteria.magnitude(weight) for name, weight in penalties.weights(model).items()}
    pruned, share = largest_share(task, model, lambda target, share: cut(target, scores, share))
    task.fit(pruned, task.retraining, masks=zeros(pruned), learning_rate=5e-4)
    return outcome(pruned, share=share)


METHODS = (
    Method("DropNeuron li", lambda task: run(task, LI, 0.0), "penalty"),
    Method("DropNeuron lo", lambda task: run(task, 0.0, LO), "penalty"),
    Method("DropNeuron li + lo", lambda task: run(task, LI, LO), "penalty", auto=True),
)
