"""What a run is of: one short text for each thing that its results depend on, so that two runs can be told apart by the name of what differs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import nettrim
from nettrim.digests import add_bits
from nettrim.options import Options

_HASH = "sha256 "
_WAY = 2  # of solving: raised where the same call comes to give other weights, or to keep other things in its folder
_MOST_NAMED = 8


def of_run(
    model: nn.Module, batches: list[Any], options: Options, *, targets: object, ignore: object, forward_fn: object, device: object
) -> dict[str, str]:
    """The fingerprint of a call of :func:`nettrim.prune`, from its arguments after they were checked.

    ``on_failure`` is not in it: it decides what becomes of a layer that fails, not what a layer that was solved is. A ``forward_fn`` counts by its
    name, since code cannot be compared.
    """
    found = {"nettrim version": nettrim.__version__, "way of solving": str(_WAY)}
    found["model structure"] = _text_hash(re.sub(r" at 0x[0-9a-f]+", "", repr(model)))
    found["model's modules"] = _text_hash(json.dumps([(name, _name(type(module))) for name, module in model.named_modules()]))
    tensors: dict[str, Tensor] = {f"model parameter {name!r}": value for name, value in model.named_parameters(remove_duplicate=False)}
    tensors |= {f"model buffer {name!r}": value for name, value in model.named_buffers(remove_duplicate=False)}
    found |= {name: tensor_hash(value) for name, value in tensors.items()}
    found["model's devices"] = ", ".join(sorted({str(value.device) for value in tensors.values()}))
    found["calibration data"] = _batches_hash(batches)
    asked = {name: value for name, value in options.describe().items() if name != "on_failure"}
    found |= {f"option {name}": json.dumps(value, default=str) for name, value in asked.items()}
    found["option targets"], found["option ignore"] = _patterns(targets), _patterns(ignore)
    found["option forward_fn"] = "None" if forward_fn is None else _name(forward_fn)
    found["option device"] = str(device)
    return found


def digest(fingerprint: Mapping[str, object]) -> str:
    """One hash of a fingerprint, or of anything else that is a mapping of plain values."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()


def differences(there: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The names of what differs between two fingerprints, with the values where they can be read; empty where nothing does."""
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    shown = []
    for name in names[:_MOST_NAMED]:
        before, after = there.get(name, "nothing"), now.get(name, "nothing")
        readable = not before.startswith(_HASH) and not after.startswith(_HASH)
        shown.append(f"{name} (there {before}, now {after})" if readable else name)
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def tensor_hash(tensor: Tensor) -> str:
    """Of a tensor's dtype, shape and every bit."""
    return _HASH + _hash_tensors([tensor])


def _hash_tensors(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            add_bits(found, tensor.detach().resolve_conj().resolve_neg().cpu())
    return found.hexdigest()


def _batches_hash(batches: list[Any]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        leaves, form = tree_flatten(batch)
        found.update(str(form).encode())
        for leaf in leaves:
            found.update((_hash_tensors([leaf]) if isinstance(leaf, Tensor) else f"{type(leaf).__name__} {leaf!r}").encode())
    return _HASH + found.hexdigest()


def _text_hash(text: str) -> str:
    return _HASH + hashlib.sha256(text.encode()).hexdigest()


def _patterns(given: object) -> str:
    listed = [given] if isinstance(given, str | type) or not isinstance(given, Iterable) else list(given)
    return ", ".join(_name(pattern) if isinstance(pattern, type) else str(pattern) for pattern in listed) or "none"


def _name(value: object) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
