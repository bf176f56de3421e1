"""The network and the data of a finished run, as its recipe says or as the command line does instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from nettrim import recipe
from nettrim.commands.prune import open_inputs, prune
from nettrim.errors import ArgumentError
from nettrim.folder import MASKS, REPORT
from nettrim.sources import Source


def check_folder(folder: Path) -> None:
    """Refuse a folder that no run wrote.

    Raises
    ------
    ArgumentError
    """
    for name in (REPORT, MASKS):
        if not (folder / name).is_file():
            raise ArgumentError(f"{folder} has no {name}; expected a folder that 'nettrim prune' wrote")


def dense_inputs(folder: Path, *, model: str | None, weights: Path | None, calibration: Path | None) -> tuple[Source, Any]:
    """The dense network and the calibration data that ``folder`` was made from.

    What is given takes the place of what the recipe says; a file that the recipe names must be what it was then.

    Raises
    ------
    ArgumentError
        There is no recipe and something is not given, or a file has changed.
    """
    found = recipe.read_recipe(folder / recipe.RECIPE) if (folder / recipe.RECIPE).is_file() else {}
    given = {"model": model, "weights": weights, "calibration": calibration}
    missing = [name for name in ("model", "calibration") if given[name] is None and name not in found]
    if missing:
        raise ArgumentError(f"{folder} has no recipe that says the {missing[0]}; give --{missing[0]}")
    arguments = [] if model is None else [model]
    for name in ("weights", "calibration"):
        arguments += [] if given[name] is None else [f"--{name}", str(given[name])]
    if found:
        arguments += ["--recipe", str(folder / recipe.RECIPE)]
    else:
        arguments += ["--budget", "1"]  # any: nothing is pruned
    # the recipe is read by the command that wrote it: the same types, the same defaults
    options = prune.make_context("prune", [*arguments, "--out", "-"], parent=click.get_current_context()).params
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    source, data, digests = open_inputs(options)
    recipe.check_inputs(found, digests)
    return source, data
