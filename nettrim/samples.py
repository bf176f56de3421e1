"""Calibration data of the command line: files of arrays, folders of images or text, read in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettrim.errors import CalibrationError
from nettrim.files import MAX_BYTES, load_arrays
from nettrim.sources.base import Reading, Source

ARRAYS = (".npy", ".npz", ".safetensors")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEXTS = (".txt", ".md")


def read(source: Source, path: Path, reading: Reading, *, key: str | None = None, max_bytes: int = MAX_BYTES) -> Any:
    """Calibration data as :func:`nettrim.prune` takes it.

    Parameters
    ----------
    source : Source
        The network that the samples are for: it knows its tokenizer and the names of its arguments.
    path : Path
        A file of arrays (``.npy``, ``.npz``, ``.safetensors``), a file of text, or a folder of images or of text, with folders in it.
    reading : Reading
    key : str, optional
        Of several arrays, the one that holds the inputs.
    max_bytes : int
        The most that a file of arrays may hold.

    Raises
    ------
    CalibrationError
        There is nothing there that can be read so.
    """
    reading = source.completed(reading)
    if path.is_dir():
        images, texts = files_of(path, IMAGES), files_of(path, TEXTS)
        if bool(images) == bool(texts):
            what = "both images and text" if images else "neither images nor text"
            raise CalibrationError(
                f"{path} holds {what}; expected a folder of images ({', '.join(IMAGES)}) or of text ({', '.join(TEXTS)}), "
                f"or a file ({', '.join(ARRAYS)})"
            )
        if key is not None:
            raise CalibrationError(f"--key {key} was given with {path}, a folder; expected it with a file of several arrays")
        return source.from_images(_images(images, reading), reading) if images else source.from_texts(list(map(_text, texts)), reading)
    suffix = path.suffix.lower()
    if suffix in TEXTS and path.is_file():
        return source.from_texts([_text(path)], reading)
    if suffix not in ARRAYS or not path.is_file():
        raise CalibrationError(f"{path} is no calibration data; expected a file ({', '.join((*ARRAYS, *TEXTS))}) or a folder of images or text")
    arrays = load_arrays(path, max_bytes=max_bytes)
    if key is not None:
        if key not in arrays:
            raise CalibrationError(f"{path} has no array {key!r}; expected one of {', '.join(map(repr, arrays))}")
        arrays = {key: arrays[key]}
    if reading.samples is not None:
        arrays = {name: value[: reading.samples] if value.dim() else value for name, value in arrays.items()}
    return source.from_arrays(arrays)


def files_of(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files below a folder that end so, in an order that is the same everywhere; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise CalibrationError(f"{path} is no UTF-8 text ({error}); convert it first") from error


def _images(paths: list[Path], reading: Reading) -> Tensor:
    """(samples, 3, height, width): RGB in [0, 1], resized to ``image_size`` (bilinear, both sides), less the mean, over the deviation."""
    from PIL import Image

    if reading.image_size is None:
        raise CalibrationError("the size of the images is not known; say it with --image-size, such as --image-size 224x224")
    height, width = reading.image_size
    found = []
    for path in paths[: reading.samples]:
        try:
            with Image.open(path) as image:
                found.append(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise CalibrationError(f"{path} cannot be read as an image ({error}); take it out of the folder") from error
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (reading.image_mean or (0.0,), reading.image_std or (1.0,)))
    return ((pixels - mean) / std).contiguous()
