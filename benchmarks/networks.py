"""The fully connected networks of the Net-Trim papers and how they are trained.

Two recipes: plain, and ℓ1 regularisation with dropout (Aghasi et al., NIPS 2017, section 6). Adam at 1e-3, batches of
200, a staircase decay of the step. Trained weights are cached under ``benchmarks/.data/networks``, keyed by everything
that decides them, so that a second run starts pruning at once.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import Dataset, cache_folder

# Widths of the hidden layers. "fc" and "lenet" are the papers'; "tiny" is for data as small as the tests'.
NETWORKS: dict[str, tuple[int, ...]] = {"fc": (300, 1000, 100), "lenet": (300, 100), "tiny": (24, 16)}
TITLES = {"fc": "FC 784-300-1000-100-10", "lenet": "LeNet-300-100", "tiny": "tiny"}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes
    ----------
    name : str
        Name as given on the command line.
    epochs : int
        Passes over the training samples.
    l1 : float
        Weight of the sum of absolute values of all parameters, added to the mean cross-entropy.
    keep : float
        Probability that an input of a layer is kept in training (dropout); 1 for none.
    learning_rate : float
        Adam's first step.
    decay : float
        Factor on the step, applied ``decays`` times over the training, at equal distances.
    decays : int
        Number of decays. The authors' is 0.97 every 500 steps for 20,000 steps, that is 40 times: the same
        staircase, over a training of any length.
    batch_size : int
        Samples in a step.
    """

    name: str
    epochs: int
    l1: float = 0.0
    keep: float = 1.0
    learning_rate: float = 1e-3
    decay: float = 0.97
    decays: int = 40
    batch_size: int = 200


RECIPES = {
    "plain": Recipe("plain", epochs=20),
    "l1-dropout": Recipe("l1-dropout", epochs=20, l1=1e-5, keep=0.5),
}


@dataclass(frozen=True)
class Trained:
    """A trained network, and where it is kept.

    Attributes
    ----------
    model : nn.Sequential
        ``nn.Linear`` layers with ``nn.ReLU`` between them, in eval mode, on the CPU, float32.
    accuracy : float
        Share of the test samples classified right, in [0, 1].
    seconds : float
        Training time; that of the first training where the weights come from the cache.
    path : Path
        The cached weights (safetensors).
    """

    model: nn.Sequential
    accuracy: float
    seconds: float
    path: Path


def build(inputs: int, hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """Fully connected network: Linear, ReLU, ..., Linear, with biases and no activation after the last layer."""
    layers: list[nn.Module] = []
    widths = (inputs, *hidden, classes)
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of samples, in [0, 1], whose largest output is that of their class."""
    return float((model(inputs).argmax(dim=1) == labels).float().mean())


def _with_dropout(model: nn.Sequential, keep: float) -> nn.Sequential:
    """The same modules (shared, not copied) with dropout on the input of every linear layer."""
    layers: list[nn.Module] = []
    for module in model:
        if isinstance(module, nn.Linear) and keep < 1:
            layers.append(nn.Dropout(1 - keep))
        layers.append(module)
    return nn.Sequential(*layers)


def train(
    data: Dataset, hidden: tuple[int, ...], recipe: Recipe, seed: int, progress: Callable[[int], None] | None = None
) -> nn.Sequential:
    """Train a network from a random start.

    Parameters
    ----------
    data : Dataset
        Its training samples are used, all of them.
    hidden : tuple of int
        Widths of the hidden layers.
    recipe : Recipe
        The settings.
    seed : int
        Decides the start, the order of the samples and the dropout; the caller's generators are left as they were.
    progress : callable, optional
        Called with the number of the epoch, from 1, after each.

    Returns
    -------
    nn.Sequential
        In eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(data.train_inputs.shape[1], hidden, data.classes)
        training = _with_dropout(model, recipe.keep).train()
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
        samples = len(data.train_inputs)
        steps = recipe.epochs * -(-samples // recipe.batch_size)
        every = max(1, steps // recipe.decays)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=every, gamma=recipe.decay)
        for epoch in range(recipe.epochs):
            for batch in torch.randperm(samples).split(recipe.batch_size):
                loss = functional.cross_entropy(training(data.train_inputs[batch]), data.train_labels[batch])
                if recipe.l1 > 0:
                    loss = loss + recipe.l1 * torch.stack([p.abs().sum() for p in parameters]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if progress is not None:
                progress(epoch + 1)
    return model.eval()


def load_or_train(
    data: Dataset,
    network: str,
    recipe: Recipe,
    *,
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trained:
    """The trained network, from the cache if it was trained before with the same settings on the same data.

    Parameters
    ----------
    data : Dataset
        What to train and test on.
    network : str
        One of ``NETWORKS``.
    recipe : Recipe
        The settings.
    seed : int, default=0
        As for `train`.
    cache : Path, optional
        Folder of the cache; ``benchmarks/.data/networks`` if not given.
    progress : callable, optional
        As for `train`; not called when the weights come from the cache.

    Returns
    -------
    Trained
        The network and what it scores.
    """
    hidden = NETWORKS[network]
    settings = json.dumps(
        {"data": data.name, "fingerprint": data.fingerprint, "hidden": hidden, "seed": seed, **asdict(recipe)},
        sort_keys=True,
    )
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    folder = cache_folder() / "networks" if cache is None else cache
    path = folder / f"{data.name}-{network}-{recipe.name}-{key}.safetensors"
    if path.is_file():
        model = build(data.train_inputs.shape[1], hidden, data.classes).eval()
        with safe_open(path, framework="pt") as stored:
            model.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})
            seconds = float(stored.metadata()["seconds"])
    else:
        start = time.perf_counter()
        model = train(data, hidden, recipe, seed, progress)
        seconds = time.perf_counter() - start
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        save_file(model.state_dict(), partial, metadata={"settings": settings, "seconds": f"{seconds:.3f}"})
        partial.replace(path)
    return Trained(model, accuracy(model, data.test_inputs, data.test_labels), seconds, path)
