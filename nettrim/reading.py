"""Records from data that someone else wrote: bounded, strict in names and types, each refusal one error that says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nettrim.errors import ArgumentError

MAX_BYTES = 2**28  # of a JSON file: a report of a hundred thousand layers
MAX_DEPTH = 32
MAX_TEXT = 2**20  # characters of one string
_NUMBERS = ("NaN", "Infinity", "-Infinity")  # what JSON has no number for


def load_json(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file whose author is unknown.

    Raises
    ------
    ArgumentError
        It is too large or nested too deeply, not UTF-8, not JSON, holds a number that JSON does not have, or a key twice.
    OSError
        It cannot be read.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > max_bytes:
        raise ArgumentError(f"{path} has {path.stat().st_size} bytes; expected at most {max_bytes}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
        _check_depth(data)
    except RecursionError as error:
        raise ArgumentError(f"{path}: nested too deeply; expected at most {MAX_DEPTH} levels") from error
    except ValueError as error:  # ArgumentError is one
        raise ArgumentError(f"{path}: {error}") from error
    return data


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON; expected it as a string")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested too deeply; expected at most {MAX_DEPTH} levels")
        level = [
            item for value in level if isinstance(value, dict | list) for item in (value.values() if isinstance(value, dict) else value)
        ]


def read(cls: type, data: Any) -> Any:
    """Build the record ``cls`` (a dataclass, or a NamedTuple from a list) from dictionaries, lists, strings and numbers.

    Raises
    ------
    ValueError, TypeError
        Naming the field, what was expected and what was found.
    """
    hints = typing.get_type_hints(cls)
    if not dataclasses.is_dataclass(cls):
        if not isinstance(data, list | tuple) or len(data) != len(hints):
            raise ValueError(f"{cls.__name__} is a list of {len(hints)}, found {_shown(data)}")
        data = dict(zip(hints, data, strict=True))
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is a {type(data).__name__}; expected a mapping")
    expected = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(hints)
    if set(data) != expected:
        raise ValueError(f"{cls.__name__} has the keys {sorted(expected)}, found {_shown(sorted(map(str, data)))}")
    return cls(**{name: _convert(hints[name], data[name], f"{cls.__name__}.{name}") for name in hints})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint`` of a record's field."""
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in hint.__args__:
            return None
        (hint,) = [one for one in hint.__args__ if one is not type(None)]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        if isinstance(value, str) and value in _NUMBERS:
            return float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError as error:
                raise ValueError(f"{where} is too large for a number") from error
    elif hint in (str, int, bool):
        if type(value) is hint and (hint is not str or len(value) <= MAX_TEXT):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, where) for item in value)
        if len(value) == len(arguments):
            return tuple(_convert(kind, item, where) for kind, item in zip(arguments, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: item if arguments[1] is object else _convert(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    elif isinstance(hint, type) and origin is None:
        return read(hint, value)
    raise ValueError(f"{where} is {_shown(value)}; expected {getattr(hint, '__name__', None) or hint}")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 80 else text[:77] + "..."
