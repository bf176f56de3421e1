"""What the commands need of a network, wherever it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nettrim import folder
from nettrim.calibration import LABEL_NAMES
from nettrim.errors import ArgumentError


@dataclass(frozen=True)
class Reading:
    """How samples are made from files of text or images.

    Attributes
    ----------
    samples : int or None
        At most so many, the first ones.
    batch_size : int
        Of them at a time through the network.
    sequence_length : int or None
        Tokens of a sample of text.
    image_size : (int, int) or None
        Height and width.
    image_mean, image_std : tuple of float or None
        One for each channel, or one for all, of values in [0, 1].
    """

    samples: int | None = None
    batch_size: int = 8
    sequence_length: int | None = None
    image_size: tuple[int, int] | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None


class Source:
    """A network and what goes with it. The base is one that is called with tensors and saved as a state dict.

    Attributes
    ----------
    model : nn.Module
    forward_fn : callable or None
        How a batch is run, where ``model(batch)`` is not how.
    files : list of Path
        What it was read from.
    """

    model: nn.Module
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    files: list[Path]

    def from_arrays(self, arrays: dict[str, Tensor]) -> Any:
        """Calibration data from named arrays: one that is no label is the input, several are arguments by name."""
        inputs = {name: value for name, value in arrays.items() if name not in LABEL_NAMES and not re.fullmatch("y|y_.*", name)}
        if not inputs:
            raise ArgumentError(f"the arrays {', '.join(map(repr, arrays)) or '(none)'} look like labels; expected inputs: name them with --key")
        return next(iter(inputs.values())) if len(inputs) == 1 else inputs

    def from_texts(self, texts: Sequence[str], reading: Reading) -> list[Any]:
        """Batches from texts."""
        raise ArgumentError("text needs a tokenizer, which comes with a Hugging Face folder; expected arrays or images for this model")

    def completed(self, reading: Reading) -> Reading:
        """The reading with what the model itself says where nothing is asked for."""
        return reading

    def from_images(self, images: Tensor, reading: Reading) -> list[Any]:
        """Batches from images, (samples, channels, height, width)."""
        return list(images.split(reading.batch_size))

    def write(self, pruned: nn.Module, place: Path) -> None:
        """The pruned network into an existing folder."""
        folder.write_model(pruned, place)

    def read_pruned(self, place: Path) -> nn.Module:
        """The network that :meth:`write` put into a folder, as a module of its own."""
        raise NotImplementedError
