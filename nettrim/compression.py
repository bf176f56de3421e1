"""Pruned weights on disk: the values that are kept, and where they were, in a safetensors file.

Of each masked tensor the file holds ``NAME:values``, its kept entries in its own dtype, in order, and one of two codings of their positions,
whichever is smaller:

* ``NAME:bits`` (uint8): one bit an entry, the first in the lowest bit.
* ``NAME:gaps`` (uint8): for each kept entry, how many that are not kept lie before it since the last one; 255 stands for 255 entries of which none
  is kept. Entries after the last kept one are coded so too, as far as there are 255 of them. At most one byte a kept entry, so smaller than
  the bits below 12.5 % kept.

All other tensors are stored as they are. The header names the format, the shapes, and tensors that are one in memory. Safetensors holds no code, and
everything that says a size is checked against what is there before anything is made.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nettrim.errors import ArgumentError, FormatError, MaskError
from nettrim.surroundings import left_out

FORMAT = "nettrim-compressed-1"
_SKIP = 255


@dataclass(frozen=True)
class CompressedSize:
    """What ``save_compressed`` wrote.

    Attributes
    ----------
    bytes : int
        Of the file.
    dense_bytes : int
        Of the tensors as they are in memory.
    """

    bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes, {self.dense_bytes / max(1, self.bytes):.1f} times smaller than {self.dense_bytes:,} dense"


@left_out()
def save_compressed(
    model_or_state: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor] | None, path: str | os.PathLike[str]
) -> CompressedSize:
    """Write a pruned network's tensors without its zeros; :func:`load_compressed` gives them back
    bit for bit. (A -0 that is left out comes back as 0.)

    Parameters
    ----------
    model_or_state : nn.Module or mapping of str to Tensor
        A network, or its ``state_dict()``; dense (see :func:`nettrim.to_dense`) and with its masks made permanent.
    masks : mapping of str to Tensor, or None
        Parameter name to a bool tensor, True where a weight is kept. None: the zeros of every floating tensor of two dimensions or more are left out.
    path : path
        Written beside itself first, so that a file that is there is whole.

    Returns
    -------
    CompressedSize
        ``str`` says it in words.

    Raises
    ------
    ArgumentError
        The state holds something that is no dense tensor, or a mask does not fit.
    MaskError
        There are weights where a mask says that there are none: they would be lost.
    OSError
        The file cannot be written.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) and value.layout == torch.strided for value in state.values()):
        odd = [key for key, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, Mapping) else [type(state).__name__]
        raise ArgumentError(f"got a state with {', '.join(map(str, odd)) or 'sparse tensors'}; expected dense tensors by name")
    chosen = _chosen(state, masks)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    same: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if value.numel() and place in first:
            same[name] = first[place]
            continue
        first[place] = name
        whole = value.detach().cpu().contiguous()
        if name not in chosen:
            tensors[name] = whole.clone()
            continue
        kept = chosen[name].cpu().reshape(-1).numpy()
        shapes[name] = list(value.shape)
        tensors[f"{name}:values"] = whole.reshape(-1)[torch.from_numpy(kept)]
        bits, gaps = np.packbits(kept, bitorder="little"), _gaps(kept)
        coding, code = ("gaps", gaps) if len(gaps) < len(bits) else ("bits", bits)
        tensors[f"{name}:{coding}"] = torch.from_numpy(code)
    clash = (shapes.keys() | same.keys()) & tensors.keys()
    if clash or len(tensors) != len(state) - len(same) + len(shapes):
        raise ArgumentError(f"the state's names clash with NAME:values, NAME:bits or NAME:gaps: {', '.join(sorted(state))}; rename them")
    header = {"format": FORMAT, "shapes": json.dumps(shapes), "same": json.dumps(same)}
    _write(Path(path), tensors, header)
    return CompressedSize(Path(path).stat().st_size, sum(value.numel() * value.element_size() for key, value in state.items() if key not in same))


@left_out()
def load_compressed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what :func:`save_compressed` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict of str to Tensor
        Dense tensors on the CPU, for ``load_state_dict``; tensors that were one in memory are one again.

    Raises
    ------
    FormatError
        The file is no such file, or damaged; the message says what does not fit.
    OSError
        It cannot be read.
    """
    with open(path, "rb"):
        pass  # a missing file is an OSError, not a bad format
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safetensors has no other iterator)
    except safetensors.SafetensorError as error:
        raise FormatError(f"{path} is no whole safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise FormatError(f"{path} has format {header.get('format')!r}; expected {FORMAT!r}: use safetensors.torch.load_file for an ordinary file")
    try:
        shapes, same = json.loads(header["shapes"]), json.loads(header["same"])
        for name, shape in shapes.items():
            tensors[name] = _dense(tensors, name, shape)
        for name, other in same.items():
            tensors[name] = tensors[other]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return tensors


def _chosen(state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Which entries of which tensors are stored."""
    if masks is None:
        return {key: _nonzero(value) for key, value in state.items() if value.is_floating_point() and value.dim() > 1 and value.numel()}
    for name, mask in masks.items():
        if name not in state:
            raise ArgumentError(f"masks: {name!r} is not in the state; call nettrim.remove_masks (or to_dense, of a sparse network) first")
        value = state[name]
        if mask.dtype != torch.bool or mask.shape != value.shape:
            raise ArgumentError(f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(value.shape)}")
        lost = int((_nonzero(value) & ~mask.to(value.device)).sum())
        if lost:
            raise MaskError(f"{name}: {lost} weights that are not zero where the mask says so; call nettrim.check_masks after fine-tuning")
    return {name: mask for name, mask in masks.items() if mask.numel()}


def _nonzero(value: Tensor) -> Tensor:
    """Which entries are not 0; -0 is 0, NaN is not."""
    return (value.float() if value.element_size() == 1 else value).detach() != 0  # torch compares no float8


def _gaps(kept: np.ndarray) -> np.ndarray:
    """The positions of True as gaps, a byte each, 255 for each 255 entries that are skipped."""
    ends = np.append(np.flatnonzero(kept), len(kept))
    gaps = np.diff(ends, prepend=-1) - 1
    skips = gaps // _SKIP
    total = int(skips.sum()) + len(gaps) - 1  # the last gap ends in no entry: only its skips are written
    code = np.full(total, _SKIP, dtype=np.uint8)
    places = np.cumsum(skips + 1)[:-1] - 1
    code[places] = gaps[:-1] % _SKIP
    return code


def _from_gaps(code: np.ndarray, length: int) -> np.ndarray:
    skip = code == _SKIP
    ends = np.cumsum(np.where(skip, _SKIP, code.astype(np.int64) + 1))
    covered = int(ends[-1]) if len(ends) else 0
    if not 0 <= length - covered < _SKIP:
        raise ValueError(f"gaps cover {covered} entries of {length}")
    kept = np.zeros(length, dtype=bool)
    kept[ends[~skip] - 1] = True
    return kept


def _from_bits(code: np.ndarray, length: int) -> np.ndarray:
    if len(code) != -(-length // 8):
        raise ValueError(f"{len(code)} bytes of bits for {length} entries")
    bits = np.unpackbits(code, bitorder="little")
    if bits[length:].any():
        raise ValueError("bits behind the last entry")
    return bits[:length].astype(bool)


def _dense(tensors: dict[str, Tensor], name: str, shape: Any) -> Tensor:
    """The tensor ``name`` from its parts, which are taken out of ``tensors``."""
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{name!r} has shape {shape!r}")
    values = tensors.pop(f"{name}:values")
    coding = "gaps" if f"{name}:gaps" in tensors else "bits"
    code = tensors.pop(f"{name}:{coding}")
    if name in tensors or code.dtype != torch.uint8 or code.dim() != 1 or values.dim() != 1:
        raise ValueError(f"{name!r} has parts that do not belong together")
    kept = (_from_gaps if coding == "gaps" else _from_bits)(code.numpy(), math.prod(shape))
    if int(kept.sum()) != len(values):
        raise ValueError(f"{name!r} has {len(values)} values for {int(kept.sum())} places")
    dense = torch.zeros(math.prod(shape), dtype=values.dtype)
    dense[torch.from_numpy(kept)] = values
    return dense.reshape(shape)


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors.torch.save_file(tensors, temporary, header)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:  # its only other cause, a dtype, would have come up in torch
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
