"""Which layers run, in which order, and what follows each: found by running the network, not by reading its code."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from nettrim import layers
from nettrim.calibration import Run, run_batch
from nettrim.capture import evaluation
from nettrim.recorder import PassRecord, Recorder, extent_of, overlap, storage_of


@dataclass(frozen=True)
class TracedLayer:
    """A supported layer that ran.

    Attributes
    ----------
    name : str
        Qualified name in the model.
    module : nn.Module
    activation : "relu" or None
        "relu" when, in every batch, the layer's output goes through ReLU and nowhere else.
    reads : str or None
        Name of the layer whose output, after its activation, is exactly this layer's input, in every batch.
    skip_reason : str or None
        Why the layer cannot be pruned; None when it can.
    reads_alone : bool
        Whether nothing else uses what `reads` names: in no batch another operation, the model's output, or something
        that keeps it.
    """

    name: str
    module: nn.Module
    activation: Literal["relu"] | None
    reads: str | None
    skip_reason: str | None
    reads_alone: bool = False


@dataclass(frozen=True)
class Trace:
    """What a run of the network has shown.

    Attributes
    ----------
    layers : tuple of TracedLayer
        The supported layers that ran, in execution order.
    skipped : dict of str to str
        Every module that holds weights and cannot be pruned, with the reason: those of `layers` with a skip_reason,
        supported layers that never ran, and modules of other types.
    chain : bool
        Every layer after the first reads exactly the previous one's output, and the output is exactly the last one's.
    not_chain_reason : str or None
        None for a chain.
    """

    layers: tuple[TracedLayer, ...]
    skipped: dict[str, str]
    chain: bool
    not_chain_reason: str | None


def trace(model: nn.Module, batches: list[Any], run: Run) -> Trace:
    """Run the network on every batch and find its layers, their order, their activations and what they read.

    Parameters
    ----------
    model : nn.Module
        In train or evaluation mode; it is run in evaluation mode and left as it was.
    batches : list
        As `nettrim.calibration.batches` returns them.
    run : callable(model, batch)
        As `nettrim.calibration.runner` returns it.

    Returns
    -------
    Trace
        What holds in all batches.

    Raises
    ------
    ArgumentError
        A parameter that cannot be computed with (meta device, quantised, NaN); it is named.
    CalibrationError
        A batch that the model cannot run; it is named.

    Notes
    -----
    ReLU is relu, clamp with a minimum of 0 and no maximum, threshold(0, 0), and their in-place forms. Reshapes,
    transposes, copies in the same dtype and dropout (off in evaluation mode) are looked through. Anything else done
    with a pre-activation, returning it included, makes its layer one that is not followed by ReLU.
    """
    layers.check_parameters(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    supported = {aliases[0]: module for module, aliases in names.items() if layers.is_supported(module)}
    runs: list[PassRecord] = []
    used_outside: dict[str, str] = {}
    with evaluation(model):
        for index, batch in enumerate(batches):
            recorder = Recorder(supported)
            with recorder.hooks(), recorder:
                output = run_batch(model, batch, index, run)
            recorder.finish(output)
            del output
            recorder.note_kept()
            runs.append(recorder.seen)
            used_outside |= recorder.used_outside
    reasons = _static_reasons(names, supported)
    for name, found in _running_reasons(supported, runs, used_outside).items():
        reasons.setdefault(name, []).extend(found)
    skipped = {name: "; ".join(found) for name, found in reasons.items()}
    traced = _merge(supported, runs, skipped)
    not_chain_reason = _not_chain_reason(traced, runs)
    return Trace(traced, skipped, not_chain_reason is None, not_chain_reason)


def _static_reasons(names: dict[nn.Module, list[str]], supported: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Reasons that need no run: types, empty or reparametrised weights, parameters and modules that are shared."""
    owners: dict[StorageWeakRef, list[tuple[str, str, tuple[int, int]]]] = {}
    for module, aliases in names.items():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(storage_of(parameter), []).append((aliases[0], key, extent_of(parameter)))
    reasons: dict[str, list[str]] = {}
    for module, aliases in names.items():
        name = aliases[0]
        if name not in supported:
            inner = any(name.startswith(f"{layer}." if layer else "") for layer in supported)  # a parametrization
            if not inner and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                reasons[name or type(module).__name__] = [layers.unsupported_reason(module)]
            continue
        found = [reason] if (reason := layers.parameter_reason(module)) else []
        if len(aliases) > 1:
            found.append("the same module is registered as " + " and ".join(map(repr, aliases)))
        for key, parameter in module.named_parameters(recurse=False):
            extent = extent_of(parameter)
            others = [
                f"{other}.{other_key}".lstrip(".")
                for other, other_key, other_extent in owners[storage_of(parameter)]
                if other != name and overlap(extent, other_extent)
            ]
            if others:
                found.append(f"its {key} is shared with " + " and ".join(map(repr, others)))
        if found:
            reasons[name] = found
    return reasons


def _running_reasons(
    supported: dict[str, nn.Module], runs: list[PassRecord], used_outside: dict[str, str]
) -> dict[str, list[str]]:
    """Reasons that the runs have shown: never run, missing in a batch, called twice, another order, used outside."""
    counts = [Counter(run.calls) for run in runs]
    reasons: dict[str, list[str]] = {}
    for name in supported:
        found = reasons.setdefault(name, [])
        ran = [index for index, count in enumerate(counts) if count[name]]
        if not ran and name in used_outside:
            found.append(
                f"its own forward never runs: its weight is used directly by {used_outside[name]} "
                "(as nn.MultiheadAttention does with its out_proj)"
            )
            continue
        if not ran:
            found.append(f"never ran in the {len(runs)} calibration batch(es)")
        elif len(ran) < len(runs):
            missing = next(index for index in range(len(runs)) if index not in ran)
            found.append(f"ran in {len(ran)} of {len(runs)} calibration batches only (not in batch {missing})")
        most = max((count[name] for count in counts), default=0)
        if most > 1:
            found.append(f"called {most} times in one forward pass")
        if name in used_outside:
            found.append(f"its weight or bias is also used outside its own forward, by {used_outside[name]}")
    for name, other, index in _disorder(runs):
        reasons[name].append(f"runs before {other!r} in some batches and after it in others (batch {index})")
    return {name: found for name, found in reasons.items() if found}


def _disorder(runs: list[PassRecord]) -> list[tuple[str, str, int]]:
    """Layers that run before another layer in one batch and after it in another: (layer, the other, batch)."""
    found: dict[str, tuple[str, str, int]] = {}
    place = {name: index for index, name in enumerate(_order(runs))}
    for index, run in enumerate(runs):
        calls = list(dict.fromkeys(run.calls))
        if calls == list(place):
            continue
        for i, name in enumerate(calls):
            for other in calls[i + 1 :]:
                if place[name] > place[other]:
                    found.setdefault(name, (name, other, index))
                    found.setdefault(other, (other, name, index))
    return list(found.values())


def _order(runs: list[PassRecord]) -> list[str]:
    """All layers that ran: by the first batch, those that it lacks behind the layer that they follow elsewhere."""
    order: list[str] = []
    for run in runs:
        previous = -1
        for name in dict.fromkeys(run.calls):
            if name not in order:
                order.insert(previous + 1, name)
            previous = order.index(name)
    return order


def _merge(supported: dict[str, nn.Module], runs: list[PassRecord], skipped: dict[str, str]) -> tuple[TracedLayer, ...]:
    order = _order(runs)
    relu = {name: all(run.relu(name) for run in runs) for name in order}
    repeated = {name for run in runs for name, count in Counter(run.calls).items() if count > 1}
    merged = []
    for name in order:
        readings = {run.reads.get(name) for run in runs}
        reading = readings.pop() if len(readings) == 1 else None
        if reading is not None and repeated & {name, reading[0]}:
            reading = None  # which of the calls?
        # a layer's output is the value after the ReLU exactly if the ReLU is all that follows it
        reads = reading[0] if reading is not None and reading[1] == relu[reading[0]] else None
        activation: Literal["relu"] | None = "relu" if relu[name] else None
        alone = reads is not None and all(run.sole_reader(reads) == name for run in runs)
        merged.append(TracedLayer(name, supported[name], activation, reads, skipped.get(name), alone))
    return tuple(merged)


def _not_chain_reason(traced: tuple[TracedLayer, ...], runs: list[PassRecord]) -> str | None:
    """Say where the network is no chain of its layers; None when it is one."""
    if not traced:
        return "no supported layer ran"
    order = [layer.name for layer in traced]
    for index, run in enumerate(runs):
        repeated = [name for name, count in Counter(run.calls).items() if count > 1]
        if repeated:
            return f"layer {repeated[0]!r} runs more than once in a forward pass"
        if run.calls != order:
            return f"calibration batch {index} does not run all layers in the same order as the others"
    for previous, layer in pairwise(traced):
        if layer.reads != previous.name:
            after = " after its ReLU" if previous.activation else ""
            return f"the input of layer {layer.name!r} is not exactly the output of layer {previous.name!r}{after}"
    last = traced[-1]
    if any(run.returned != (last.name, last.activation == "relu") for run in runs):
        after = " after its ReLU" if last.activation else ""
        return f"the model's output is not exactly the output of its last layer {last.name!r}{after}"
    return None
