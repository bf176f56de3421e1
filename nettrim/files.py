"""Reading arrays from files that someone else made: no pickle runs, nothing is inflated or allocated before its size is known.

Four formats, told by the suffix: ``.npy``, ``.npz``, ``.safetensors``, and ``.pt`` or ``.pth`` (torch's zip form, weights only). What a file
claims is compared with what it holds before memory is taken for it, so that a small file cannot ask for much.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from nettrim.errors import ArgumentError

MAX_BYTES = 2**34  # 16 GiB
MAX_ARRAYS = 1_000_000
_ONE = "arr_0"  # of a file with one array without a name, as numpy.savez calls it
_NAME = 255  # bytes of one part of a path, the limit of the usual file systems
_HEADER = 10_000  # bytes of an .npy header, numpy's own limit
_KINDS = "biuf"  # numpy's letters for bool, int, unsigned and float


def load_arrays(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Read the arrays of a file, whoever wrote it.

    Parameters
    ----------
    path : path
        ``.npy`` (one array, called ``arr_0``), ``.npz``, ``.safetensors``, or ``.pt``/``.pth`` (a tensor, or a flat list or mapping of tensors,
        read with ``weights_only=True``).
    max_bytes : int
        The most that the file, and all its arrays together once inflated, may take.

    Returns
    -------
    dict of str to Tensor
        By name, in the file's order; on the CPU, contiguous, of the file's dtypes.

    Raises
    ------
    ArgumentError
        The file cannot be read, is no such file, is damaged, holds anything else than plain arrays of numbers, or more than ``max_bytes``.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ArgumentError(f"{path}: cannot tell what it holds from its name; expected a file that ends in {', '.join(_READERS)}")
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArgumentError(f"{path} is no regular file; expected a file with arrays")
            if status.st_size > max_bytes:
                raise ArgumentError(f"{path} has {status.st_size} bytes; expected at most {max_bytes}: raise max_bytes if it is yours")
            return read(path, file, max_bytes)
    except ArgumentError:
        raise
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # each parser has its own errors, and a hostile file finds one that is not documented
        raise ArgumentError(
            f"{path} is damaged or no {path.suffix} file ({type(error).__name__}: {_short(error)}); expected one as numpy, safetensors or torch "
            "write it"
        ) from error


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of ``name`` in ``folder``, which it must not leave.

    Parameters
    ----------
    folder : path
    name : str
        A relative path; from a file or a model, so of anyone's choosing.

    Raises
    ------
    ArgumentError
        It is absolute, climbs out, follows a link out, or is no name that a file can have.
    """
    try:
        root = Path(folder).resolve()
        found = (root / name).resolve()
        parts = [len(os.fsencode(part)) for part in found.parts]
    except (ValueError, OSError, RuntimeError) as error:  # a zero byte, a lone surrogate, links in a circle
        raise ArgumentError(f"{name!r} is no file name here: {error}") from error
    if max(parts) > _NAME:
        raise ArgumentError(f"{name[:80]!r}… is too long for a file name; expected parts of at most {_NAME} bytes")
    if os.path.isabs(name) or found == root or not found.is_relative_to(root):
        raise ArgumentError(f"{name!r} does not lie in {root}; expected a relative name that stays in that folder")
    return found


def _open_without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would wait for ever


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _refuse(path: Path, what: str) -> NoReturn:
    raise ArgumentError(f"{path}: {what}")


def _read_npy(path: Path, file: IO[bytes], max_bytes: int) -> dict[str, Tensor]:
    return {_ONE: _array(path, _ONE, file, os.fstat(file.fileno()).st_size, max_bytes)}


def _array(path: Path, name: str, file: IO[bytes], size: int, max_bytes: int) -> Tensor:
    """One ``.npy`` of ``size`` bytes from a stream, allocated only when its header says what its size says."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        _refuse(path, f"array {name!r} is in version {version} of the .npy format; expected 1.0 or 2.0, which plain numbers need")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    counted = _Counted(file)
    shape, fortran, dtype = read_header(counted, max_header_size=_HEADER)  # type: ignore[arg-type]
    if dtype.hasobject or dtype.kind not in _KINDS or dtype.itemsize > 8:
        _refuse(path, f"array {name!r} has dtype {dtype}; expected bool, integers or floating-point numbers of at most 64 bits")
    entries = 1
    for length in shape:
        if length < 0:
            _refuse(path, f"array {name!r} has the shape {shape}; expected lengths of at least 0")
        entries *= length
    wanted, left = entries * dtype.itemsize, size - np.lib.format.MAGIC_LEN - counted.count
    if wanted != left or wanted > max_bytes:
        _refuse(path, f"array {name!r} says that it has {wanted} bytes and has {left}; expected the same number, at most {max_bytes}")
    data = bytearray(wanted)
    view, filled = memoryview(data), 0
    while filled < wanted:
        piece = file.read(min(wanted - filled, 2**24))
        if not piece:
            _refuse(path, f"array {name!r} ends after {filled} of {wanted} bytes")
        view[filled : filled + len(piece)] = piece
        filled += len(piece)
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape))


class _Counted:
    """A stream that counts what is read of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.count = file, 0

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self.count += len(piece)
        return piece


def _members(path: Path, archive: zipfile.ZipFile, max_bytes: int) -> list[zipfile.ZipInfo]:
    """The members of a zip file, once what they say of their sizes has been found bearable (more than it says is never inflated)."""
    members = archive.infolist()
    if len(members) > MAX_ARRAYS:
        _refuse(path, f"holds {len(members)} members; expected at most {MAX_ARRAYS}")
    if len({member.filename for member in members}) < len(members):
        _refuse(path, "holds two members of one name")
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        _refuse(path, f"holds {total} bytes once inflated; expected at most {max_bytes}: raise max_bytes if it is yours")
    return members


def _read_npz(path: Path, file: IO[bytes], max_bytes: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with zipfile.ZipFile(file) as archive:
        for member in _members(path, archive, max_bytes):
            name = member.filename.removesuffix(".npy")
            if name in found or not member.filename.endswith(".npy"):
                _refuse(path, f"holds {member.filename!r}; expected arrays NAME.npy, each once")
            with archive.open(member) as stream:
                found[name] = _array(path, name, stream, member.file_size, max_bytes)
                if stream.read(1):  # to its end: only there is the checksum compared
                    _refuse(path, f"array {name!r} goes on behind its end")
    return found


def _read_safetensors(path: Path, file: IO[bytes], max_bytes: int) -> dict[str, Tensor]:
    # tensors fill the file without holes or overlaps (the library checks it), so the file's size bounds them
    return _plain(path, safetensors.torch.load_file(path), max_bytes)


def _read_torch(path: Path, file: IO[bytes], max_bytes: int) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in _members(path, archive, max_bytes)):
            _refuse(path, "is compressed inside; expected a file as torch.save writes it")
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(loaded, Tensor):
        loaded = {_ONE: loaded}
    elif isinstance(loaded, list | tuple):
        loaded = {f"arr_{index}": value for index, value in enumerate(loaded)}
    if not isinstance(loaded, Mapping):
        _refuse(path, f"holds a {type(loaded).__name__}; expected a tensor, or a flat list or mapping of tensors")
    return _plain(path, loaded, max_bytes)


def _plain(path: Path, loaded: Mapping[Any, Any], max_bytes: int) -> dict[str, Tensor]:
    """The tensors by name, what is no plain tensor of numbers is refused."""
    total = 0
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            _refuse(path, f"holds a {type(value).__name__} under {name!r}; expected tensors with names")
        if value.is_meta or value.is_quantized or value.layout != torch.strided or value.is_complex():
            _refuse(path, f"tensor {name!r} is {value.dtype}, {value.layout}, on {value.device}; expected plain numbers")
        total += value.numel() * value.element_size()  # a view may repeat a small memory without end
    if total > max_bytes:
        _refuse(path, f"holds tensors of {total} bytes; expected at most {max_bytes}: raise max_bytes if it is yours")
    return {name: _own(value.detach()) for name, value in loaded.items()}


def _own(value: Tensor) -> Tensor:
    """The tensor, contiguous and alone in its memory: a copy where it is not so."""
    alone = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if alone else value.clone(memory_format=torch.contiguous_format)


_READERS: dict[str, Callable[[Path, IO[bytes], int], dict[str, Tensor]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
