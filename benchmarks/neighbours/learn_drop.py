"""Learn & Drop (Cruciata, Cruciata, Lo Presti, van Gemert, La Cascia: Fast learning of CNNs based on layer dropping, arXiv 2604.23403).

A layer's score is how much its parameters still change in an epoch, ``‖W_t − W_{t−1}‖₁ / ‖W_{t−1}‖₁``. Layers that change little go on no more: they
are frozen, and dropped from the forward pass of the training. The smallest form of it: a layer is done when its score is below a share of its
first; the done layers at the front are run once, and what they put out is the rest's input from then on. Nothing is zero in the end: what
it saves is seconds of training.
"""

import torch
from torch import Tensor, nn

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome

DONE = 0.2  # of the first score
LAST = 2  # modules at the end that always learn


def change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """``‖after − before‖₁ / ‖before‖₁`` over all parameters of a module."""
    return float(sum((after[name] - before[name]).abs().sum() for name in before) / sum(value.abs().sum() for value in before.values()))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class Tail(nn.Module):
    """A chain whose front can be dropped: from then on it is given what the front puts out.

    Parameters
    ----------
    chain : nn.Sequential
    """

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.chain, self.front = chain, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.chain[self.front :](x)

    @torch.no_grad()
    def drop(self, last: int, inputs: Tensor) -> Tensor:
        """Drop the modules before ``last``, and give what they make of the inputs."""
        gone = self.chain[self.front : last]
        self.front = last
        return torch.cat([gone(part) for part in inputs.split(2000)])


def run(task: Task) -> Outcome:
    """Train; after an epoch, drop the front if it is done. What is dropped gets no gradient, so that the optimiser leaves it as it is."""
    model = task.build()
    tail = Tail(model)
    learning = {place: module for place, module in enumerate(model) if any(True for _ in module.parameters())}
    before = {place: snapshot(module) for place, module in learning.items()}
    first: dict[int, float] = {}
    inputs = task.inputs
    dropped_at: list[int] = []

    def drop(epoch: int) -> None:
        nonlocal before, inputs
        scores = {place: change(before[place], snapshot(module)) for place, module in learning.items()}
        before = {place: snapshot(module) for place, module in learning.items()}
        working = [place for place, score in scores.items() if place >= tail.front and score >= DONE * first.setdefault(place, score)]
        last = min([*working, len(model) - LAST])
        if any(tail.front <= place < last for place in learning) and epoch < task.epochs - 1:
            inputs = tail.drop(last, inputs)
            dropped_at.append(epoch)

    task.fit(tail, task.epochs, inputs=lambda: inputs, after_epoch=drop)
    return outcome(model, front=tail.front, modules=len(model), dropped_at=dropped_at)


METHODS = (Method("Learn & Drop", run, "stochastic", "residual"),)
