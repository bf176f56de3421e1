"""The networks that the neighbours are run on: LeNet-300-100, a LeNet-5, and a small residual ConvNet, on images given as rows of pixels."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.data import Dataset
from benchmarks.networks import NETWORKS, build
from nettrim.errors import ArgumentError


class Residual(nn.Module):
    """``relu(x + keep · conv(relu(conv(x))))``: without its nonlinear section the block passes x on, which is 0 or more already.

    Parameters
    ----------
    channels : int
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def section(self, x: Tensor) -> Tensor:
        """The nonlinear section."""
        return self.second(self.first(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.section(x)).relu()


def dense(data: Dataset) -> nn.Sequential:
    """LeNet-300-100; the tests' 24-16 on images of less than 100 pixels."""
    pixels = data.train_inputs.shape[1]
    return build(pixels, NETWORKS["lenet" if pixels >= 100 else "tiny"], data.classes)


def filters(data: Dataset) -> nn.Sequential:
    """LeNet-5 with ReLU and max-pooling: 6 and 16 filters, then 120 and 84 units."""
    side = math.isqrt(data.train_inputs.shape[1])
    kernel, padding = (5, 0) if side >= 16 else (3, 1)
    left = ((side - kernel + 1 + 2 * padding) // 2 - kernel + 1 + 2 * padding) // 2
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 6, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * left * left, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, data.classes),
    )


def residual(data: Dataset, *, channels: int = 12, blocks: int = 4) -> nn.Sequential:
    """A residual ConvNet: a stem that brings the image to 7 × 7 (or 8 × 8), blocks of two 3 × 3 convolutions, a linear layer."""
    side = math.isqrt(data.train_inputs.shape[1])
    stride = max(1, side // 7)
    left = side // stride
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, channels, stride, stride=stride),
        nn.ReLU(),
        *[Residual(channels) for _ in range(blocks)],
        nn.Flatten(),
        nn.Linear(channels * left * left, data.classes),
    )


MODELS: dict[str, Callable[[Dataset], nn.Sequential]] = {"dense": dense, "filters": filters, "residual": residual}
TITLES = {"dense": "LeNet-300-100", "filters": "LeNet-5", "residual": "residual ConvNet"}


def hidden_units(model: nn.Module) -> list[tuple[str, str]]:
    """Each layer of a chain whose units are hidden, with the layer that reads them, by name.

    Raises
    ------
    ArgumentError
        The model is no ``nn.Sequential`` of such layers: who reads whom is not known.
    """
    if not isinstance(model, nn.Sequential):
        raise ArgumentError(f"got a {type(model).__name__}; expected an nn.Sequential, whose layers read each other in turn")
    names = [name for name, module in model.named_children() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return list(zip(names[:-1], names[1:], strict=True))


@torch.no_grad()
def drop_units(model: nn.Module, layer: str, reader: str, kept: Tensor) -> None:
    """Zero the units of a layer that are not kept: their rows, their biases and what the next layer reads from them. In place.

    Parameters
    ----------
    model : nn.Module
    layer, reader : str
        As from `hidden_units`.
    kept : Tensor, shape (units,)
        bool.
    """
    made, read = model.get_submodule(layer), model.get_submodule(reader)
    gone = ~kept
    made.weight[gone] = 0
    made.bias[gone] = 0
    positions = read.weight.shape[1] // len(kept)
    read.weight[:, gone.repeat_interleave(positions)] = 0
