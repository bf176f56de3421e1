"""StressedNets (Shafiee, Chwyl, Li, Chen, Karg, Scharfenberger, Wong: Stress-induced evolutionary synthesis of deep neural networks, arXiv
1801.05387).

A generation trains under stress and leaves an offspring: a synapse is inherited with probability ``F · P(w)``, P from its strength and F the
environment's resources. The smallest honest form: ``P(w) = 1 − exp(−|w| / s_ℓ)``, s_ℓ a share of the layer's mean magnitude; and the stress is the
evolution step itself, in small, so that the network learns for it: at every step some synapses are off, each with its probability of not
being inherited, scaled to a tenth. The offspring trains from what it inherited. Generations are of equal length.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from nettrim import penalties

GENERATIONS = 4
RESOURCES = 0.9  # F
STRENGTH = 0.5  # of the mean magnitude
STRESS = 0.1


def survival(weight: Tensor, *, resources: float = RESOURCES, strength: float = STRENGTH) -> Tensor:
    """Probability that each synapse is inherited; 0 for one that is not there."""
    size = weight.detach().abs()
    present = size[size > 0]
    scale = strength * present.mean() if len(present) else size.new_tensor(1.0)
    return resources * (1 - torch.exp(-size / scale))


class Stressed(nn.Module):
    """The network with some synapses off at every step of training.

    Parameters
    ----------
    model : nn.Module
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.model(x)
        stressed = {
            f"{name}.weight": weight * (torch.rand_like(weight) >= STRESS * (1 - survival(weight)))
            for name, weight in penalties.weights(self.model).items()
        }
        return functional_call(self.model, stressed, x)


def offspring(model: nn.Module, seed: int) -> None:
    """Draw the synapses that are inherited; the others are 0. In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in penalties.weights(model).values():
            weight.mul_(torch.rand(weight.shape, generator=generator) < survival(weight))


def run(task: Task) -> Outcome:
    """Generations under stress; the last trains without it."""
    model = task.build()
    each = task.epochs // GENERATIONS
    sizes = []
    for generation in range(GENERATIONS - 1):
        wrapped = Stressed(model)
        masks = {f"model.{name}": mask for name, mask in zeros(model).items()} if generation else None
        task.fit(wrapped, each, masks=masks)
        offspring(model, 100 * task.seed + generation)
        sizes.append(sum(int(mask.sum()) for mask in zeros(model).values()))
    task.fit(model, task.epochs - task.spent, masks=zeros(model))
    return outcome(model, generations=sizes)


METHODS = (Method("StressedNets", run, "stochastic"),)
