"""Networks made of blocks, pruned block by block by the pruners of others: each layer on what the network pruned so far gives it.

A block is run on the outputs of the pruned blocks before it, which are kept, so that the whole network is run once and not once a layer.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pruners import PRUNERS

PEERS = ("magnitude", "wanda", "sparsegpt", "alps")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def kept_of(layer: nn.Linear, level: str) -> int | str:
    """What a layer may keep at a level: a number of weights where it is a share, or the pattern."""
    return level if ":" in level else round(float(level) * layer.weight.numel())


class _Reached(Exception):
    """The module has been given its input."""


def _first_calls(run: Callable[[Any], Any], batches: Sequence[Any], module: nn.Module) -> Iterator[Call]:
    """What the module is given, batch by batch; nothing behind it is run."""
    seen: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            try:
                run(batch)
            except _Reached:
                yield seen.pop()
    finally:
        handle.remove()


def _run(block: nn.Module, call: Call) -> Tensor:
    found = block(*call[0], **call[1])
    return found[0] if isinstance(found, tuple) else found


def linear_groups(block: nn.Module, call: Call) -> list[list[nn.Linear]]:
    """A block's linear layers in the order in which they run; those that are given the same tensor one after the other are together."""
    groups: list[list[nn.Linear]] = []
    last: list[Any] = [None]

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        if args[0] is not last[0]:
            groups.append([])
        last[0] = args[0]
        groups[-1].append(layer)

    handles = [layer.register_forward_pre_hook(hook) for layer in block.modules() if isinstance(layer, nn.Linear)]
    try:
        _run(block, call)
    finally:
        for handle in handles:
            handle.remove()
    return groups


@torch.no_grad()
def prune_blocks(
    model: nn.Module,
    blocks: Callable[[nn.Module], Sequence[nn.Module]],
    run: Callable[[nn.Module, Tensor], Any],
    batches: Sequence[Tensor],
    level: str,
    method: str,
) -> nn.Module:
    """A copy of the network, the linear layers of its blocks pruned by one of `PEERS`; layers that are given the same input share its Gram matrix.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    blocks : callable
        The blocks of a network, in the order in which they run; each takes the output of the one before as its first argument.
    run : callable
        Runs a network on a batch.
    batches : sequence of Tensor
    level : str
        The share of each layer's weights that is kept, or a pattern.
    method : str
    """
    pruned = copy.deepcopy(model)
    members = blocks(pruned)
    calls = list(_first_calls(lambda batch: run(pruned, batch), batches, members[0]))
    for block in members:
        for group in linear_groups(block, calls[0]):
            G = torch.zeros((group[0].in_features,) * 2, dtype=torch.float64)
            if method != "magnitude":
                for args, _ in _first_calls(lambda call, block=block: _run(block, call), calls, group[0]):  # type: ignore[misc]
                    A = args[0].flatten(0, -2).double()
                    G.addmm_(A.T, A)
            for layer in group:
                layer.weight.copy_(PRUNERS[method](layer.weight.detach().clone(), G, kept_of(layer, level)))
        calls = [((_run(block, call), *call[0][1:]), call[1]) for call in calls]
    return pruned
