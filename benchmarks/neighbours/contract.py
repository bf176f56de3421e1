"""The contract: a method is given a task, and gives back a network and who its zeros are.

A `Task` fixes what is the same for all: the data, the start, the number of epochs, the loop. A method is a function of it. What it leaves is judged
by `judge`, which believes no one: a mask that the weights do not keep is an error.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import Dataset
from benchmarks.neighbours.models import MODELS
from nettrim import penalties
from nettrim.errors import NetTrimError

Masks = dict[str, Tensor]


class EpochsError(NetTrimError):
    """A method trained for more epochs, or fewer, than all have."""


@dataclass(frozen=True)
class Outcome:
    """What a method leaves.

    Attributes
    ----------
    model : nn.Module
        In eval mode.
    masks : dict of str to Tensor
        Parameter name to bool, True where a weight is kept.
    notes : dict
        Numbers of the method's own, for the results file.
    start : nn.Module, optional
        The network that its sizes are shares of, where it is not the task's.
    """

    model: nn.Module
    masks: Masks
    notes: dict[str, Any] = field(default_factory=dict)
    start: nn.Module | None = None


@dataclass(frozen=True)
class Method:
    """A method as the table names it.

    Attributes
    ----------
    name : str
    run : callable(Task) -> Outcome
    family : str
        "training", "criterion", "schedule", "penalty", "stochastic" or "depth".
    network : str
        One of `models.MODELS`.
    auto : bool
        Whether `nettrim.prune` runs afterwards not only with evenly spread zeros but with its defaults too, which takes several times as long.
    """

    name: str
    run: Callable[["Task"], Outcome]
    family: str
    network: str = "dense"
    auto: bool = False


@dataclass
class Task:
    """One network to train and prune, with the budget of all.

    Attributes
    ----------
    data : Dataset
    network : str
        One of `models.MODELS`.
    epochs : int
        In all, whatever a method does with them; the last quarter is for retraining with the zeros held, where a method has none of its own.
    seed : int
    samples : int, optional
        Use only the first of the training images.
    batch : int
        Samples in a step.
    shared : dict
        Trained starts by seed, so that criteria on the same network do not train it again; their seconds count all the same.
    """

    data: Dataset
    network: str
    epochs: int
    seed: int
    samples: int | None = None
    batch: int = 200
    shared: dict[Any, tuple[nn.Module, float]] = field(default_factory=dict)
    borrowed: float = 0.0  # seconds of what was taken from `shared`
    spent: int = 0  # epochs, by `fit` and what was taken from `shared`; a loop of a method's own adds its own

    def __post_init__(self) -> None:
        count = min(self.samples or len(self.data.train_inputs), len(self.data.train_inputs))
        held = min(5000, count // 5)
        x, y = self.data.train_inputs[:count], self.data.train_labels[:count]
        self.inputs, self.labels = x[:-held], y[:-held]
        self.held_inputs, self.held_labels = x[-held:], y[-held:]

    @property
    def retraining(self) -> int:
        """Epochs of retraining."""
        return max(1, self.epochs // 4)

    @property
    def training(self) -> int:
        """Epochs before that."""
        return max(1, self.epochs - self.retraining)

    def build(self) -> nn.Sequential:
        """The network at its start, which the seed decides."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return MODELS[self.network](self.data)

    def trained(self) -> nn.Sequential:
        """A copy of the network, plainly trained for the epochs before the retraining."""
        key = (self.network, self.seed)
        if key not in self.shared:
            start = time.perf_counter()
            model = self.fit(self.build(), self.training)
            self.shared[key] = (model, time.perf_counter() - start)
        else:
            self.borrowed += self.shared[key][1]
            self.spent += self.training
        return copy.deepcopy(self.shared[key][0])

    def aside(self) -> "Task":
        """The same task, whose epochs and seconds are not counted here: for a trial that the network in the end does not come from."""
        return replace(self, spent=0, borrowed=0.0)

    def held_accuracy(self, model: nn.Module) -> float:
        """Share of the images kept out of training that are classified right: what decisions are made on, never the test images."""
        with torch.no_grad():
            return float((model(self.held_inputs).argmax(dim=1) == self.held_labels).float().mean())

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        *,
        penalty: Callable[[], Tensor] | None = None,
        after_step: Callable[[int], None] | None = None,
        after_epoch: Callable[[int], None] | None = None,
        masks: Masks | None = None,
        extra: list[nn.Parameter] | None = None,
        learning_rate: float = 1e-3,
        inputs: Callable[[], Tensor] | None = None,
    ) -> nn.Module:
        """Train in place: Adam, a step that falls linearly to a tenth.

        Parameters
        ----------
        model : nn.Module
        epochs : int
        penalty : callable() -> Tensor, optional
            Added to the mean cross-entropy, after the forward pass.
        after_step : callable(int), optional
            Called with the number of the step, from 0, after each.
        after_epoch : callable(int), optional
            Called with the number of the epoch, from 0, in eval mode.
        masks : dict, optional
            Weights that stay zero.
        extra : list of Parameter, optional
            Trained besides the model's own.
        learning_rate : float
        inputs : callable() -> Tensor, optional
            Asked at every epoch for what the model is given in place of the task's images, sample by sample.

        Returns
        -------
        nn.Module
            The model, in eval mode.
        """
        y = self.labels
        self.spent += epochs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            parameters = [p for p in model.parameters() if p.requires_grad] + (extra or [])
            optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
            steps = max(1, epochs * -(-len(y) // self.batch))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * min(1.0, step / steps))
            held = [(model.get_parameter(name), mask) for name, mask in (masks or {}).items()]
            model.train()
            step = 0
            for epoch in range(epochs):
                x = self.inputs if inputs is None else inputs()
                for batch in torch.randperm(len(y)).split(self.batch):
                    loss = functional.cross_entropy(model(x[batch]), y[batch])
                    if penalty is not None:
                        loss = loss + penalty()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    with torch.no_grad():
                        for parameter, mask in held:
                            parameter.mul_(mask)
                    if after_step is not None:
                        after_step(step)
                    step += 1
                if after_epoch is not None:
                    model.eval()
                    after_epoch(epoch)
                    model.train()
        return model.eval()


def zeros(model: nn.Module) -> Masks:
    """Which weights are not zero, by parameter name."""
    return {f"{name}.weight" if name else "weight": weight.detach() != 0 for name, weight in penalties.weights(model).items()}


def outcome(model: nn.Module, **notes: Any) -> Outcome:
    """The network with the zeros that it has."""
    return Outcome(model.eval(), zeros(model), notes)
