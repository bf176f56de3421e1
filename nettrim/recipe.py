"""A recipe: what a run of ``nettrim prune`` was asked for, as YAML that a person can read and the command can run again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nettrim.errors import ArgumentError

RECIPE = "recipe.yaml"
MADE_BY, INPUTS = "made_by", "inputs"  # not options: the versions, and a checksum of every file that was read
PATHS = ("weights", "calibration")
_LARGEST = 10_000_000
_HEAD = "# Run it again: nettrim prune --recipe {name} --out NEW_FOLDER\n"


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a file, its relative paths taken from the file's own folder.

    Raises
    ------
    ArgumentError
        It cannot be read, or is no mapping of names.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ArgumentError(f"recipe {path} has {path.stat().st_size} bytes; expected a short YAML file")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"recipe {path} cannot be read ({error.strerror or error}); expected a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ArgumentError(f"recipe {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ArgumentError(f"recipe {path} holds a {type(found).__name__}; expected a mapping of options, one a line: name: value")
    base = path.resolve().parent
    for name in PATHS:
        if isinstance(found.get(name), str):
            found[name] = str(base / found[name])
    model = found.get("model")
    if isinstance(model, str) and ":" not in model:
        found["model"] = str(base / model)
    return found


def write_recipe(path: Path, options: Mapping[str, Any], *, made_by: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    """Write a recipe; options that are None are left out, for their defaults are None."""
    kept = {name: value for name, value in options.items() if value is not None}
    text = yaml.safe_dump({**kept, MADE_BY: dict(made_by), INPUTS: dict(inputs)}, sort_keys=False, allow_unicode=True)
    path.write_text(_HEAD.format(name=path.name) + text, encoding="utf-8")


def checksum(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over the names below ``root`` and the contents of files; of one file that is ``root`` itself, its own."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path == root:
            return digest
        whole.update(f"{path.relative_to(root).as_posix()} {digest}\n".encode())
    return whole.hexdigest()


def check_inputs(recipe: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Refuse files that are no longer what the recipe was written for; files that it does not know pass.

    Raises
    ------
    ArgumentError
        Naming the file.
    """
    then = recipe.get(INPUTS)
    if not isinstance(then, Mapping):
        return
    changed = [path for path, digest in now.items() if then.get(path, digest) != digest]
    if changed:
        raise ArgumentError(f"{changed[0]} is not what it was when the recipe was written; expected the same file, or a recipe without '{INPUTS}:'")
