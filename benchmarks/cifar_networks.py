"""The networks of ``python -m benchmarks.cifar``, and how they are trained: the papers' ConvNet and a small ResNet with BatchNorm.

    python -m benchmarks.cifar_networks            # trains both anew and writes benchmarks/cifar_weights

What is committed there was made by this command; its networks are rounded to bfloat16, so that both fit into 2 MB. The benchmark measures the
rounded networks: what is read here is what is pruned.
"""

import hashlib
import json
import lzma
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cifar_data import CROP, LOADERS, SIDE, Images, centres, normalised
from benchmarks.data import DataError, cache_folder

COMMITTED = Path(__file__).resolve().parent / "cifar_weights"
TITLES = {"convnet": "ConvNet", "resnet": "ResNet-8 with BatchNorm", "tiny": "tiny ResNet"}


class Block(nn.Module):
    """Two 3 × 3 convolutions with BatchNorm, added to the input (by way of a 1 × 1 convolution where the shape changes), then a ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(images, inputs, height, width) to (images, outputs, height / stride, width / stride)."""
        return F.relu(self.skip(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def convnet() -> nn.Module:
    """The papers': two 5 × 5 convolutions of 64 channels with maximum pooling behind their ReLU, then 2304-384-192-10."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(),
        nn.Linear(2304, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 10),
    )  # fmt: skip


def resnet(*widths: int) -> nn.Module:
    """A convolution, a block a width (the first of stride 1, the others of 2), the mean over the positions, a linear layer."""
    stem = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
    blocks = [Block(before, after, 1 if place == 0 else 2) for place, (before, after) in enumerate(pairs)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov's momentum, its step risen and lowered once, on random crops and mirror images.

    Attributes
    ----------
    epochs : int
    step : float
        The largest.
    decay : float
        Weight decay.
    batch : int
    """

    epochs: int
    step: float
    decay: float = 5e-4
    batch: int = 128


NETWORKS = {"convnet": convnet, "resnet": lambda: resnet(24, 48, 96), "tiny": lambda: resnet(4, 8)}
RECIPES = {"convnet": Recipe(14, 0.05), "resnet": Recipe(9, 0.3), "tiny": Recipe(8, 0.1, batch=64)}


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode, and what tells its weights from others."""

    model: nn.Module
    fingerprint: str


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor, batch: int = 500) -> Tensor:
    """The outputs, (images, classes), a batch at a time."""
    return torch.cat([model(part) for part in inputs.split(batch)])


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of the images, in [0, 1], whose largest output is that of their class."""
    return float((outputs.argmax(dim=1) == labels).float().mean())


def augmented(images: Tensor) -> Tensor:
    """A crop of 24 × 24 of each image at a random place, every other one mirrored, normalised; the caller's generator decides."""
    images = normalised(images)
    top, left = torch.randint(SIDE - CROP + 1, (2, len(images), 1, 1, 1))
    row, column = torch.arange(CROP).view(1, 1, -1, 1), torch.arange(CROP).view(1, 1, 1, -1)
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    column = torch.where(mirrored, CROP - 1 - column, column) + left
    here, colour = torch.arange(len(images)).view(-1, 1, 1, 1), torch.arange(3).view(1, -1, 1, 1)
    return images[here, colour, row + top, column]


def train(data: Images, network: str, recipe: Recipe, seed: int) -> nn.Module:
    """A network trained from a random start, in eval mode; the products of training are in bfloat16, the weights in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[network]().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = len(data.train)
        each = -(-images // recipe.batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=recipe.step, momentum=0.9, nesterov=True, weight_decay=recipe.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.step, total_steps=recipe.epochs * each, pct_start=0.25)
        for epoch in range(recipe.epochs):
            start, total = time.perf_counter(), 0.0
            for batch in torch.randperm(images).split(recipe.batch):
                inputs = augmented(data.train[batch]).contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(inputs).float(), data.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(batch)
            click.echo(f"{network}, epoch {epoch + 1}: loss {total / images:.3f}, {time.perf_counter() - start:.0f} s", err=True)
    return model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def packed(model: nn.Module) -> bytes:
    """The network's numbers rounded to bfloat16, as safetensors, compressed; filters for numbers of two bytes."""
    numbers = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in model.state_dict().items()}
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}]
    return lzma.compress(save(numbers), filters=filters)


def unpacked(network: str, content: bytes) -> nn.Module:
    """The inverse of `packed`: a network in float32, in eval mode.

    Raises
    ------
    DataError
        The bytes are none of such a network.
    """
    model = NETWORKS[network]()
    try:
        model.load_state_dict(load(lzma.decompress(content)))
    except (lzma.LZMAError, ValueError, RuntimeError) as error:
        raise DataError(f"The stored weights of {network} cannot be read ({error}). Make them again: python -m benchmarks.cifar_networks.") from error
    return model.eval()


def _fingerprint(data: Images, network: str, recipe: Recipe, seed: int) -> str:
    """Short hash of all that training depends on."""
    settings = {"data": data.name, "network": str(NETWORKS[network]()), "seed": seed, **asdict(recipe)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(data.train_labels.numpy().tobytes())
    digest.update(data.train[:: max(1, len(data.train) // 100)].contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def load_or_train(data: Images, network: str, recipe: Recipe, seed: int = 0, committed: Path = COMMITTED) -> Trained:
    """The network of this recipe: committed, or trained before, or trained now and kept in ``benchmarks/.data/networks``."""
    fingerprint = _fingerprint(data, network, recipe, seed)
    name = f"{data.name}-{network}-{fingerprint}.safetensors.xz"
    places = [committed / name, cache_folder() / "networks" / name]
    path = next((place for place in places if place.is_file()), places[-1])
    if not path.is_file():
        content = packed(train(data, network, recipe, seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        partial.write_bytes(content)
        partial.replace(path)
    return Trained(unpacked(network, path.read_bytes()), fingerprint)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), default=("convnet", "resnet"), show_default=True)
@click.option("--data", "data_name", type=click.Choice(list(LOADERS)), default="cifar", show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images; the recipe's own if not given.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=COMMITTED, show_default=True)
def main(networks: tuple[str, ...], data_name: str, epochs: int | None, seed: int, out: Path) -> None:
    """Train networks and write their weights, rounded to bfloat16, where the benchmark looks first."""
    data = LOADERS[data_name]()
    out.mkdir(parents=True, exist_ok=True)
    for network in networks:
        recipe = RECIPES[network] if epochs is None else replace(RECIPES[network], epochs=epochs)
        content = packed(train(data, network, recipe, seed))
        path = out / f"{data.name}-{network}-{_fingerprint(data, network, recipe, seed)}.safetensors.xz"
        path.write_bytes(content)
        found = accuracy(logits(unpacked(network, content), centres(data.test)), data.test_labels)
        click.echo(f"{path}: {len(content):,} bytes, test accuracy {100 * found:.2f} %")


if __name__ == "__main__":
    main()
