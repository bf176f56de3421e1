"""Spike-and-slab node selection (Jantre, Bhattacharya, Maiti: Layer adaptive node selection in Bayesian neural networks, arXiv 2108.11000).

Prior: a node's incoming weights are ``N(0, σ₀²)`` with probability λ_ℓ, and all 0 otherwise. Variational family: ``z_j ~ Bernoulli(γ_j)``,
``w_j | z_j = 1 ~ N(μ_j, σ_j²)``. Minimised, per sample, with n samples:

    E_q[L] + (1/n) Σ_j [ KL(Bernoulli(γ_j) ‖ Bernoulli(λ_ℓ)) + γ_j KL(N(μ_j, σ_j²) ‖ N(0, σ₀²)) ],

z by the concrete relaxation (temperature ½), weights by sampling pre-activations. The inclusion probability falls with the layer's fan-in k_ℓ and
with the next layer's width: ``−log λ_ℓ = log k_{ℓ+1} + C (k_ℓ + 1)``. In the end nodes with γ_j > ½ stay, at the mean of their weights.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.models import drop_units, hidden_units

PRIOR = 0.05  # σ₀: near the size that weights start with; a wide one needs far more epochs before a node is worth its divergence
RATE = 1e-4  # C
TEMPERATURE = 0.5
SPREAD = -3.5  # softplus of it, 0.03, is σ at first
SHARPNESS = 10.0  # the logit of γ is this times what Adam moves, which moves by its step and no more


def inclusion(fan_in: int, next_width: int) -> float:
    """λ_ℓ."""
    return math.exp(-math.log(next_width) - RATE * (fan_in + 1))


def divergence(gamma: Tensor, mean: Tensor, deviation: Tensor, prior_inclusion: float, prior: float) -> Tensor:
    """``Σ_j KL(γ_j ‖ λ) + γ_j Σ_i KL(N(μ_ji, σ_ji²) ‖ N(0, σ₀²))``.

    Parameters
    ----------
    gamma : Tensor, shape (nodes,)
    mean, deviation : Tensor, each of shape (nodes, inputs)
    prior_inclusion, prior : float
        λ and σ₀.
    """
    gamma = gamma.clamp(1e-6, 1 - 1e-6)
    choice = gamma * (gamma / prior_inclusion).log() + (1 - gamma) * ((1 - gamma) / (1 - prior_inclusion)).log()
    slab = (prior / deviation).log() + (deviation.square() + mean.square()) / (2 * prior**2) - 0.5
    return (choice + gamma * slab.sum(dim=1)).sum()


class Selected(nn.Module):
    """A chain of linear layers under the variational family; the means are the layers' own weights.

    Parameters
    ----------
    model : nn.Sequential
    """

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model
        self.hidden = [layer for layer, _ in hidden_units(model)]
        linear = {name: module for name, module in model.named_children() if isinstance(module, nn.Linear)}
        self.spread = nn.ParameterDict({name: nn.Parameter(torch.full_like(module.weight, SPREAD)) for name, module in linear.items()})
        self.choice = nn.ParameterDict({name: nn.Parameter(torch.full((linear[name].out_features,), 0.3)) for name in self.hidden})
        self.inclusion = {layer: inclusion(linear[layer].in_features, linear[reader].out_features) for layer, reader in hidden_units(model)}

    def gamma(self, name: str) -> Tensor:
        """Probabilities of inclusion of a layer's nodes."""
        return (SHARPNESS * self.choice[name]).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            for name, module in self.model.named_children():
                x = module(x)
                x = x * (self.gamma(name) > 0.5) if name in self.hidden else x
            return x
        for name, module in self.model.named_children():
            if not isinstance(module, nn.Linear):
                x = module(x)
                continue
            deviation = functional.softplus(self.spread[name])
            noise = (functional.linear(x.square(), deviation.square()) + 1e-12).sqrt()
            x = module(x) + noise * torch.randn_like(noise)
            if name in self.hidden:
                uniform = torch.rand_like(self.choice[name]).clamp(1e-6, 1 - 1e-6)
                x = x * ((SHARPNESS * self.choice[name] + uniform.log() - (-uniform).log1p()) / TEMPERATURE).sigmoid()
        return x

    def penalty(self, samples: int) -> Tensor:
        """The divergence, per sample."""
        total = torch.zeros(())
        for name, spread in self.spread.items():
            mean, deviation = self.model.get_submodule(name).weight, functional.softplus(spread)
            ones = torch.ones(len(mean))
            total = total + (
                divergence(self.gamma(name), mean, deviation, self.inclusion[name], PRIOR)
                if name in self.hidden
                else divergence(ones, mean, deviation, 1 - 1e-6, PRIOR)
            )
        return total / samples


def run(task: Task) -> Outcome:
    """Train the family, keep the nodes with γ > ½ at the mean of their weights, retrain."""
    model = task.build()
    family = Selected(model)
    task.fit(family, task.training, penalty=lambda: family.penalty(len(task.inputs)))
    for layer, reader in hidden_units(model):
        kept = (family.gamma(layer) > 0.5).detach()
        kept[family.choice[layer].argmax()] = True
        drop_units(model, layer, reader, kept)
    task.fit(model, task.retraining, masks=zeros(model), learning_rate=5e-4)
    return outcome(model)


METHODS = (Method("spike and slab", run, "stochastic"),)
