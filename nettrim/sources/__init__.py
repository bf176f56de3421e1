"""The networks that a command can be given, by what MODEL says: a Hugging Face folder, a ``.pt2`` program, or ``package.module:factory``."""

from __future__ import annotations

from pathlib import Path

from nettrim.errors import ArgumentError
from nettrim.sources.base import Source

__all__ = ["Source", "normalised", "open_source"]


def open_source(model: str, *, weights: Path | None, seed: int) -> Source:
    """The network that ``model`` names.

    Parameters
    ----------
    model : str
        A folder with a ``config.json``, a ``.pt2`` file, or ``package.module:factory``.
    weights : Path or None
        For a factory: the safetensors file with its weights.
    seed : int
        Of torch's random numbers while a factory runs.

    Raises
    ------
    ArgumentError
        It is none of these, it cannot be read, or ``weights`` were given where the model has its own.
    NetTrimError
        An extra is not installed.
    """
    place = Path(model)
    if (is_folder := place.is_dir()) or place.suffix == ".pt2":
        if weights is not None:
            raise ArgumentError(f"--weights {weights} was given with {model}, which holds its own; leave it out")
        if is_folder:
            from nettrim.sources.huggingface import HuggingFace

            return HuggingFace(place)
        from nettrim.sources.exported import Exported

        return Exported(place)
    from nettrim.sources.factory import Factory

    return Factory(model, weights, seed)


def normalised(model: str) -> str:
    """MODEL as it means the same from every folder: a path becomes absolute."""
    place = Path(model)
    return str(place.resolve()) if place.is_dir() or place.suffix == ".pt2" else model
