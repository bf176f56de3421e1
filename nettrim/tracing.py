"""Which layers run, in which order, and what follows each: found by running the network, not by reading its code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from nettrim import layers
from nettrim.activations import Activation, Norm
from nettrim.calibration import Run, run_batch
from nettrim.layers import Matrix
from nettrim.passes import evaluation
from nettrim.recorder import PassRecord, Recorder, extent_of, overlap, storage_of
from nettrim.values import common_way, step_name


@dataclass(frozen=True)
class TracedLayer:
    """A matrix of a supported layer that ran.

    Attributes
    ----------
    name : str
        Qualified name in the model: that of the module, and behind it, where a module holds several matrices, the matrix's.
    module_name : str
    matrix : Matrix
    function : Activation or None
        When, in every batch, the layer's output goes through it and nowhere else.
    norm : Norm or None
        An eval-mode BatchNorm that it goes through before that, and nowhere else.
    reads : str or None
        Name of the layer whose output, after its activation, is exactly this layer's input, in every batch.
    skip_reason : str or None
        Why the layer cannot be pruned; None when it can.
    reads_alone : bool
        Whether nothing else uses what `reads` names: in no batch another operation, the model's output, or something
        that keeps it.
    spread : float
        By what factor rows can differ more than the layer's inputs do.
    rows : int
        How many rows there are in all batches.
    summed : bool
        Whether, in every batch, the layer's output (after its BatchNorm) is added to another tensor before another layer runs, and used for nothing
        else.
    """

    name: str
    module_name: str
    matrix: Matrix
    function: Activation | None
    norm: Norm | None
    reads: str | None
    skip_reason: str | None
    reads_alone: bool = False
    spread: float = 1.0
    rows: int = 0
    summed: bool = False

    @property
    def module(self) -> nn.Module:
        return self.matrix.module

    @property
    def activation(self) -> str | None:
        """The name of the function; ``"relu"`` has a set of its own."""
        return None if self.function is None else self.function.name

    def of(self, model: nn.Module) -> Matrix:
        """The same matrix of a copy of the model."""
        return self.matrix.of(model.get_submodule(self.module_name))

    def runs_as(self, other: TracedLayer) -> bool:
        """Whether a layer of a copy of the network has the same name, as many rows, and the same behind it."""
        if (self.norm is None) != (other.norm is None) or not (self.norm is None or other.norm is None or self.norm.same_as(other.norm)):
            return False
        return (self.name, self.rows, self.spread, self.function) == (other.name, other.rows, other.spread, other.function)


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
    of_first : bool
        Whether it is taken from the first batch that the others run alike, which is to be looked at when they are run.
    """

    layers: tuple[TracedLayer, ...]
    skipped: dict[str, str]
    chain: bool
    not_chain_reason: str | None
    of_first: bool = False

    def unlike(self, pruned: Trace) -> str | None:
        """Why what follows from this network's chain says nothing of the pruned one, whose trace is given; None where it runs alike."""
        if self.not_chain_reason is not None:
            return self.not_chain_reason
        ours, theirs = ({layer.name: layer for layer in found.layers} for found in (self, pruned))
        for name in ours | theirs:
            if name not in ours or name not in theirs or not ours[name].runs_as(theirs[name]):
                return f"layer {name!r} does not run alike in the pruned network"
        if list(ours) != list(theirs):
            return "the layers run in another order in the pruned network"
        return None if pruned.not_chain_reason is None else f"in the pruned network, {pruned.not_chain_reason}"


def trace(
    model: nn.Module,
    batches: list[Any],
    run: Run,
    note: Callable[[Any, int], None] | None = None,
    suffices: Callable[[Trace], Fraction | None] | None = None,
    within: Callable[[int, Callable[[], AbstractContextManager[None]]], AbstractContextManager[None]] | None = None,
) -> Trace:
    """Run the network on every batch and find its layers, their order, their activations and what they read.

    Parameters
    ----------
    model : nn.Module
        In train or evaluation mode; it is run in evaluation mode and left as it was.
    batches : list
        As `nettrim.calibration.batches` returns them.
    run : callable(model, batch)
        As `nettrim.calibration.runner` returns it.
    note : callable(output, batch's index), optional
        Is given what the network returns.
    suffices : callable(Trace), optional
        Is asked, where no values that layers computed were seen to decide what runs, whether the trace of the first of several batches is enough:
        how many times its rows there are in all of them, or None where it is not.
    within : callable(batch's index, aside), optional
        A context that its forward pass is to run in; what is done there under ``aside()`` is not the network's.

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
    ReLU is relu, clamp with a minimum of 0 and no maximum, threshold(0, 0), and their in-place forms; the other activations are those of
    :mod:`nettrim.activations`. Reshapes, transposes, copies in the same dtype and dropout (off in evaluation mode) are looked through, and so is
    maximum pooling before an activation that never falls. Anything else done with a pre-activation, returning it included, makes its layer one
    that is followed by nothing.
    """
    layers.check_parameters(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    supported = layers.owners(model)
    runs: list[PassRecord] = []
    used_outside: dict[str, str] = {}
    with evaluation(model):
        for index, batch in enumerate(batches):
            recorder = Recorder(supported)
            with recorder.hooks(), recorder, nullcontext() if within is None else within(index, recorder.aside):
                output = run_batch(model, batch, index, run)
            recorder.finish(output)
            if note is not None:
                note(output, index)
            del output
            recorder.note_kept()
            runs.append(recorder.seen)
            used_outside |= recorder.used_outside
            if index == 0 and suffices is not None and len(batches) > 1 and not recorder.layers_decide:
                first = _summary(names, supported, runs, used_outside)
                times = suffices(first)
                if times is not None:
                    layers_of_all = tuple(replace(layer, rows=int(layer.rows * times)) for layer in first.layers)
                    return replace(first, layers=layers_of_all, of_first=True)
    return _summary(names, supported, runs, used_outside)


def _summary(names: dict[nn.Module, list[str]], supported: dict[str, nn.Module], runs: list[PassRecord], used_outside: dict[str, str]) -> Trace:
    """What some passes have shown."""
    reasons = _static_reasons(names, supported)
    for name, found in _running_reasons(supported, runs, used_outside).items():
        reasons.setdefault(name, []).extend(found)
    traced = _merge(supported, runs, {name: "; ".join(found) for name, found in reasons.items()})
    of_module = {layer.module_name for layer in traced}
    skipped = {layer.name: layer.skip_reason for layer in traced if layer.skip_reason is not None}
    skipped |= {name: "; ".join(found) for name, found in reasons.items() if name not in of_module}
    not_chain_reason = _not_chain_reason(traced, runs)
    return Trace(traced, skipped, not_chain_reason is None, not_chain_reason)


def _static_reasons(names: dict[nn.Module, list[str]], supported: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Reasons that need no run: types, empty or reparametrised weights, parameters and modules that are shared."""
    owners: dict[StorageWeakRef, list[tuple[str, tuple[int, int]]]] = {}
    for module, aliases in names.items():
        for key, parameter in module.named_parameters(recurse=False):
            path = f"{aliases[0]}.{key}".lstrip(".")
            owners.setdefault(storage_of(parameter), []).append((path, extent_of(parameter)))
    reasons: dict[str, list[str]] = {}
    for module, aliases in names.items():
        name = aliases[0]
        if name not in supported:
            inner = any(name.startswith(f"{layer}." if layer else "") for layer in supported)  # a parametrization, a part of it
            if not inner and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                reasons[name or type(module).__name__] = [layers.unsupported_reason(module)]
            continue
        found = [reason] if (reason := layers.parameter_reason(module)) else []
        if len(aliases) > 1:
            found.append("the same module is registered as " + " and ".join(map(repr, aliases)))
        for key, parameter in module.named_parameters():
            extent, path = extent_of(parameter), f"{name}.{key}".lstrip(".")
            others = [other for other, taken in owners[storage_of(parameter)] if other != path and overlap(extent, taken)]
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
                f"its own forward never runs: its weight is used directly by {used_outside[name]}"
            )
            continue
        if not ran:
            found.append("never ran in the first calibration batch" if len(runs) == 1 else f"never ran in the {len(runs)} calibration batches")
        elif len(ran) < len(runs):
            missing = next(index for index in range(len(runs)) if index not in ran)
            found.append(f"ran in {len(ran)} of {len(runs)} calibration batches only (not in batch {missing})")
        most = max((count[name] for count in counts), default=0)
        kind = layers.find_kind(supported[name])
        if most > 1 and not (kind is not None and kind.repeats):
            found.append(f"called {most} times in one forward pass")
        found += dict.fromkeys(run.refused[name] for run in runs if name in run.refused)
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


def _merge(supported: dict[str, nn.Module], runs: list[PassRecord], reasons: dict[str, str]) -> tuple[TracedLayer, ...]:
    order = _order(runs)
    ways = {name: common_way([run.way(name) for run in runs if name in run.calls]) for name in order}
    ends = {name: tuple(step_name(step) for step in way) for name, way in ways.items()}
    repeated = {name for run in runs for name, count in Counter(run.calls).items() if count > 1}
    merged = []
    for name in order:
        readings = {run.reads.get(name) for run in runs}
        reading = readings.pop() if len(readings) == 1 else None
        if reading is not None and repeated & {name, reading[0]}:
            reading = None  # which of the calls?
        # a layer's output is the value at the end of its way exactly if the way is all that follows it
        reads = reading[0] if reading is not None and reading[1] == ends[reading[0]] else None
        alone = reads is not None and all(run.sole_reader(reads) == name for run in runs)
        norm = next((step for step in ways[name] if isinstance(step, Norm)), None)
        function = next((step for step in ways[name] if isinstance(step, Activation)), None)
        for matrix in layers.matrices_of(supported[name]):
            own = reads if matrix.kind.observed else None
            spread = max(run.spread.get(name, 1.0) for run in runs)
            rows = sum(run.rows.get(name, 0) for run in runs)
            reason = reasons.get(name)
            alone_too = alone and own is not None
            summed = matrix.kind.observed and not matrix.kind.repeats and all(run.sums(name) for run in runs)
            merged.append(TracedLayer(matrix.name_in(name), name, matrix, function, norm, own, reason, alone_too, spread, rows, summed))
    return tuple(merged)


def _not_chain_reason(traced: tuple[TracedLayer, ...], runs: list[PassRecord]) -> str | None:
    """Say where the network is no chain of its layers; None when it is one."""
    if not traced:
        return "no supported layer ran"
    order = list(dict.fromkeys(layer.module_name for layer in traced))
    for index, run in enumerate(runs):
        repeated = [name for name, count in Counter(run.calls).items() if count > 1]
        if repeated:
            return f"layer {repeated[0]!r} runs more than once in a forward pass"
        if run.calls != order:
            return f"calibration batch {index} does not run all layers in the same order as the others"
        if run.cast:
            name, dtype = next(iter(run.cast.items()))
            return f"layer {name!r} puts out {dtype}, which its weights are not, and what that rounds is in no promise"
    several = [layer.module_name for layer in traced if not layer.matrix.kind.observed]
    if several:
        return f"what {several[0]!r} does to a disturbed input is no product with one matrix"
    for previous, layer in pairwise(traced):
        if layer.reads != previous.name:
            return f"the input of layer {layer.name!r} is not exactly the output of layer {previous.name!r}{_behind(previous)}"
    last = traced[-1]
    end = tuple(step_name(step) for step in (last.norm, last.function) if step is not None)
    if any(run.returned != (last.name, end) for run in runs):
        return f"the model's output is not exactly the output of its last layer {last.name!r}{_behind(last)}"
    return None


def _behind(layer: TracedLayer) -> str:
    if layer.activation is None:
        return "" if layer.norm is None else " after its BatchNorm"
    return f" after its {'ReLU' if layer.activation == 'relu' else layer.activation}"
