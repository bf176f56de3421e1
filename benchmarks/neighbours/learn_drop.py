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


def run(task: Task) -> Outcome:
    """Train epoch by epoch; drop the front when it is done."""
    model = task.build()
    modules = list(model)
    first: dict[int, float] = {}
    front, inputs = 0, task.inputs
    dropped_at: list[int] = []
    for epoch in range(task.epochs):
        before = {place: snapshot(module) for place, module in enumerate(modules) if any(True for _ in module.parameters())}
        tail = nn.Sequential(*modules[front:])
        task.fit(tail, 1, inputs=inputs, learning_rate=1e-3 * (1 - 0.9 * epoch / task.epochs))
        done = set(range(len(modules))) - set(before)
        for place, values in before.items():
            score = change(values, snapshot(modules[place])) if place >= front else 0.0
            if score < DONE * first.setdefault(place, score) or place < front:
                done.add(place)
        last = next(place for place in range(len(modules)) if place not in done or place == len(modules) - LAST)
        if any(front <= place < last for place in before) and epoch < task.epochs - 1:
            with torch.no_grad():
                inputs = torch.cat([nn.Sequential(*modules[front:last])(part) for part in inputs.split(2000)])
            front = last
            dropped_at.append(epoch)
    return outcome(model, front=front, modules=len(modules), dropped_at=dropped_at)


METHODS = (Method("Learn & Drop", run, "stochastic", "residual"),)
