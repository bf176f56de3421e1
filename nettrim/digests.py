"""SHA-256 digests of what a report was made from, and of the report: they say *what* is another one; figures say whether it matters.

A digest proves nothing against someone who writes a new one. That is why :func:`nettrim.verify` computes every figure again besides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nettrim.report import Report

_CHUNK = 2**24  # bytes


def model_digest(model: nn.Module) -> str:
    """Of the names, dtypes, shapes and bits of all parameters and buffers that a state dict holds, in its order."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            _add(digest, f"{name} {value.dtype} {tuple(value.shape)}", value)
    return digest.hexdigest()


def data_digest(batches: Iterable[Any]) -> str:
    """Of all samples in their order, however they are cut into batches.

    Every place in a batch (the third tensor of a tuple, the value of a key) is read as one long array.
    """
    places: dict[str, Any] = {}
    shapes: dict[str, str] = {}
    for batch in batches:
        leaves, structure = tree_flatten(batch)
        for index, leaf in enumerate(leaves):
            place = f"{structure} {index}"
            digest = places.setdefault(place, hashlib.sha256())
            if not isinstance(leaf, Tensor):
                _add(digest, repr(leaf) if isinstance(leaf, str | int | float | bool | None) else type(leaf).__name__, None)
                continue
            shape = f"{leaf.dtype} {tuple(leaf.shape[1:])}"  # said again only where it changes: so batches leave no trace
            _add(digest, None if shapes.get(place) == shape else shape, leaf)
            shapes[place] = shape
    whole = hashlib.sha256()
    for place, digest in places.items():
        _add(whole, f"{place} {digest.hexdigest()}", None)
    return whole.hexdigest()


def record_digest(record: Mapping[str, Any]) -> str:
    """Of dictionaries, lists, strings and numbers; a whole number and the same one in floating point count as the same."""
    text = json.dumps(_canonical(record), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sign(report: Report, dense: nn.Module, pruned: nn.Module, batches: Iterable[Any]) -> Report:
    """The report with the digests of what it was made from, and its own."""
    return dataclasses.replace(report, digests=make(report, dense, pruned, batches))


def make(report: Report, dense: nn.Module, pruned: nn.Module, batches: Iterable[Any]) -> dict[str, str]:
    """All digests of a report, by what they are of."""
    body = {key: value for key, value in report.to_dict().items() if key not in ("schema", "digests")}
    return {
        "dense model": model_digest(dense),
        "pruned model": model_digest(pruned),
        "calibration": data_digest(batches),
        "report": record_digest(body),
    }


def _canonical(value: Any) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return f"number {float(value)!r}" if abs(value) < 2**53 else f"number {value!r}"
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    return [_canonical(item) for item in value]


def _add(digest: Any, text: str | None, value: Tensor | None) -> None:
    if text is not None:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)}:".encode() + encoded)
    if value is not None and value.numel():
        add_bits(digest, value.detach().to("cpu"))


def add_bits(digest: Any, value: Tensor) -> None:
    """Add every bit of a tensor in memory to a digest."""
    for part in value.contiguous().reshape(-1).view(torch.uint8).split(_CHUNK):
        digest.update(part.clone().numpy().data)  # of a copy: memory that numpy has seen cannot be resized any more
