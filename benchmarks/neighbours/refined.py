"""Layer-wise refined pruning (Li, 2022): a channel's importance times the sparsity of its layer's input.

``s_i = ‖W_i·‖₁ · (1 − z_ℓ)``, with ``z_ℓ`` the share of zeros in the layer's inputs on the training images: weights that meet zeros most of the time
do less than their size says. The least go, over all layers, and the rest is retrained; then the layers are gone through once more, each by itself, by
the same score on what is left (the refinement). The paper's text was not at hand: this is the issue's description of it.
"""

import torch
from torch import Tensor, nn

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.models import drop_units, hidden_units
from benchmarks.neighbours.selection import kept_by_share, largest_share, prune_units
from nettrim import criteria

SAMPLES = 2000
REFINING = 0.002  # of held-out accuracy, that a layer of the second pass may cost


@torch.no_grad()
def scores(model: nn.Sequential, inputs: Tensor) -> dict[str, Tensor]:
    """The score of every hidden unit, by layer."""
    found: dict[str, Tensor] = {}
    names = {name for name, _ in hidden_units(model)}
    x = inputs
    for name, module in model.named_children():
        if name in names:
            found[name] = criteria.unit_norms(module.weight) * float((x != 0).double().mean())
        x = module(x)
    return found


def run(task: Task) -> Outcome:
    """Train, remove units over all layers, retrain, then refine layer by layer; the last epoch is for what that leaves."""
    trained = task.trained()
    first = prune_units(task, trained, scores(trained, task.inputs[:SAMPLES]), retraining=task.retraining - 1)
    model: nn.Module = first.model
    for layer, reader in hidden_units(model):
        found = scores(model, task.inputs[:SAMPLES])[layer]  # type: ignore[arg-type]

        def prune(target: nn.Module, share: float, layer: str = layer, reader: str = reader, found: Tensor = found) -> None:
            drop_units(target, layer, reader, kept_by_share({layer: found}, share, by_layer=True)[layer])

        model, _ = largest_share(task, model, prune, tolerance=REFINING)
    task.fit(model, 1, masks=zeros(model), learning_rate=2e-4)
    return outcome(model, share=first.notes["share"])


METHODS = (Method("layer-wise refined", run, "criterion"),)
