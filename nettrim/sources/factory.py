"""``package.module:factory``: a network that a function of the user's makes."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nettrim import folder
from nettrim.errors import ArgumentError
from nettrim.sources.base import Source


class Factory(Source):
    """The module that ``factory()`` returns, with the weights of a safetensors file if one is given."""

    def __init__(self, name: str, weights: Path | None, seed: int) -> None:
        self.model = _made(name, seed)
        self.files = []
        if weights is not None:
            if weights.suffix != ".safetensors" or not weights.is_file():
                writer = "safetensors.torch.save_file(model.state_dict(), path)"
                raise ArgumentError(f"weights {weights}; expected a .safetensors file, as {writer} writes")
            folder.load_weights(self.model, weights)
            self.files.append(weights)

    def read_pruned(self, place: Path) -> nn.Module:
        model = copy.deepcopy(self.model)
        folder.load_weights(model, place / folder.MODEL)
        return model


def _made(name: str, seed: int) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(
            f"MODEL {name!r} is no folder, no .pt2 file and no package.module:factory; expected one of these "
            "(a Hugging Face folder has a config.json; a factory is a function without arguments that returns the network)"
        )
    here = os.getcwd()
    if here not in sys.path:  # a console script's path lacks the folder that it is called in
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ArgumentError(f"MODEL {name!r} cannot be imported ({type(error).__name__}: {error}); expected package.module:factory") from error
    if isinstance(found, nn.Module):
        return found.eval()
    if not callable(found):
        raise ArgumentError(f"MODEL {name!r} is a {type(found).__name__}; expected a function without arguments that returns a torch.nn.Module")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # what it makes at random is made again by the recipe
            model = found()
    except Exception as error:
        raise ArgumentError(f"MODEL {name!r} failed ({type(error).__name__}: {error}); expected that {attribute}() returns the network") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"MODEL {name!r} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model.eval()
