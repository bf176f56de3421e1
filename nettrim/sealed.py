"""Files that are either whole or not there: tensors and a record in one safetensors file, with a checksum over both.

Written to a temporary file in the same folder, flushed to the disk, then renamed over the old one, which is one step to every reader and to a power
cut. Safetensors and JSON hold numbers and text alone, so reading a file runs nothing that it says.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from nettrim import fingerprints
from nettrim.errors import CheckpointError

TEMPORARY = ".tmp"


class Damaged(Exception):
    """A file is not what was written."""


def write(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors and a record of JSON's own types (and NaN and infinity) to ``path``.

    Raises
    ------
    CheckpointError
        The file cannot be written: the disk is full, or the folder read-only. What was there before still is.
    """
    text = json.dumps(record)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, {"record": text, "checksum": _checksum(plain, text)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` was given.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    Damaged
        It is not whole.
    CheckpointError
        It cannot be read.
    """
    try:
        with path.open("rb"):  # safetensors says of a file that it may not read only that it is not there
            pass
        with safetensors.safe_open(path, "pt") as file:
            kept = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = kept["record"]
        if kept["checksum"] != _checksum(tensors, text):
            raise Damaged("its checksum is another one")
        record = json.loads(text)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    return tensors, record


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    return fingerprints.digest({"record": text, **{f"tensor {name}": fingerprints.tensor_hash(value) for name, value in tensors.items()}})


def write_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` into ``path`` in one step.

    Raises
    ------
    CheckpointError
        As of `write`.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")  # always the same name: what a killed process left is written over
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. The model is unchanged, and the layers kept before this one still are: "
            "make room, or let the folder be written to, and call again"
        ) from error


def flush_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a file that was renamed is only then there after a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows: folders cannot be opened, and names are written with the file
        return
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor := os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        os.fsync(descriptor)
