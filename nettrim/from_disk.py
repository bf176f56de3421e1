"""``nettrim.prune_folder``: a network larger than memory, from its files to new ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import folder as folders
from nettrim import layers, mapped
from nettrim.errors import ArgumentError
from nettrim.prune import prune_into
from nettrim.report import Report

_REFUSED = {
    "inplace": "the pruned weights are written into the new folder",
    "executor": "the blocks are solved one behind the other",
    "recalibrate_batchnorm": "the statistics are no weights, which alone are written",
    "budget": "it prunes the network several times; give sparsity or epsilon",
}


def prune_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Any,
    *,
    factory: Callable[[], nn.Module] | None = None,
    force: bool = False,
    **options: Any,
) -> Report:
    """Prune a network whose weights lie in safetensors files, block by block, into a new folder, without ever holding all of it in memory.

    Both networks are mapped from their files, so that the system reads the pages that are used and drops them when memory runs short. What is held is
    the hidden states of the calibration samples, two of each, and what one block's programs need (docs/big-models.md).

    Parameters
    ----------
    source : path
        A folder with the weights in one ``.safetensors`` file or several.
    out : path
        Where the pruned folder is to be: a copy of the source with other weights in it, and masks and report as :func:`nettrim.save` writes them. It
        is there whole or not at all.
    calibration : as of :func:`nettrim.prune`
        Of a network of transformers, tensors or mappings of arguments by name; nothing is cached from one call to the next.
    factory : callable, optional
        Makes the network; its parameters are never given memory. Without one the folder's ``config.json`` says which of transformers' it is.
    force : bool
        Replace ``out``, if it is one that nettrim wrote.
    options : as of :func:`nettrim.prune`
        But ``inplace``, ``executor``, ``recalibrate_batchnorm``, ``budget`` and ``repair="auto"``; ``fidelity`` is ``"layer"`` and ``allocation``
        ``"uniform"``, since what the other ways need are gradients through the whole network.

    Returns
    -------
    Report

    Raises
    ------
    ArgumentError
        An argument is not as described, or the files do not fit the network.
    NetTrimError
        As of :func:`nettrim.prune`; nothing is left of ``out`` then.
    """
    for name, why in _REFUSED.items():
        if options.get(name):
            raise ArgumentError(f"{name}={options[name]!r} in prune_folder: {why}")
    if options.get("repair") == "auto":
        raise ArgumentError("repair='auto' in prune_folder: it prunes the network several times; give a number, such as 0.5")
    for name, only in (("fidelity", "layer"), ("allocation", "uniform")):
        if options.setdefault(name, only) != only:
            raise ArgumentError(f"{name}={options[name]!r} in prune_folder: it takes gradients through the whole network; expected {only!r}")
    place = Path(source)
    if not place.is_dir():
        raise ArgumentError(f"{place} is no folder; expected one with the network's .safetensors files")
    if factory is None:
        from nettrim.sources.huggingface import forward, unmade

        factory = unmade(place)
        options.setdefault("forward_fn", forward)
    dense = mapped.network(factory, mapped.tensors(place, writable=False, ignore=(folders.MASKS,)))
    with folders.new_folder(out, force=force) as made:
        for path in sorted(place.iterdir()):
            if path.is_file() and path.name not in (folders.MASKS, folders.REPORT, folders.PAGE):
                shutil.copyfile(path, made / path.name)
        pruned = mapped.network(factory, mapped.tensors(made, writable=True))
        result = prune_into(pruned, dense, calibration, **options)
        masks = _write_masks(made / folders.MASKS, pruned, {layer.name for layer in result.report.layers})
        result.report.to_json(made / folders.REPORT)
        result.report.to_html(made / folders.PAGE, masks=masks)
    return result.report


def _write_masks(path: Path, pruned: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Where the weights of the layers ``names`` are not zero, into a file, one parameter at a time."""
    weights = {
        f"{name}.{matrix.part.weight}".lstrip("."): matrix.weight.detach()
        for name, module in layers.owners(pruned).items()
        for matrix in layers.matrices_of(module)
        if matrix.name_in(name) in names
    }
    masks = mapped.new_masks(path, {name: weight.shape for name, weight in weights.items()})
    for name, weight in weights.items():
        torch.ne(weight, 0, out=masks[name])
    return masks
