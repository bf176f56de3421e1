"""The command line in tests: run as a user runs it, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner, Result
from networks import chain, samples
from torch import nn

from nettrim.cli import main

FILES = ["masks.safetensors", "model.safetensors", "recipe.yaml", "report.html", "report.json"]


def nettrim(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def make_chain() -> nn.Module:
    """What ``commands:make_chain`` names."""
    return chain(8, 12, 4)


def make_random() -> nn.Module:
    """Weights from torch's random numbers as they stand, and not those of ``make_chain``."""
    torch.rand(1)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def calibration_file(folder: Path, count: int = 60, width: int = 8) -> Path:
    np.save(folder / "samples.npy", samples(count, width).numpy())
    return folder / "samples.npy"


def failing() -> nn.Module:
    raise RuntimeError("no weights\nhere")


def not_a_network() -> int:
    return 3


MADE = make_chain()
TABLE = torch.zeros(2)
