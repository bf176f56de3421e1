"""Bernoulli multipliers that decide: units (Guenter, Sideris: Robust learning of parsimonious deep neural networks, arXiv 2205.04650), residual
blocks (Concurrent training and layer pruning, arXiv 2406.04549), and units at their cost (Complexity-aware training, arXiv 2411.09127).

Every unit's output (every block's nonlinear section) is multiplied by ``ξ_j ~ Bernoulli(θ_j)`` in training. Under a prior Bernoulli(π_j) with the
flattening hyper-prior ``p(π) ∝ 1 / (1 + (γ − 1)(1 − π))`` the best π is ``γθ / (1 + (γ − 1)θ)``, and what is left of the divergence is linear in θ:
``min_π KL(θ‖π) − log p(π) = (1 − θ) log γ + const``. So with ``c = −log γ > 0``, γ < 1,

    min_{W, θ ∈ [0, 1]}  E_ξ[L(W, ξ)] + Σ_j c_j θ_j,

which no θ strictly between 0 and 1 minimises but where the two sides balance: networks become deterministic. θ moves by projected gradients,
``θ ← clip(θ − η (Δ_j + c_j))``. The change of the loss with the unit on, ``Δ_j = E[L | ξ_j = 1] − E[L | ξ_j = 0]``, is estimated from the derivative
in ξ_j at the ξ drawn, by the trapezoidal rule: half of what is found at 1 and half of what is found at 0, each over the chance of being there.
``c_j`` is the same for all, or in proportion to the multiplications that the unit costs (its inputs and its readers).
"""

import torch
from torch import Tensor, nn

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.models import Residual, drop_units, hidden_units

START = 0.8  # θ at first
UNIT_PRICE = 5e-4  # c, in mean cross-entropy
BLOCK_PRICE = 0.2
TRAVEL = 3.0  # η such that the price alone would move θ by so much in the whole training
RAREST = 0.05  # a chance below this counts as this: bounds the estimate


class Multipliers:
    """θ of one layer's units, the ξ drawn last, and the step.

    Parameters
    ----------
    price : Tensor, shape (units,)
        c.
    step : float
        η.
    """

    def __init__(self, price: Tensor, step: float) -> None:
        self.price, self.step = price, step
        self.theta = torch.full_like(price, START)
        self.drawn = torch.ones_like(price)

    def draw(self) -> Tensor:
        """ξ, with a gradient."""
        self.drawn = torch.bernoulli(self.theta).requires_grad_()
        return self.drawn

    def update(self) -> None:
        """One projected step from the derivative in the ξ drawn last."""
        assert self.drawn.grad is not None
        on = self.drawn.detach() > 0.5
        chance = torch.where(on, self.theta, 1 - self.theta).clamp_min(RAREST)
        change = self.drawn.grad / (2 * chance)
        self.theta = (self.theta - self.step * (change + self.price)).clamp(0, 1)

    @property
    def kept(self) -> Tensor:
        """Units whose θ is above ½."""
        return self.theta > 0.5


class Gated(nn.Module):
    """A chain whose hidden outputs, or whose blocks' sections, are multiplied by ξ in training, and by θ > ½ in evaluation.

    Parameters
    ----------
    model : nn.Sequential
    multipliers : dict of str to Multipliers
        By the name of the ReLU or of the block.
    """

    def __init__(self, model: nn.Sequential, multipliers: dict[str, Multipliers]) -> None:
        super().__init__()
        self.model, self.multipliers = model, multipliers

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.model.named_children():
            gate = self.multipliers.get(name)
            xi = None if gate is None else gate.draw() if self.training else gate.kept.to(x.dtype)
            if isinstance(module, Residual) and xi is not None:
                x = (x + xi * module.section(x)).relu()
            else:
                x = module(x)
                x = x if xi is None else x * xi
        return x


def unit_prices(model: nn.Module, price: float, by_cost: bool) -> dict[str, Tensor]:
    """``c`` of every hidden unit, by layer: all the same, or in proportion to inputs plus readers, with the same mean."""
    fan = {}
    for layer, reader in hidden_units(model):
        made, read = model.get_submodule(layer).weight, model.get_submodule(reader).weight
        fan[layer] = torch.full((len(made),), float(made[0].numel() + len(read)) if by_cost else 1.0)
    mean = torch.cat(list(fan.values())).mean()
    return {layer: price * cost / mean for layer, cost in fan.items()}


def steps(task: Task) -> int:
    """Of the optimiser, before the retraining."""
    return task.training * -(-len(task.inputs) // task.batch)


def _train(task: Task, model: nn.Sequential, multipliers: dict[str, Multipliers]) -> None:
    def update(step: int) -> None:
        for gate in multipliers.values():
            gate.update()

    task.fit(Gated(model, multipliers), task.training, after_step=update)


def units(task: Task, by_cost: bool) -> Outcome:
    """Train weights and θ together, keep the units with θ > ½, retrain."""
    model = task.build()
    step = TRAVEL / (UNIT_PRICE * steps(task))
    gates = {layer: Multipliers(price, step) for layer, price in unit_prices(model, UNIT_PRICE, by_cost).items()}
    _train(task, model, {str(int(layer) + 1): gate for layer, gate in gates.items()})  # behind the ReLU, the next module
    between = sum(int(((gate.theta > 0.1) & (gate.theta < 0.9)).sum()) for gate in gates.values())
    for layer, reader in hidden_units(model):
        drop_units(model, layer, reader, gates[layer].kept)
    task.fit(model, task.retraining, masks=zeros(model), learning_rate=5e-4)
    return outcome(model, undecided=between)


def blocks(task: Task) -> Outcome:
    """The same with one ξ a residual block: what is off is a layer less."""
    model = task.build()
    names = [name for name, module in model.named_children() if isinstance(module, Residual)]
    step = TRAVEL / (BLOCK_PRICE * steps(task))
    gates = {name: Multipliers(torch.tensor([BLOCK_PRICE]), step) for name in names}
    _train(task, model, gates)
    with torch.no_grad():
        for name, gate in gates.items():
            if not gate.kept.item():
                for parameter in model.get_submodule(name).parameters():
                    parameter.zero_()
    held = {key: mask for key, mask in zeros(model).items() if not mask.any()}
    task.fit(model, task.retraining, masks=held, learning_rate=5e-4, after_step=lambda step: _silence(model, gates))
    return outcome(model, theta=[float(gate.theta) for gate in gates.values()])


@torch.no_grad()
def _silence(model: nn.Module, gates: dict[str, Multipliers]) -> None:
    """Biases of blocks that are off stay 0, so that the block passes on what it gets."""
    for name, gate in gates.items():
        if not gate.kept.item():
            for parameter in model.get_submodule(name).parameters():
                parameter.zero_()


METHODS = (
    Method("Bernoulli units", lambda task: units(task, False), "stochastic", auto=True),
    Method("Bernoulli units by cost", lambda task: units(task, True), "stochastic"),
    Method("Bernoulli layers", blocks, "stochastic", "residual"),
)
