"""``nettrim.shrink``: take neurons that do nothing out of a network, and leave a smaller dense one that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import calibration as calibrations
from nettrim import capture, layers, passes
from nettrim.errors import ArgumentError, CalibrationError, NetTrimError
from nettrim.surroundings import left_out
from nettrim.tracing import Trace, TracedLayer, trace

# by the least precise parameter: how far outputs may differ, relative to their norm, when sums are taken in another order
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_DIGIT = 128  # marks are digits of the neuron's number: (1 .. 128) / 128 is exact in every dtype


@dataclass(frozen=True)
class _Pair:
    """A layer and the one that is all that reads it: column j of the reader belongs to neuron j of the layer."""

    layer: TracedLayer
    reader: TracedLayer

    @property
    def neurons(self) -> int:
        return self.layer.module.get_parameter("weight").shape[0]


@torch.inference_mode(False)
@left_out()
def shrink(model: nn.Module, sample: Any, *, forward_fn: Callable[[nn.Module, Any], Any] | None = None) -> nn.Module:
    """Make a smaller dense network that computes the same function, by removing the neurons that do nothing.

    A neuron (a row of an ``nn.Linear``'s weight) is removed when it is constant, because its row is zero, or when nobody reads it, because its
    column in the next ``nn.Linear`` is zero. What a constant neuron puts out, ``relu(bias)`` or without a ReLU ``bias``, moves into the next
    layer's bias. Rows and columns are judged on what is left, so that one removal leads to the next, in both directions.

    Parameters
    ----------
    model : nn.Module
        E.g. the result of a pruning that zeroes whole neurons. It is run in evaluation mode, and left as it was.
    sample : Tensor, tuple, mapping, or iterable of batches
        A few inputs, as for :func:`nettrim.prune`: they show how the layers are connected, and the result is checked on them.
    forward_fn : callable(model, batch), optional
        Where ``model(batch)`` is not how a batch is run.

    Returns
    -------
    nn.Module
        A copy, also where there is nothing to remove. Its modules have the same types and names; the layers concerned have fewer
        ``out_features`` and ``in_features`` and new parameters. A reader without a bias is given one when a constant needs it.

    Raises
    ------
    ArgumentError
        The model is no module, cannot be copied, or holds parameters that cannot be computed with; CalibrationError if it is the sample.
    NetTrimError
        The smaller network's outputs on the sample differ from the model's by more than rounding: 1e-10 of their norm in float64, 1e-4 in
        float32, 1e-2 in float16, 5e-2 in bfloat16 (by the least precise parameter of the model).

    Notes
    -----
    Neurons are removed from a layer only where the runs show that its output, after a ReLU or nothing, is the input of one other layer,
    neuron by neuron, and is used for nothing else. Reshapes that leave the last dimension alone, and dropout, may be between. All other
    layers are left alone: those that feed a residual sum, several layers or the output, shared modules and parameters, layers that run more
    than once, and those whose number of neurons the code in between counts on. The inputs and outputs of the network are never removed, and
    a layer keeps at least one neuron.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if forward_fn is not None and not callable(forward_fn):
        raise ArgumentError(f"forward_fn={forward_fn!r}; expected a callable(model, batch)")
    run = calibrations.runner(forward_fn)
    batches = calibrations.batches(sample)
    pairs = _pairs(trace(model, batches, run))
    if not all(bool(mask.all()) for mask in _live(pairs, _variable(pairs)).values()):
        pairs = _proven(layers.copy_of(model), pairs, batches, run)
    variable = _variable(pairs)
    live, shifts = _live(pairs, variable), _shifts(pairs, variable)
    smaller = layers.copy_of(model)
    changed = []
    for name in dict.fromkeys(layer.name for pair in pairs for layer in (pair.layer, pair.reader)):
        inputs = next((live[pair.layer.name] for pair in pairs if pair.reader.name == name), None)
        if _rebuild(smaller.get_submodule(name), name, live.get(name), inputs, shifts.get(name)):
            changed.append(name)
    if changed:
        _check_same(model, smaller, batches, run, changed)
    return smaller


def _pairs(found: Trace) -> list[_Pair]:
    """Layers whose output has one use, the input of another layer, in execution order."""
    plain = {layer.name: layer for layer in found.layers if layer.skip_reason is None and layer.norm is None and _is_plain(layer.module)}
    pairs = [_Pair(plain[str(reader.reads)], reader) for reader in plain.values() if reader.reads_alone and reader.reads in plain]
    order = list(plain)
    # a flattened layer may be read by one with more inputs than it has neurons
    fitting = [pair for pair in pairs if pair.reader.module.get_parameter("weight").shape[1] == pair.neurons]
    return sorted(fitting, key=lambda pair: order.index(pair.layer.name))


def _is_plain(module: nn.Module) -> bool:
    """Whether a weight and a bias are all that depends on the number of neurons: a subclass may hold more."""
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return isinstance(module, nn.Linear) and tensors <= {"weight", "bias"}


# ------------------------------------------------------------------------------------------- is column j neuron j?


@dataclass
class _Probe:
    """What a run with marked neurons has shown, by the name of the pair's layer."""

    ran: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    refuted: set[str] = field(default_factory=set)


def _proven(model: nn.Module, pairs: list[_Pair], batches: list[Any], run: calibrations.Run) -> list[_Pair]:
    """Those pairs in which the reader's column j is neuron j, whatever the number of neurons, in a copy of the network.

    The trace sees *that* a layer reads all of another's output, but not in which order: with as many tokens as neurons a transpose fits too.
    So the copy is run with one neuron fewer and each neuron's number in place of its output; the reader must find them in their places. That
    also shows that the copy runs its own layers, and not, through a closure, the model's.
    """
    digits = 1
    while _DIGIT**digits < max(pair.neurons for pair in pairs):
        digits += 1
    todo = [(index, digit) for index in range(len(batches)) for digit in range(digits)]
    while pairs and todo:
        index, digit = todo[-1]
        names = {pair.layer.name for pair in pairs}
        probe = _Probe()
        with passes.evaluation(model), _marked(model, pairs, digit, probe):
            try:
                calibrations.run_batch(model, batches[index], index, run)
                probe.refuted |= names - probe.read
            except CalibrationError:  # the code in between wants all neurons, or cannot stand what it is given
                probe.refuted = probe.refuted or probe.ran - probe.read or names
        if probe.refuted:
            pairs = [pair for pair in pairs if pair.layer.name not in probe.refuted]
        else:
            todo.pop()
    return pairs


@contextmanager
def _marked(model: nn.Module, pairs: list[_Pair], digit: int, probe: _Probe) -> Iterator[None]:
    """Let every pair's layer put out marks, all but the last, and its reader compare them and go on with all."""

    def connect(pair: _Pair) -> tuple[Callable[..., Any], Callable[..., Any]]:
        name = pair.layer.name
        numbers = torch.arange(pair.neurons) // _DIGIT**digit % _DIGIT + 1
        fewer = max(pair.neurons - 1, 1)

        def write(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            probe.ran.add(name)
            return (numbers[:fewer].to(out) / _DIGIT).expand(*out.shape[:-1], fewer).clone()

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = args[0] if args else kwargs["input"]
            probe.read.add(name)
            marks = numbers.to(x) / _DIGIT
            if x.shape[-1:] != (fewer,) or not bool((x == marks[:fewer]).all()):
                probe.refuted.add(name)
            return (marks.expand(*x.shape[:-1], pair.neurons),), {}

        return write, read

    with ExitStack() as stack:
        for pair in pairs:
            write, read = connect(pair)
            layer, reader = model.get_submodule(pair.layer.name), model.get_submodule(pair.reader.name)
            stack.callback(layer.register_forward_hook(write, prepend=True).remove)
            stack.callback(reader.register_forward_pre_hook(read, with_kwargs=True).remove)
        yield


# ------------------------------------------------------------------------------------------------ what can be removed


def _variable(pairs: list[_Pair]) -> dict[str, Tensor]:
    """By layer, which neurons are not constant: their row has a nonzero for an input that is not constant."""
    found: dict[str, Tensor] = {}
    before = {pair.reader.name: pair.layer.name for pair in pairs}
    for pair in pairs:
        nonzero = (pair.layer.module.get_parameter("weight") != 0).cpu()
        if pair.layer.name in before:
            nonzero = nonzero[:, found[before[pair.layer.name]]]
        found[pair.layer.name] = nonzero.any(1)
    return found


def _live(pairs: list[_Pair], variable: dict[str, Tensor]) -> dict[str, Tensor]:
    """By layer, which neurons are neither constant nor unread.

    One pass forwards, `_variable`, and one backwards are enough: an unread neuron's column is zero for all that stays, so that its removal makes
    no neuron constant.
    """
    live = dict(variable)
    for pair in reversed(pairs):
        nonzero = (pair.reader.module.get_parameter("weight") != 0).cpu()
        if pair.reader.name in live:
            nonzero = nonzero[live[pair.reader.name]]
        live[pair.layer.name] = live[pair.layer.name] & nonzero.any(0)
    return live


def _shifts(pairs: list[_Pair], variable: dict[str, Tensor]) -> dict[str, Tensor]:
    """By layer, what the constant neurons before it add to its bias; float64, on the CPU."""
    shifts: dict[str, Tensor] = {}
    for pair in pairs:
        bias, constant = pair.layer.module._parameters["bias"], (~variable[pair.layer.name]).nonzero().squeeze(1)
        value = torch.zeros(pair.neurons, dtype=torch.float64) if bias is None else bias.detach().to("cpu", torch.float64)
        if pair.layer.name in shifts:
            value = value + shifts[pair.layer.name]
        if pair.layer.function is not None:
            value = pair.layer.function(value)
        weight = pair.reader.module.get_parameter("weight").detach()
        shifts[pair.reader.name] = weight[:, constant.to(weight.device)].to("cpu", torch.float64) @ value[constant]
    return shifts


# --------------------------------------------------------------------------------------------------- the smaller network


def _taken(tensor: Tensor, live: Tensor | None, dim: int) -> Tensor:
    """The live entries along a dimension; a single one of zeros where none is, because a layer needs one."""
    if live is None:
        return tensor
    index = live.to(tensor.device).nonzero().squeeze(1)
    return tensor.index_select(dim, index) if len(index) else torch.zeros_like(tensor.narrow(dim, 0, 1))


def _rebuild(module: nn.Module, name: str, outputs: Tensor | None, inputs: Tensor | None, shift: Tensor | None) -> bool:
    """Keep the live outputs and inputs of a layer and add the shift to its bias; False where that changes nothing."""
    assert isinstance(module, nn.Linear)
    shift = None if shift is None or not shift.any() else shift
    if shift is None and all(live is None or bool(live.all()) for live in (outputs, inputs)):
        return False
    weight, bias = module.weight.detach(), module._parameters["bias"]
    if shift is not None:
        wide = shift if bias is None else bias.detach().to("cpu", torch.float64) + shift
        moved = wide.to(device=weight.device, dtype=weight.dtype if bias is None else bias.dtype)
        if not torch.isfinite(moved).all():
            raise NetTrimError(
                f"the constants that layer {name!r} reads, moved into its bias, are beyond the range of {moved.dtype} "
                f"(size {float(wide.abs().max()):.4g}); shrink the model in a wider dtype"
            )
        taken = _taken(moved, outputs, 0)
        if bias is not None or bool(taken.any()):
            module.bias = nn.Parameter(taken, requires_grad=(module.weight if bias is None else bias).requires_grad)
    elif bias is not None:
        module.bias = nn.Parameter(_taken(bias.detach(), outputs, 0), requires_grad=bias.requires_grad)
    weight = _taken(_taken(weight, outputs, 0), inputs, 1)
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    module.out_features, module.in_features = weight.shape
    return True


def _check_same(model: nn.Module, smaller: nn.Module, batches: list[Any], run: calibrations.Run, changed: list[str]) -> None:
    """Refuse a smaller network that does not put out what the model does."""
    dtypes = {parameter.dtype for parameter in model.parameters()} & TOLERANCE.keys()
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    expected = capture.outputs(model, batches, run)
    advice = (
        f"something besides the layers decides what the model puts out: random numbers, a branch on a hidden value, or the sizes of the layers "
        f"({', '.join(map(repr, changed))} were made smaller). Give a forward_fn that leaves it out, or shrink the part of the model without it. "
        "The model is unchanged"
    )
    try:
        found = capture.outputs(smaller, batches, run)
    except CalibrationError as error:
        raise NetTrimError(f"the smaller network does not run on the sample: {error}. Probably {advice}") from error
    if found.shape != expected.shape:
        raise NetTrimError(f"the smaller network's output has shape {tuple(found.shape)}, the model's {tuple(expected.shape)}: {advice}")
    norm, difference = float(expected.double().norm()), float((found.double() - expected.double()).norm())
    if difference > tolerance * norm:
        raise NetTrimError(
            f"the smaller network's output differs from the model's by {difference:.3g}, its norm is {norm:.3g}; expected at most {tolerance:g} of "
            f"it, for rounding. Either {advice}; or products are computed at reduced precision (autocast, TF32): turn that off for this call"
        )
