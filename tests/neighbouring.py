"""What the tests of the neighbours share: data whose answer is known."""

import torch

from benchmarks.data import Dataset
from benchmarks.neighbours.contract import Task


def separable(samples: int = 1200, pixels: int = 16) -> Dataset:
    """Three classes told by the first 3 pixels; the others are noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (samples,), generator=generator)
    inputs = 0.3 * torch.rand(samples, pixels, generator=generator)
    inputs[torch.arange(samples), labels] += 1
    return Dataset("separable", inputs[:-200], labels[:-200], inputs[-200:], labels[-200:])


def task(data: Dataset, network: str = "dense", epochs: int = 12, **options) -> Task:
    """Small batches, so that a few epochs are enough."""
    return Task(data, network, epochs, seed=0, batch=20, **options)
