"""``nettrim.save`` and ``nettrim.load``: a pruned network as a folder that is there whole or not at all.

What is in it: the dense weights with their zeros (``model.safetensors``; for a Hugging Face model what its own ``save_pretrained`` writes),
``masks.safetensors``, ``report.json`` and ``report.html``. The command line adds ``recipe.yaml``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from nettrim.errors import ArgumentError, NetTrimError
from nettrim.files import load_arrays
from nettrim.pipeline import PruneResult
from nettrim.report import Report
from nettrim.surroundings import left_out

MODEL, MASKS, REPORT, PAGE = "model.safetensors", "masks.safetensors", "report.json", "report.html"
_METADATA = {"format": "pt"}  # transformers reads no file without it


@left_out()
def save(result: PruneResult, folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a pruned network, its masks and its report into a folder.

    Parameters
    ----------
    result : PruneResult
    folder : path
        Made by this call: written beside its place and moved there when it is whole, so that no other program sees a part of it.
    force : bool
        Replace the folder, if it is one that this function wrote.

    Raises
    ------
    ArgumentError
        There is such a folder already, or a value of the state dict is no tensor.
    OSError
        The folder cannot be written.

    Notes
    -----
    ``model.safetensors`` holds every entry of ``result.model.state_dict()``, tied weights once for each name, so that
    ``model.load_state_dict(safetensors.torch.load_file(...))`` reads it. A Hugging Face model is written by its own ``save_pretrained``.
    """
    with new_folder(folder, force=force) as place:
        write_model(result.model, place)
        write_records(result, place)


def write_model(model: nn.Module, place: Path) -> None:
    """The weights of ``model`` into an existing folder, as :func:`save` says."""
    if _is_pretrained(model):
        model.save_pretrained(place)  # type: ignore[operator]
        return
    state = model.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        kind = type(state[strange[0]]).__name__
        raise ArgumentError(f"the state dict holds {strange[0]!r}, a {kind}; expected tensors: safetensors keeps no others")
    safetensors.torch.save_file(_apart(state), place / MODEL, metadata=_METADATA)


def _is_pretrained(model: nn.Module) -> bool:
    """Whether the model is one of transformers', told without importing it."""
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


def write_records(result: PruneResult, place: Path) -> None:
    """Masks and report into an existing folder."""
    safetensors.torch.save_file(_apart(result.masks), place / MASKS, metadata=_METADATA)
    result.report.to_json(place / REPORT)
    result.report.to_html(place / PAGE, masks=result.masks)


def write_page(place: Path, facts: Mapping[str, str]) -> None:
    """The report's page anew, from the report and the masks of the folder, with more figures at its top."""
    Report.from_json(place / REPORT).to_html(place / PAGE, masks=load_arrays(place / MASKS), facts=facts)


@left_out()
def load(folder: str | os.PathLike[str], model: nn.Module) -> PruneResult:
    """Read what :func:`save` or :func:`prune_folder` wrote, the weights into ``model``.

    Parameters
    ----------
    folder : path
    model : nn.Module
        Of the architecture that was pruned, with the same dtypes. Its weights are replaced, as by ``load_state_dict``. (A Hugging Face model
        that ``from_pretrained(folder)`` made has them already.)

    Returns
    -------
    PruneResult

    Raises
    ------
    ArgumentError
        The folder is not whole or not one of ours, or ``model`` has other parameters; it is unchanged then.
    """
    place = Path(folder)
    for name in (REPORT, MASKS):
        if not (place / name).is_file():
            raise ArgumentError(f"{place} has no {name}; expected a folder that nettrim.save or 'nettrim prune' wrote")
    report = Report.from_json(place / REPORT)
    masks = load_arrays(place / MASKS)
    if not _is_pretrained(model):
        # those of prune_folder have the names that the dense network's had, and the buffers that it had
        load_weights(model, *sorted(path for path in place.glob("*.safetensors") if path.name != MASKS), buffers=False)
    state = model.state_dict()
    for name, mask in masks.items():
        weight = state.get(name)
        if weight is None or weight.shape != mask.shape:
            found = "there is none" if weight is None else f"its shape is {tuple(weight.shape)}"
            shape = tuple(mask.shape)
            raise ArgumentError(f"{place / MASKS} has a mask of shape {shape} for {name!r}, and in the model {found}; expected its own model")
        if bool((weight[~mask.to(weight.device)] != 0).any()):
            raise ArgumentError(f"{name!r} is not zero where its mask in {place / MASKS} says so; expected the weights of the same run")
    return PruneResult(model, masks, report)


def load_weights(model: nn.Module, *paths: Path, buffers: bool = True) -> None:
    """Read safetensors files into a model whose parameters and buffers have the same names, shapes and dtypes; buffers may be missing without
    ``buffers``.

    Raises
    ------
    ArgumentError
        They differ; the model is unchanged.
    """
    read = {name: tensor for path in paths for name, tensor in load_arrays(path, max_bytes=path.stat().st_size).items()}
    state, where = model.state_dict(), ", ".join(map(str, paths)) or "a folder without weights"
    needed = state.keys() if buffers else dict(model.named_parameters(remove_duplicate=False)).keys()
    missing, unknown = sorted(needed - read.keys()), sorted(read.keys() - state.keys())
    given = [state[name] for name in read.keys() & state.keys()]
    missing = [name for name in missing if not any(_same(state[name], other) for other in given)]  # a tied weight may be there once
    if missing or unknown:
        parts = [f"{what} {', '.join(map(repr, names[:3]))}" for what, names in (("it lacks", missing), ("the model has no", unknown)) if names]
        raise ArgumentError(f"{where} does not fit the {type(model).__name__}: {'; '.join(parts)}; expected the weights of the same architecture")
    for name, tensor in read.items():
        if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            raise ArgumentError(
                f"{where} holds {name!r} as {tensor.dtype} {tuple(tensor.shape)}, and the model as {state[name].dtype} {tuple(state[name].shape)}; "
                "expected the same: a cast would change what was certified"
            )
    model.load_state_dict(read, strict=False)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _apart(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors can write: contiguous tensors that share no memory."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}


def check_place(folder: str | os.PathLike[str], *, force: bool) -> Path:
    """Where a folder is to be, its links resolved; refused early, before hours of work, where it cannot be.

    Raises
    ------
    ArgumentError
        Something is there that may not be replaced.
    OSError
        The folder around it cannot be made or written.
    """
    place = Path(folder).resolve()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        ours = place.is_dir() and (place / REPORT).is_file() and (place / MASKS).is_file()
        if not ours:
            raise ArgumentError(f"{place} exists and is no folder that nettrim wrote; expected a new one, or an empty one")
        if not force:
            raise ArgumentError(f"{place} holds the result of another run; give another folder, or say that it may be replaced (--force, force=True)")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place.parent):
        pass
    return place


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """A folder beside the one wanted; it takes that one's place if the block succeeds, and is gone if it does not."""
    place = check_place(folder, force=force)
    made = Path(tempfile.mkdtemp(prefix=f".{place.name}-", suffix=".unfinished", dir=place.parent))
    try:
        yield made
        mask = os.umask(0)
        os.umask(mask)
        for path in (made, *made.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)  # mkdtemp's and safetensors' are for their owner alone
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        _put(made, place, force=force)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _put(made: Path, place: Path, *, force: bool) -> None:
    """Move a folder to its place; the one that is there is moved aside first, and back if that fails."""
    if not force or not place.exists():
        os.rename(made, place)  # onto an empty folder too; fails if somebody filled one meanwhile
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{place.name}-", suffix=".replaced", dir=place.parent))
        os.rename(place, aside)
        try:
            os.rename(made, place)
        except OSError:
            os.rename(aside, place)
            raise
        shutil.rmtree(aside)
    descriptor = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # the data are safe; that the name is too, this file system cannot promise
        raise NetTrimError(f"{place} is written, but {place.parent} cannot be flushed to disk ({error})") from error
    finally:
        os.close(descriptor)
