"""``nettrim.to_sparse``: sparse forms where they are measured faster on this machine; ``nettrim.to_dense``: the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import calibration as calibrations
from nettrim import layers as kinds
from nettrim import semi_structured
from nettrim.errors import ArgumentError, NetTrimError
from nettrim.sparse_linear import LARGEST, SparseLinear
from nettrim.sparse_report import SparseLayer, SparseReport
from nettrim.surroundings import left_out
from nettrim.timing import compare

ROWS = (1, 8, 64)
LEAST_ZEROS = 0.5  # below this share no sparse form has been seen to pay: not timed
BLOCKS = (16, 8, 4)
FULL_BLOCKS = 1.02  # stored values for each nonzero, up to which weights count as whole blocks
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.inference_mode(False)
@torch.no_grad()
@left_out()
def to_sparse(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    batch: int | Iterable[int] | None = None,
    layers: Iterable[str] | None = None,
    min_speedup: float = 1.1,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Put a sparse form in place of each linear layer that is measured faster with it, here and now; leave the others dense.

    On a CPU the forms are compressed rows (:class:`nettrim.SparseLinear`), and compressed rows of blocks where the nonzeros come in blocks of
    4, 8 or 16. On a CUDA device it is torch's semi-structured form, for 2:4 weights. A layer is timed beside its forms with torch's current number
    of threads, and the fastest form is taken that is ``min_speedup`` times as fast at *every* number of rows. The result is for inference.

    Parameters
    ----------
    model : nn.Module
        A pruned network; it is left as it was, unless ``inplace``.
    example_inputs : Tensor, tuple, mapping, or list of them, optional
        A batch as the network will be given (of a list, several): each layer is timed at the numbers of rows that it then sees (samples, times
        tokens or positions). How a batch is given to the model: as for :func:`nettrim.prune`.
    batch : int or several, optional
        Or: the rows to time at; 1, 8 and 64 if neither is given.
    layers : iterable of str, optional
        Convert exactly these, by name, and time nothing: to repeat a choice (``report.converted``) before ``load_state_dict``.
    min_speedup : float
        At least 1.
    forward_fn : callable(model, batch), optional
        Where ``model(batch)`` is not how a batch is run.
    inplace : bool
        Convert ``model`` itself.

    Returns
    -------
    nn.Module
        Its ``nettrim_sparse_report`` is a :class:`nettrim.SparseReport`: which layers, by how much, and why not the others.

    Raises
    ------
    ArgumentError
        An argument is not as described, or a layer of ``layers`` cannot be converted.
    NetTrimError
        A sparse form computes something else than its layer.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(min_speedup, bool) or not isinstance(min_speedup, int | float) or not 1 <= min_speedup < math.inf:
        raise ArgumentError(f"min_speedup={min_speedup!r}; expected a number of at least 1: what is slower is not converted")
    if sum(value is not None for value in (example_inputs, batch, layers)) > 1:
        raise ArgumentError("example_inputs, batch and layers were given together; give one: each says what the layers are timed at, or not at all")
    result = model if inplace else kinds.copy_of(model)
    found = {name: module for name, module in result.named_modules() if isinstance(module, nn.Linear)}
    named = None if layers is None else _named(layers, found)
    rows = _rows(result, found, example_inputs, batch, forward_fn)
    converted: dict[str, nn.Module] = {}
    records = []
    for name, linear in found.items():
        reason = _refusal(result, name, linear)
        if named is not None:
            reason = "not among the layers asked for" if name not in named else reason
            if reason and name in named:
                raise ArgumentError(f"layers: {name!r} cannot be converted: {reason}")
        form, record = _judge(name, linear, rows.get(name, ()), min_speedup, reason, timed=named is None)
        if named is not None and name in named and form is None:
            raise ArgumentError(f"layers: {name!r} cannot be converted: {record.reason}")
        records.append(record)
        if form is not None:
            converted[name] = form
    result = _replace(result, converted)
    result.nettrim_sparse_report = SparseReport(tuple(records), torch.get_num_threads())  # type: ignore[assignment]
    return result


@torch.inference_mode(False)
@torch.no_grad()
@left_out()
def to_dense(model: nn.Module) -> nn.Module:
    """The dense network again: every sparse layer becomes an ``nn.Linear`` with the same weights, bit for bit, its zeros exact.

    Parameters
    ----------
    model : nn.Module
        What :func:`to_sparse` returned; it is left as it was.

    Raises
    ------
    ArgumentError
        The model is no module or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    result = kinds.copy_of(model)
    dense: dict[str, nn.Module] = {}
    for name, module in result.named_modules():
        if isinstance(module, SparseLinear):
            dense[name] = module.to_linear()
        elif semi_structured.is_converted(module):
            module.weight = nn.Parameter(module.get_parameter("weight").to_dense())
    result = _replace(result, dense)
    vars(result).pop("nettrim_sparse_report", None)
    return result


def _named(layers: Iterable[str], found: dict[str, nn.Linear]) -> set[str]:
    names = {layers} if isinstance(layers, str) else set(layers)
    unknown = sorted(map(str, names - found.keys()))
    if unknown:
        raise ArgumentError(f"layers: {', '.join(unknown)}: no such linear layer; the model has {', '.join(found) or 'none'}")
    return names


def _rows(model: nn.Module, found: dict[str, nn.Linear], example: Any, batch: Any, forward_fn: Any) -> dict[str, tuple[int, ...]]:
    """The numbers of rows to time each layer at; none for a layer that an example does not reach."""
    if example is None:
        given = ROWS if batch is None else (batch,) if isinstance(batch, int) else tuple(batch)
        if not given or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in given):
            raise ArgumentError(f"batch={batch!r}; expected a whole number of at least 1, or several")
        return dict.fromkeys(found, tuple(sorted(set(given))))
    seen: dict[str, set[int]] = {name: set() for name in found}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: seen[name].add(args[0].shape[:-1].numel()) if args and isinstance(args[0], Tensor) else None

    run = calibrations.runner(forward_fn)
    batches = calibrations.batches(example if isinstance(example, list) else [example])  # a batch is not to be cut
    handles = [module.register_forward_pre_hook(note(name)) for name, module in found.items()]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        for index, one in enumerate(batches):
            calibrations.run_batch(model, one, index, run)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return {name: tuple(sorted(counts)) for name, counts in seen.items()}


def _refusal(model: nn.Module, name: str, linear: nn.Linear) -> str:
    """Why a layer cannot have another form, whatever its weights are; empty when it can."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}: what a subclass of nn.Linear does besides is unknown"
    reason = kinds.parameter_reason(linear)
    if reason is not None:
        return reason
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if "forward" in vars(linear) or any(hooks):
        return "its forward is replaced or has hooks, which would be lost"
    for parent_name in _parents(name):
        parent = model.get_submodule(parent_name)
        if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            return f"{type(parent).__name__} reads its weight without calling it"
    weight = linear.weight
    for other_name, other in model.named_modules():
        shared = [key for key, value in other._parameters.items() if value is weight and other is not linear]
        if shared:
            return f"its weight is shared with {f'{other_name}.{shared[0]}'.lstrip('.')!r}"
    if semi_structured.is_converted(linear):
        return "it has a semi-structured form already"
    if weight.dtype not in TOLERANCE or weight.is_meta:
        return f"its weight is {weight.dtype} on {weight.device.type!r}; expected values of a floating dtype"
    return ""


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))] if name else []


def _judge(
    name: str, linear: nn.Linear, rows: tuple[int, ...], min_speedup: float, reason: str, timed: bool
) -> tuple[nn.Module | None, SparseLayer]:
    """The form for one layer, if there is one, and the record."""
    dense_bytes, shape = bytes_of(linear), (linear.out_features, linear.in_features)
    nonzeros: int | None = None
    speedups: dict[int, float] = {}
    chosen: tuple[str, nn.Module] | None = None
    if not reason:
        nonzeros = int(linear.weight.count_nonzero())
        if timed and nonzeros > (1 - LEAST_ZEROS) * shape[0] * shape[1]:  # before the forms are made, which would be larger than the layer
            reason = f"not timed: below {LEAST_ZEROS:.0%} zeros no form pays".replace("%", " %")
        elif timed and not rows:
            reason = "the example inputs do not reach it"
        elif isinstance(forms := _forms(linear, nonzeros), str):
            reason = forms
        elif timed:
            chosen, speedups, reason = _race(name, linear, forms, rows, min_speedup)
        else:
            chosen = next(iter(forms.items()))
    form = "dense" if chosen is None else chosen[0]
    module = None if chosen is None else chosen[1]
    size = dense_bytes if module is None else bytes_of(module)
    return module, SparseLayer(name, shape, nonzeros, form, speedups, size, dense_bytes, reason)


def _forms(linear: nn.Linear, nonzeros: int) -> dict[str, nn.Module] | str:
    """The forms that a layer can take on its device, or why there is none."""
    device = linear.weight.device.type
    if device == "cuda":
        packed = semi_structured.convert(linear)
        return packed if isinstance(packed, str) else {"2:4": packed}
    if device != "cpu":
        return f"there is no sparse form for device {device!r}"
    if nonzeros > LARGEST:
        return f"it has more than {LARGEST} nonzeros, the most that a 32-bit index counts"
    forms: dict[str, nn.Module] = {"csr": SparseLinear.from_linear(linear)}
    block = _block(linear.weight, nonzeros)
    if block:
        blocks = SparseLinear.from_linear(linear, block)
        forms[blocks.form] = blocks
    return forms


def _block(weight: Tensor, nonzeros: int) -> int:
    """Side of the largest blocks that the nonzeros fill; 0 if they come in none."""
    for side in BLOCKS:
        if weight.shape[0] % side or weight.shape[1] % side:
            continue
        used = (weight != 0).unflatten(0, (-1, side)).unflatten(2, (-1, side)).any(3).any(1)
        if nonzeros and int(used.sum()) * side * side <= FULL_BLOCKS * nonzeros:
            return side
    return 0


def _race(
    name: str, linear: nn.Linear, forms: dict[str, nn.Module], rows: tuple[int, ...], min_speedup: float
) -> tuple[tuple[str, nn.Module] | None, dict[int, float], str]:
    """Time a layer beside its forms at each number of rows; the form taken, its (or the best form's) speed-ups, and why none was."""
    generator = torch.Generator().manual_seed(0)
    measured: dict[str, dict[int, float]] = {form: {} for form in forms}
    for count in rows:
        x = torch.randn(count, linear.in_features, generator=generator).to(linear.weight)
        _check_same(name, linear, forms, x)
        calls: dict[str, Callable[[], object]] = {"dense": lambda x=x: linear(x)}  # type: ignore[misc]
        calls.update({form: lambda module=module, x=x: module(x) for form, module in forms.items()})  # type: ignore[misc]
        timings = compare(calls, cpu=linear.weight.device.type == "cpu")
        for form in forms:
            measured[form][count] = timings[form].speedup
    best = max(measured, key=lambda form: (min(measured[form].values()) >= min_speedup, math.prod(measured[form].values())))
    slowest = min(rows, key=lambda count: measured[best][count])
    if measured[best][slowest] >= min_speedup:
        return (best, forms[best]), measured[best], ""
    at = f"at {slowest} row{'s' * (slowest != 1)}"
    return None, measured[best], f"{best} is {measured[best][slowest]:.2f} times as fast {at}; expected {min_speedup:g} at every number of rows"


def _check_same(name: str, linear: nn.Linear, forms: dict[str, nn.Module], x: Tensor) -> None:
    expected = linear(x).double()
    for form, module in forms.items():
        off = float((module(x).double() - expected).norm() / expected.norm().clamp(min=1e-300))
        if not off <= TOLERANCE[linear.weight.dtype]:  # NaN is no agreement
            raise NetTrimError(f"layer {name!r}: its form {form!r} computes something else ({off:.2g} of the output's norm apart); report this")


def bytes_of(module: nn.Module) -> int:
    """Of a network's parameters and buffers as they lie in memory."""
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        parts = [part for part in (getattr(tensor, "packed", None), getattr(tensor, "meta", None)) if isinstance(part, Tensor)]
        total += sum(part.numel() * part.element_size() for part in parts or [tensor])
    return total


def _replace(model: nn.Module, converted: dict[str, nn.Module]) -> nn.Module:
    """Put modules in place of those with the same names, wherever these are registered; returns the model, or what replaces it."""
    old = {id(model.get_submodule(name)): module for name, module in converted.items()}
    if id(model) in old:
        return old[id(model)]
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in old:
                parent._modules[key] = old[id(child)]
    return model
