"""The blocks of a network found by structure or by name, and tried on a batch: whether the network is a chain of them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from nettrim import layers
from nettrim.blockwise import HIDDEN, Call, Chain, NotBlocks, equal
from nettrim.calibration import Run, run_batch
from nettrim.errors import ArgumentError, CalibrationError
from nettrim.passes import Stop, evaluation, tensors_in

_SAMPLED = 4096  # of a tensor's elements, where two are compared
_ALIKE = 1e-3  # of the largest: a device may round the same block's sums in another order


def candidates(model: nn.Module, given: object) -> tuple[list[str], str]:
    """The names of what may be the network's blocks, and what they are in words; nothing is run.

    Parameters
    ----------
    model : nn.Module
    given : str or iterable of str
        ``"auto"``: the children of the ``nn.ModuleList`` or ``nn.Sequential`` that hold most of the network's prunable weights and are of one
        type. Or the name of a module whose children they are, or names of theirs and globs.

    Raises
    ------
    NotBlocks
        By its structure it has none.
    ArgumentError
        A name that the model does not have.
    """
    return _by_structure(model) if given == "auto" else _by_name(model, given)


def find(model: nn.Module, names: list[str], said: str, batches: list[Any], run: Run) -> Chain:
    """The network as a chain of the blocks `candidates`, tried on the first of ``batches``; in the others they must be called like there.

    Raises
    ------
    NotBlocks
        It is not made of such blocks; the message says why.
    """
    try:
        chain = _tried(model, names, said, batches[0], run)
        states = [chain.calls(model, batch, index, run)[1] for index, batch in enumerate(batches)]
        return dataclasses.replace(chain, entries=tuple(state.numel() for state in states))
    except NotBlocks:
        raise
    except Exception as error:  # a model may do anything where its blocks are bypassed, or run alone; run whole it may be sound
        cause = error.__cause__ if isinstance(error, CalibrationError) and error.__cause__ is not None else error
        raise NotBlocks(f"run in parts, it fails ({type(cause).__name__}: {cause})") from error


def _weights(module: nn.Module) -> int:
    return sum(found.weight.numel() for found in layers.matrices(module).values() if layers.parameter_reason(found.module) is None)


def _by_structure(model: nn.Module) -> tuple[list[str], str]:
    total, best, where = _weights(model), 0, ""
    for name, module in model.named_modules():
        children = list(module.children())
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(children) < 2 or len({type(child) for child in children}) > 1:
            continue
        if any(layers.is_supported(child) or len(layers.owners(child)) < 2 for child in children):
            continue
        if (size := _weights(module)) > best:
            best, where = size, name
    if 2 * best <= total or total == 0:
        raise NotBlocks("no nn.ModuleList or nn.Sequential of blocks of one type holds most of its weights")
    found = [f"{where}.{name}".lstrip(".") for name, _ in model.get_submodule(where).named_children()]
    return found, f"{where or 'the network'}: {len(found)} blocks"


def _by_name(model: nn.Module, given: object) -> tuple[list[str], str]:
    listed = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not listed or not all(isinstance(name, str) for name in listed):
        ways = "None, 'auto', the name of a module whose children are the blocks, or names or globs of blocks"
        raise ArgumentError(f"blocks={given!r}; expected {ways}")
    modules = dict(model.named_modules())
    if len(listed) == 1 and listed[0] in modules and isinstance(modules[listed[0]], nn.ModuleList | nn.Sequential):
        found = [f"{listed[0]}.{name}".lstrip(".") for name, _ in modules[listed[0]].named_children()]
        return found, f"{listed[0] or 'the network'}: {len(found)} blocks"
    found = []
    for pattern in listed:
        matched = [name for name in modules if name == pattern or (fnmatch.fnmatchcase(name, pattern) and name.count(".") == pattern.count("."))]
        if not matched:
            raise ArgumentError(f"blocks: {pattern!r} matches no module of the model; expected a name, or a glob such as 'model.layers.*'")
        found += [name for name in matched if name not in found]
    return found, f"{len(found)} blocks, {found[0]} to {found[-1]}"


def _tried(model: nn.Module, names: list[str], said: str, batch: Any, run: Run) -> Chain:
    """The chain, tried on a batch."""
    seen: list[tuple[str, list[Any], list[Any], TreeSpec]] = []

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            leaves, spec = tree_flatten(out)
            seen.append((name, tree_flatten((args, kwargs))[0], leaves, spec))

        return after

    with evaluation(model), ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True).remove)
        whole = [tensor for tensor in tensors_in(run_batch(model, batch, 0, run)) if tensor.is_floating_point()]
    order = [name for name, *_ in seen]
    if len(set(order)) < len(order) or set(order) != set(names):
        once = next((name for name in names if order.count(name) != 1), "")
        raise NotBlocks(f"{once!r} runs {order.count(once)} times in a forward pass; expected once")
    slots: list[int] = []
    outputs: list[tuple[list[Any], TreeSpec]] = []
    states: list[Tensor] = []
    for place, (name, given, out, spec) in enumerate(seen):
        first = next((index for index, leaf in enumerate(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
        if first is None:
            raise NotBlocks(f"{name!r} returns no tensor of floating-point numbers")
        hidden = states[-1] if states else None
        places = [index for index, leaf in enumerate(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        slot = next((index for index in places if given[index] is hidden), None)
        if slot is None:
            slot = next((index for index in places if (hidden is None and given[index].shape == out[first].shape)
                         or (hidden is not None and equal(given[index], hidden))), None)  # fmt: skip
        if slot is None:
            raise NotBlocks(f"the input of {name!r} is not the output of the block before it ({order[place - 1] if place else 'there is none'})")
        template: list[Any] = []
        for index, leaf in enumerate(out):
            passed = next((place for place, other in enumerate(given) if other is leaf), None) if isinstance(leaf, Tensor) else None
            if index != first and isinstance(leaf, Tensor) and passed is None:
                raise NotBlocks(f"{name!r} returns more than one tensor that it computes")
            template.append(HIDDEN if index == first else passed if passed is not None else (leaf,))
        slots.append(slot)
        outputs.append((template, spec))
        states.append(out[first])
    chain = Chain(tuple(order), tuple(slots), tuple(outputs), said)
    _check_inputs(chain, model, batch, run)
    _check_alone(chain, model, batch, run, states)
    end = [tensor for tensor in tensors_in(chain.end(model, batch, 0, run, states[-1])) if tensor.is_floating_point()]
    sole = len(end) == len(whole) and all(_alike(a, b) for a, b in zip(end, whole, strict=True))  # a cache, say, holds more
    return dataclasses.replace(chain, sole=sole)


def _check_inputs(chain: Chain, model: nn.Module, batch: Any, run: Run) -> None:
    """Whatever the blocks put out, each is given what the one before it did, and all else that it is given stays as it is."""
    calls, first = chain.calls(model, batch, 0, run)
    generator = torch.Generator().manual_seed(0)
    made = [first]
    seen = 0

    def put_out(place: int, call: Call, hidden: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        name, expected = chain.names[place], calls[place]
        if not equal(hidden, made[-1]):
            raise NotBlocks(f"the input of {name!r} is not the output of the block before it")
        changed = len(call.leaves) != len(expected.leaves) or any(
            isinstance(a, Tensor) and isinstance(b, Tensor) and not equal(a, b) for a, b in zip(call.leaves, expected.leaves, strict=True)
        )
        if changed:
            raise NotBlocks(f"what {name!r} is called with depends on what the blocks before it compute")
        if place + 1 == len(chain.names):
            raise Stop
        made.append(torch.randn(hidden.shape, generator=generator).to(hidden))
        return made[-1].clone()

    with evaluation(model), chain.bypassed(model, put_out):
        try:
            run_batch(model, batch, 0, run)
        except Stop:
            return
    raise NotBlocks(f"{seen} of its {len(chain.names)} blocks ran; expected all of them")


def _check_alone(chain: Chain, model: nn.Module, batch: Any, run: Run, states: list[Tensor]) -> None:
    """Every block alone gives what it gives in the network."""
    calls, hidden = chain.calls(model, batch, 0, run)
    for place, name in enumerate(chain.names):
        block = model.get_submodule(name)
        args, kwargs = calls[place].arguments(hidden, None)
        with evaluation(block):
            hidden = chain.hidden(place, block(*args, **kwargs))
        if not _alike(hidden, states[place]):
            raise NotBlocks(f"{name!r} run alone does not give what it gives in the network")


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    step = max(1, a.numel() // _SAMPLED)
    ours, theirs = (x.detach().reshape(-1)[::step].double() for x in (a, b))
    size = float(theirs.abs().max()) if theirs.numel() else 0.0
    return bool(((ours - theirs).abs() <= _ALIKE * size).all()) if size > 0 else bool((ours == theirs).all())
